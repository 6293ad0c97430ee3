"""Speed of the depthwise convolution and its two gradients on CPU, compared with torch (channels_last, oneDNN).

    launch/cpu.sh python -m benchmarks.depthwise [--rounds=21] [--batch=8]

The arrays are float32, with the four shapes of ConvNeXt-T. In each round, both libraries are timed over a few calls.
The command prints the median over rounds of the mean time per call, and the median ratio of torch's time to ours.

    python -m benchmarks.depthwise --device [--rounds=21] [--batch=64]

On a GPU or TPU: compares the Pallas kernels with XLA's convolution, and says which option turns them on. The exit
status is 1 if a result is wrong, and 2 if there is no accelerator.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

SHAPES = ((56, 96), (28, 192), (14, 384), (7, 768))  # side, channels
SIZE = 7
CALLS = 4  # timed calls per round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=21)
    parser.add_argument('--batch', type=int, help='images; the default is 8, with --device 64')
    parser.add_argument('--device', action='store_true', help='compare the Pallas kernels with XLA on an accelerator')
    arguments = parser.parse_args()
    if arguments.device:
        from benchmarks import depthwise_kernels  # imported here because it imports JAX
        from convnext_jax.errors import UserError

        try:
            sys.exit(not depthwise_kernels.main(arguments.batch or 64, arguments.rounds))
        except UserError as error:
            parser.error(str(error))
    print(f'{"shape":20}{"":18}{"ours":>10}{"torch":>10}{"ratio":>8}')
    for side, channels in SHAPES:
        shape = (arguments.batch or 8, side, side, channels)
        ours, theirs = _ours(shape), _theirs(shape)
        for name in ours:
            pairs = [(_milliseconds(ours[name]), _milliseconds(theirs[name])) for _ in range(arguments.rounds)]
            own, other = map(statistics.median, zip(*pairs, strict=True))
            ratio = statistics.median(b / a for a, b in pairs)
            print(f'{"×".join(map(str, shape)):20}{name:18}{own:7.2f} ms{other:7.2f} ms{ratio:8.2f}', flush=True)


def _arrays(shape: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(size, np.float32) for size in (shape, (SIZE, SIZE, shape[-1]), shape)]


def _ours(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    import jax

    from convnext_jax.models.depthwise import depthwise_conv

    x, kernel, cotangent = map(jax.numpy.asarray, _arrays(shape))
    forward = jax.jit(depthwise_conv)
    by_input = jax.jit(lambda x, kernel, dy: jax.vjp(lambda x: depthwise_conv(x, kernel), x)[1](dy))
    by_kernel = jax.jit(lambda x, kernel, dy: jax.vjp(lambda kernel: depthwise_conv(x, kernel), kernel)[1](dy))
    return {
        'forward': lambda: jax.block_until_ready(forward(x, kernel)),
        'input gradient': lambda: jax.block_until_ready(by_input(x, kernel, cotangent)),
        'kernel gradient': lambda: jax.block_until_ready(by_kernel(x, kernel, cotangent)),
    }


def _theirs(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    import torch

    x, kernel, cotangent = map(torch.from_numpy, _arrays(shape))
    x, cotangent = x.permute(0, 3, 1, 2), cotangent.permute(0, 3, 1, 2)  # channels_last
    kernel = kernel.permute(2, 0, 1)[:, None].contiguous(memory_format=torch.channels_last)
    margin, channels = SIZE // 2, shape[-1]

    def gradient(which: list[bool]) -> object:
        return torch.ops.aten.convolution_backward(
            cotangent, x, kernel, None, [1, 1], [margin, margin], [1, 1], False, [0, 0], channels, which
        )

    return {
        'forward': lambda: torch.nn.functional.conv2d(x, kernel, padding=margin, groups=channels),
        'input gradient': lambda: gradient([True, False, False]),
        'kernel gradient': lambda: gradient([False, True, False]),
    }


def _milliseconds(function: Callable[[], object]) -> float:
    """The mean time of a call, after one untimed call that refills the caches."""
    function()
    began = time.perf_counter()
    for _ in range(CALLS):
        function()
    return 1000 * (time.perf_counter() - began) / CALLS


if __name__ == '__main__':
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # otherwise torch's threads spin while JAX is timed
    main()
