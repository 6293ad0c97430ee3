"""The depthwise convolution and its two gradients beside torch's (channels_last, oneDNN), at ConvNeXt-T's four shapes.

    launch/cpu.sh python -m benchmarks.depthwise [--rounds=21] [--batch=8]

float32. The two take turns of a few calls; milliseconds are medians of their means,
the ratio is torch's time to ours.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np

SHAPES = ((56, 96), (28, 192), (14, 384), (7, 768))  # side, channels
SIZE = 7
CALLS = 4  # of a turn that count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=21)
    parser.add_argument('--batch', type=int, default=8)
    arguments = parser.parse_args()
    print(f'{"shape":20}{"":18}{"here":>10}{"torch":>10}{"ratio":>8}')
    for side, channels in SHAPES:
        shape = (arguments.batch, side, side, channels)
        ours, theirs = _ours(shape), _theirs(shape)
        for name in ours:
            pairs = [(_milliseconds(ours[name]), _milliseconds(theirs[name])) for _ in range(arguments.rounds)]
            here, there = map(statistics.median, zip(*pairs, strict=True))
            ratio = statistics.median(b / a for a, b in pairs)
            print(f'{"×".join(map(str, shape)):20}{name:18}{here:7.2f} ms{there:7.2f} ms{ratio:8.2f}', flush=True)


def _arrays(shape: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(size, np.float32) for size in (shape, (SIZE, SIZE, shape[-1]), shape)]


def _ours(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    import jax

    from convnext_jax.models.depthwise import depthwise_conv

    x, kernel, error = map(jax.numpy.asarray, _arrays(shape))
    forward = jax.jit(depthwise_conv)
    by_input = jax.jit(lambda x, kernel, error: jax.vjp(lambda x: depthwise_conv(x, kernel), x)[1](error))
    by_kernel = jax.jit(lambda x, kernel, error: jax.vjp(lambda kernel: depthwise_conv(x, kernel), kernel)[1](error))
    return {
        'forward': lambda: jax.block_until_ready(forward(x, kernel)),
        'input gradient': lambda: jax.block_until_ready(by_input(x, kernel, error)),
        'kernel gradient': lambda: jax.block_until_ready(by_kernel(x, kernel, error)),
    }


def _theirs(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    import torch

    x, kernel, error = map(torch.from_numpy, _arrays(shape))
    x, error = x.permute(0, 3, 1, 2), error.permute(0, 3, 1, 2)  # channels_last
    kernel = kernel.permute(2, 0, 1)[:, None].contiguous(memory_format=torch.channels_last)
    margin, channels = SIZE // 2, shape[-1]

    def gradient(which: list[bool]) -> object:
        return torch.ops.aten.convolution_backward(
            error, x, kernel, None, [1, 1], [margin, margin], [1, 1], False, [0, 0], channels, which
        )

    return {
        'forward': lambda: torch.nn.functional.conv2d(x, kernel, padding=margin, groups=channels),
        'input gradient': lambda: gradient([True, False, False]),
        'kernel gradient': lambda: gradient([False, True, False]),
    }


def _milliseconds(function: Callable[[], object]) -> float:
    """Of one call, in a turn whose first brings back what the other's turn drove out of the caches."""
    function()
    began = time.perf_counter()
    for _ in range(CALLS):
        function()
    return 1000 * (time.perf_counter() - began) / CALLS


if __name__ == '__main__':
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # or torch's threads would spin on our cores in our turn
    main()
