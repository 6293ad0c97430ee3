"""Pallas kernels of the depthwise convolution for NVIDIA GPUs, on JAX's Triton backend.

Each thread of a program computes one channel of a strip of columns of an image, row by row from the top. The columns
are separate arrays in registers, so that each value of x is loaded once per strip and used for all kernel positions.
Loads and multiply-adds of different columns are independent, which hides the latency of the memory. Sums are float32.

Times in ms of the compiler's convolution (cuDNN) and of these kernels, for 128 images in bfloat16 on an H200 with jax
0.11.2 (blank: not measured):

    shape           forward or input gradient   kernel gradient
                    cuDNN   Pallas              cuDNN   Pallas
    28 × 28 × 256   0.23    0.13                        0.15
    14 × 14 × 512   0.13    0.07                3.04    0.08
    7 × 7 × 1024    0.07    0.04                        0.05
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from convnext_jax.models.nvidia import triton as plgpu

WARP = 32  # threads
MAX_COLUMNS = 7  # per strip: with more, fewer warps fit into the registers of a multiprocessor
IMAGES = 2  # images per program of the kernel gradient, so that fewer partial sums go through memory


def fits(x: jax.Array, size: int, dilation: int) -> bool:
    """Whether the kernels support these sizes: a window of `size` rows of a strip must fit into registers."""
    return x.size > 0 and dilation == 1 and size <= 7


def depthwise_conv_on_gpu(
    x: Float[Array, 'n h w c'], kernel: Float[Array, 'k k c'], *, interpret: bool = False
) -> Float[Array, 'n h w c']:
    """The convolution with zero padding that preserves H and W.

    Args:
        x: (N, H, W, C) float.
        kernel: (K, K, C) float, cast to x's dtype.
        interpret: run in Pallas' interpreter on any platform, for tests.

    Returns:
        (N, H, W, C) of x's dtype.
    """
    n, _, width, channels = x.shape
    strips, columns = _strips(width)
    threads = _threads(channels)
    return pl.pallas_call(
        functools.partial(_convolve, threads=threads, columns=columns),
        grid=(pl.cdiv(channels, threads), strips, n),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=threads // WARP, num_stages=1),
        interpret=interpret,
        name='depthwise',
    )(x, kernel.astype(x.dtype).astype(jnp.float32))


def depthwise_kernel_gradient_on_gpu(
    x: Float[Array, 'n h w c'], cotangent: Float[Array, 'n h w c'], *, size: int, interpret: bool = False
) -> Float[Array, '{size} {size} c']:
    """The cotangent of the kernel, (K, K, C) float32.

    Args:
        x, cotangent: the input and the cotangent of the result, (N, H, W, C) float.
        size: K.
        interpret: as for `depthwise_conv_on_gpu`.
    """
    n, _, width, channels = x.shape
    images = max(images for images in range(1, IMAGES + 1) if n % images == 0)
    strips, columns = _strips(width)
    threads = _threads(channels)
    parts = pl.pallas_call(
        functools.partial(_sum_products, images=images, threads=threads, columns=columns, size=size),
        grid=(pl.cdiv(channels, threads), strips, n // images),
        out_shape=jax.ShapeDtypeStruct((n // images * strips, size, size, channels), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=threads // WARP, num_stages=1),
        interpret=interpret,
        name='depthwise_kernel_gradient',
    )(x, cotangent)
    return parts.sum(0)


def _strips(width: int) -> tuple[int, int]:
    """The number of strips that cover the width, and the number of columns of a strip."""
    strips = pl.cdiv(width, MAX_COLUMNS)
    return strips, pl.cdiv(width, strips)


def _threads(channels: int) -> int:
    """Threads of a program, which compute one channel each."""
    return 2 * WARP if channels % (2 * WARP) == 0 else WARP


def _convolve(x_ref, kernel_ref, y_ref, *, threads: int, columns: int) -> None:
    _, height, width, depth = x_ref.shape
    size = kernel_ref.shape[0]
    reach = size // 2
    n, left, channel = pl.program_id(2), _left(width, columns), _channel(threads)
    kernel = [
        [plgpu.load(kernel_ref.at[r, c, channel], mask=channel < depth, other=0.0) for c in range(size)]
        for r in range(size)
    ]
    zeros = (jnp.zeros((threads,), jnp.float32),) * columns

    def write(row, values):
        for c, value in enumerate(values):
            mask = _mask(y_ref, row, left + c, channel)
            plgpu.store(y_ref.at[n, row, left + c, channel], value.astype(y_ref.dtype), mask=mask)

    def add_row(row, sums):
        """Adds a row of x to the sums: sums[k] is the result at row `row + k - reach`, and sums[0] is now complete."""
        sums = [list(values) for values in (*sums, zeros)]
        for column in _columns(left, columns, reach, width):
            x = _load(x_ref, n, row, left + column, channel)
            for c in range(columns):
                if abs(column - c) <= reach:
                    for r in range(size):
                        sums[size - 1 - r][c] += x * kernel[r][column - c + reach]
        write(row - reach, sums[0])
        return tuple(map(tuple, sums[1:]))

    sums = lax.fori_loop(0, height, add_row, (zeros,) * (size - 1))
    for k in range(reach):
        write(height + k - reach, sums[k])


def _sum_products(x_ref, cotangent_ref, y_ref, *, images: int, threads: int, columns: int, size: int) -> None:
    _, height, width, depth = x_ref.shape
    reach = size // 2
    left, channel = _left(width, columns), _channel(threads)
    first, part = pl.program_id(2) * images, pl.program_id(2) * pl.num_programs(1) + pl.program_id(1)
    zeros = (jnp.zeros((threads,), jnp.float32),) * columns

    def add_image(image, sums):
        def cotangent_row(row):
            return tuple(_load(cotangent_ref, first + image, row, left + c, channel) for c in range(columns))

        def add_row(row, window_and_sums):
            """Adds a row of x to the sums; the window holds the cotangent's rows `row - reach` to `row + reach`."""
            window, sums = window_and_sums
            window, sums = (*window, cotangent_row(row + reach)), list(sums)
            for column in _columns(left, columns, reach, width):
                x = _load(x_ref, first + image, row, left + column, channel)
                for c in range(columns):
                    if abs(column - c) <= reach:
                        for r in range(size):
                            sums[r * size + column - c + reach] += x * window[size - 1 - r][c]
            return window[1:], tuple(sums)

        window = (zeros,) * reach + tuple(cotangent_row(row) for row in range(reach))
        return lax.fori_loop(0, height, add_row, (window, sums))[1]

    sums = lax.fori_loop(0, images, add_image, zeros[:1] * size**2)
    for k, total in enumerate(sums):
        plgpu.store(y_ref.at[part, k // size, k % size, channel], total, mask=channel < depth)


def _channel(threads: int) -> jax.Array:
    """The channels of a program's threads."""
    return pl.program_id(0) * threads + lax.iota(jnp.int32, threads)


def _left(width: int, columns: int) -> int | jax.Array:
    """The first column of a program's strip. For a single strip it is an int, which `_columns` uses while tracing."""
    return 0 if width == columns else pl.program_id(1) * columns


def _columns(left: int | jax.Array, columns: int, reach: int, width: int) -> list[int]:
    """The columns of x that a strip needs, relative to its first column. A single strip omits columns outside x."""
    needed = range(-reach, columns + reach)
    return [column for column in needed if not isinstance(left, int) or 0 <= column < width]


def _load(ref, n, row, column, channel) -> jax.Array:
    """One position of an image as (threads,) float32, with zeros outside the image."""
    mask = _mask(ref, row, column, channel)
    return plgpu.load(ref.at[n, row, column, channel], mask=mask, other=0.0).astype(jnp.float32)


def _mask(ref, row, column, channel) -> jax.Array:
    _, height, width, depth = ref.shape
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return inside & (channel < depth)
