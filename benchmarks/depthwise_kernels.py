"""Correctness and speed of the Pallas kernels of the depthwise convolution on an accelerator.

`python -m benchmarks.depthwise --device` runs it. The reference is XLA's own convolution and its derivatives.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.errors import UserError
from convnext_jax.models.depthwise import depthwise_conv

SIZE = 7
SHAPES = ((56, 96), (28, 192), (14, 384), (7, 768), (56, 128), (28, 256), (14, 512), (7, 1024))
"""Height and channels of the maps of ConvNeXt-T and ConvNeXt-B at 224 pixels."""
CALLS = 10
"""Calls in a row before the device is synchronised."""
TOLERANCE = 2.0
"""A kernel is accepted if its largest error is at most this multiple of the largest error of XLA's convolution."""

Function = Callable[..., jax.Array]


class Outcome(NamedTuple):
    """The comparison of a kernel with XLA, for one function of the depthwise convolution and one shape.

    Attributes:
        shape: (N, H, W, C).
        function: 'forward', 'input gradient' or 'kernel gradient'.
        error, native_error: largest difference from the result in float32 with full-precision products, divided by
            the standard deviation of that result.
        ms, native_ms: median time of a call in milliseconds.
    """

    shape: tuple[int, ...]
    function: str
    error: float
    native_error: float
    ms: float
    native_ms: float

    @property
    def correct(self) -> bool:
        """Whether the error of the kernel is at most `TOLERANCE` times XLA's error, or as small as float32 rounding."""
        return self.error <= max(TOLERANCE * self.native_error, 1e-5)


def main(batch: int, rounds: int) -> bool:
    """Compares the kernels with XLA on the accelerator of this process, and prints a table and a verdict.

    Args:
        batch: number of images.
        rounds: measurements of each function.

    Returns:
        Whether all kernels are correct.

    Raises:
        UserError: there is no GPU or TPU.
    """
    platform = jax.default_backend()
    if platform == 'cpu':
        raise UserError('JAX finds no GPU or TPU: install convnext_jax with the extra cuda12, cuda13 or tpu')
    print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, bfloat16, {batch} images')
    print(f'{"shape":20}{"":18}{"kernel":>10}{"XLA":>10}{"ratio":>8}{"error":>10}{"of XLA":>10}')
    outcomes = []
    for side, channels in SHAPES:
        shape = (batch, side, side, channels)
        for outcome in compare(functools.partial(depthwise_conv, pallas=True), shape, rounds):
            print(describe(outcome), flush=True)
            outcomes.append(outcome)
    print(verdict(platform, outcomes))
    return all(outcome.correct for outcome in outcomes)


def compare(conv: Function, shape: tuple[int, ...], rounds: int) -> list[Outcome]:
    """Compares a depthwise convolution and its derivatives with XLA's, in bfloat16.

    Args:
        conv: x (N, H, W, C) and kernel (K, K, C) → (N, H, W, C).
        shape: shape of x.
        rounds: measurements of each function.
    """
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(size, np.float32) for size in (shape, (SIZE, SIZE, shape[-1]), shape)]
    narrow = [jnp.asarray(array, jnp.bfloat16) for array in arrays]
    outcomes = []
    for name, function in derivatives(conv).items():
        native = derivatives(native_conv)[name]
        with jax.default_matmul_precision('highest'):
            exact = np.asarray(jax.jit(native)(*(array.astype(jnp.float32) for array in narrow)))
        kernel, xla = jax.jit(function), jax.jit(native)
        errors = [_error(program(*narrow), exact) for program in (kernel, xla)]
        pairs = [(_milliseconds(kernel, narrow), _milliseconds(xla, narrow)) for _ in range(rounds)]
        times = map(statistics.median, zip(*pairs, strict=True))
        outcomes.append(Outcome(shape, name, *errors, *times))
    return outcomes


def native_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """XLA's depthwise convolution with zero padding."""
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        window_strides=(1, 1),
        padding='SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=x.shape[-1],
    )


def derivatives(conv: Function) -> dict[str, Function]:
    """Name → a function of x, kernel and the cotangent of the result."""
    return {
        'forward': lambda x, kernel, cotangent: conv(x, kernel),
        'input gradient': lambda x, kernel, cotangent: jax.vjp(lambda x: conv(x, kernel), x)[1](cotangent)[0],
        'kernel gradient': lambda x, kernel, cotangent: jax.vjp(lambda k: conv(x, k), kernel)[1](cotangent)[0],
    }


def describe(outcome: Outcome) -> str:
    """A row of the table."""
    return (
        f'{"×".join(map(str, outcome.shape)):20}{outcome.function:18}{outcome.ms:7.3f} ms{outcome.native_ms:7.3f} ms'
        f'{outcome.native_ms / outcome.ms:8.2f}{outcome.error:10.1e}{outcome.native_error:10.1e}'
        + ('' if outcome.correct else '  wrong')
    )


def verdict(platform: str, outcomes: Sequence[Outcome]) -> str:
    """What to do with the kernels on this platform."""
    wrong = [outcome for outcome in outcomes if not outcome.correct]
    if wrong:
        return f'wrong: {len(wrong)} of {len(outcomes)} results differ from XLA. Do not use the kernels on this device'
    ratio = sum(outcome.native_ms for outcome in outcomes) / sum(outcome.ms for outcome in outcomes)
    if platform == 'gpu':
        return f'correct, {ratio:.2f} times as fast as XLA. NVIDIA GPUs always use the kernels'
    flag = '--config.model.pallas=true (in Python: pallas=True)'
    if ratio > 1:
        return f'correct, {ratio:.2f} times as fast as XLA: turn the kernels on with {flag}'
    return f'correct, but only {ratio:.2f} times as fast as XLA: do not use {flag}'


def _error(result: jax.Array, exact: np.ndarray) -> float:
    return float(np.abs(np.asarray(result, np.float32) - exact).max() / exact.std())


def _milliseconds(program: Function, arrays: Sequence[jax.Array]) -> float:
    """The mean time of a call, after one untimed call."""
    jax.block_until_ready(program(*arrays))
    began = time.perf_counter()
    for _ in range(CALLS):
        result = program(*arrays)
    jax.block_until_ready(result)
    return 1000 * (time.perf_counter() - began) / CALLS
