"""Pallas kernels of the depthwise convolution for NVIDIA GPUs, on JAX's Triton backend.

A program computes a strip of columns of one image for a group of channels, row by row from the top. It loads each row
of x once for each kernel column, and multiplies it in registers by all kernel rows. Sums are float32.

Times in ms of the compiler's convolution (cuDNN) and of these kernels, for 128 images in bfloat16 on an H100 with jax
0.11.2:

    shape           forward or input gradient   kernel gradient
                    cuDNN          Pallas       cuDNN  Pallas
    56 × 56 × 96    0.31 to 3.77   0.26         7.28   0.29
    28 × 28 × 192   0.18           0.13         4.83   0.15
    14 × 14 × 384   0.10           0.09         2.41   0.09
    7 × 7 × 768     0.08           0.05         2.11   0.07
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from convnext_jax.models.nvidia import triton as plgpu

STRIP = 256  # columns × channels of a strip: two elements for each of a program's 128 threads
ROWS = 2  # rows per step of the loop
IMAGES = 4  # images per program of the kernel gradient, so that fewer partial sums go through memory


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
    strip = 64 if channels % 64 == 0 else 32
    return pl.pallas_call(
        functools.partial(_convolve, columns=STRIP // strip, channels=strip),
        grid=(pl.cdiv(channels, strip), pl.cdiv(width, STRIP // strip), n),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
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
    strips = pl.cdiv(width, STRIP // 32)
    parts = pl.pallas_call(
        functools.partial(_sum_products, images=images, columns=STRIP // 32, channels=32, size=size),
        grid=(pl.cdiv(channels, 32), strips, n // images),
        out_shape=jax.ShapeDtypeStruct((n // images * strips, size, size, channels), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name='depthwise_kernel_gradient',
    )(x, cotangent)
    return parts.sum(0)


def _convolve(x_ref, kernel_ref, y_ref, *, columns: int, channels: int) -> None:
    _, height, width, depth = x_ref.shape
    size = kernel_ref.shape[0]
    reach = size // 2
    n = pl.program_id(2)
    column, channel = _indices(columns, channels)
    kernel = [
        [plgpu.load(kernel_ref.at[r, c, channel], mask=channel < depth, other=0.0)[None] for c in range(size)]
        for r in range(size)
    ]
    inside = (column < width)[:, None] & (channel < depth)[None, :]

    def write(row, value):
        ref = y_ref.at[n, row, column[:, None], channel[None, :]]
        plgpu.store(ref, value.astype(y_ref.dtype), mask=inside & (row >= 0) & (row < height))

    def add_row(row, sums):
        """Adds a row of x to the sums: sums[k] is the result at row `row + k - reach`, and sums[0] is now complete."""
        sums = [*sums, jnp.zeros((columns, channels), jnp.float32)]
        for c in range(size):
            x = _load(x_ref, n, row, column + (c - reach), channel)
            for r in range(size):
                sums[size - 1 - r] += x * kernel[r][c]
        write(row - reach, sums[0])
        return sums[1:]

    sums = _each_row(height, add_row, [jnp.zeros((columns, channels), jnp.float32)] * (size - 1))
    for k in range(reach):
        write(pl.cdiv(height, ROWS) * ROWS + k - reach, sums[k])


def _sum_products(x_ref, cotangent_ref, y_ref, *, images: int, columns: int, channels: int, size: int) -> None:
    _, height, _, depth = x_ref.shape
    reach = size // 2
    column, channel = _indices(columns, channels)
    first, part = pl.program_id(2) * images, pl.program_id(2) * pl.num_programs(1) + pl.program_id(1)

    def add_image(image, sums):
        def add_row(row, window_and_sums):
            """Adds a row of x to the sums; the window holds the cotangent's rows `row - reach` to `row + reach`."""
            window, sums = window_and_sums[: size - 1], window_and_sums[size - 1 :]
            window = [*window, _load(cotangent_ref, first + image, row + reach, column, channel)]
            for c in range(size):
                x = _load(x_ref, first + image, row, column + (c - reach), channel)
                for r in range(size):
                    sums[r * size + c] += x * window[size - 1 - r]
            return window[1:] + sums

        window = [_load(cotangent_ref, first + image, row, column, channel) for row in range(-reach, reach)]
        return tuple(_each_row(height, add_row, [*window, *sums])[size - 1 :])

    sums = lax.fori_loop(0, images, add_image, (jnp.zeros((columns, channels), jnp.float32),) * size**2)
    for r in range(size):
        for c in range(size):
            plgpu.store(y_ref.at[part, r, c, channel], sums[r * size + c].sum(0), mask=channel < depth)


def _indices(columns: int, channels: int) -> tuple[jax.Array, jax.Array]:
    """The column and channel indices of a program's strip."""
    column = pl.program_id(1) * columns + lax.iota(jnp.int32, columns)
    return column, pl.program_id(0) * channels + lax.iota(jnp.int32, channels)


def _each_row(height: int, function, carry: list[jax.Array]) -> list[jax.Array]:
    """The carry after `function(row, carry)` for each row, with `ROWS` rows per step of the loop.

    The last step may go beyond the image: `_load` gives zeros there.
    """

    def step(index, carry):
        carry = list(carry)
        for row in range(ROWS):
            carry = function(index * ROWS + row, carry)
        return tuple(carry)

    return list(lax.fori_loop(0, pl.cdiv(height, ROWS), step, tuple(carry)))


def _load(ref, n, row, column, channel) -> jax.Array:
    """Part of one row as (columns, channels) float32, with zeros outside the image."""
    _, height, width, depth = ref.shape
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    mask = inside[:, None] & (channel < depth)[None, :]
    return plgpu.load(ref.at[n, row, column[:, None], channel[None, :]], mask=mask, other=0.0).astype(jnp.float32)
