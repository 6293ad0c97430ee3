"""Pallas kernels of the layer norm for NVIDIA GPUs, on JAX's Triton backend.

XLA reads x twice for mean and variance. In its backward pass it writes the gradient in float32 and reads it twice
more. Here the statistics take one pass and the backward pass another.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from convnext_jax.models.nvidia import triton as plgpu

ELEMENTS = 2048  # size of a block: 16 elements for each of a program's 128 threads
PROGRAMS = 132 * 8  # programs of the backward kernel; each sums many rows, so that few partial sums go through memory


def statistics(
    x: Float[Array, '*batch c'], epsilon: float, *, interpret: bool = False
) -> tuple[Float[Array, '*batch 1'], Float[Array, '*batch 1']]:
    """Mean and 1 / standard deviation over the last axis.

    Args:
        x: (..., C) float.
        epsilon: value added to the variance.
        interpret: run in Pallas' interpreter on any platform, for tests.

    Returns:
        Two arrays, (..., 1) float32.
    """
    channels = x.shape[-1]
    flat = x.reshape(-1, channels)
    rows, _ = _block(channels)
    mean, inverse = pl.pallas_call(
        functools.partial(_statistics, epsilon=epsilon),
        grid=(pl.cdiv(flat.shape[0], rows),),
        out_shape=[jax.ShapeDtypeStruct(flat.shape[:1], jnp.float32)] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name='norm_statistics',
    )(flat)
    shape = (*x.shape[:-1], 1)
    return mean.reshape(shape), inverse.reshape(shape)


def gradients(
    x: Float[Array, '*batch c'],
    mean: Float[Array, '*batch 1'],
    inverse: Float[Array, '*batch 1'],
    scale: Float[Array, ' c'],
    cotangent: Float[Array, '*batch c'],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, '*batch c'], Float[Array, ' c'], Float[Array, ' c']]:
    """The cotangents of x, scale and bias of a layer norm.

    Args:
        x, cotangent: (..., C) float.
        mean, inverse: the results of `statistics`, (..., 1) float32.
        scale: (C,) float32.
        interpret: as for `statistics`.

    Returns:
        Cotangents of x, (..., C) of x's dtype, and of scale and bias, (C,) float32.
    """
    channels = x.shape[-1]
    flat = x.reshape(-1, channels)
    rows, _ = _block(channels)
    blocks = pl.cdiv(flat.shape[0], rows)
    steps = pl.cdiv(blocks, PROGRAMS)
    programs = pl.cdiv(blocks, steps)
    dx, dscale, dbias = pl.pallas_call(
        functools.partial(_gradients, steps=steps),
        grid=(programs,),
        out_shape=[
            jax.ShapeDtypeStruct(flat.shape, x.dtype),
            jax.ShapeDtypeStruct((programs, channels), jnp.float32),
            jax.ShapeDtypeStruct((programs, channels), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name='norm_gradients',
    )(flat, mean.reshape(-1), inverse.reshape(-1), scale, cotangent.reshape(flat.shape))
    return dx.reshape(x.shape), dscale.sum(0), dbias.sum(0)


def _block(channels: int) -> tuple[int, int]:
    """Rows and columns of a block: powers of two, as Triton requires."""
    columns = pl.next_power_of_2(channels)
    return max(ELEMENTS // columns, 1), columns


def _indices(ref, block: jax.Array | int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The row and column indices of a block, and the mask of the elements that lie inside the array."""
    rows, columns = _block(ref.shape[1])
    row = block * rows + lax.iota(jnp.int32, rows)
    column = lax.iota(jnp.int32, columns)
    return row, column, (row < ref.shape[0])[:, None] & (column < ref.shape[1])[None, :]


def _statistics(x_ref, mean_ref, inverse_ref, *, epsilon: float) -> None:
    channels = x_ref.shape[1]
    row, column, inside = _indices(x_ref, pl.program_id(0))
    x = plgpu.load(x_ref.at[row[:, None], column[None, :]], mask=inside, other=0.0).astype(jnp.float32)
    mean = x.sum(1) / channels
    centred = jnp.where(inside, x - mean[:, None], 0.0)
    variance = (centred * centred).sum(1) / channels
    plgpu.store(mean_ref.at[row], mean, mask=row < x_ref.shape[0])
    plgpu.store(inverse_ref.at[row], lax.rsqrt(variance + epsilon), mask=row < x_ref.shape[0])


def _gradients(x_ref, mean_ref, inverse_ref, scale_ref, cotangent_ref, dx_ref, dscale_ref, dbias_ref, *, steps: int):
    channels = x_ref.shape[1]
    _, column, _ = _indices(x_ref, 0)
    first = pl.program_id(0) * steps
    scale = plgpu.load(scale_ref.at[column], mask=column < channels, other=0.0)

    def add_block(step, sums):
        row, _, inside = _indices(x_ref, first + step)
        indices = row[:, None], column[None, :]
        mean = plgpu.load(mean_ref.at[row], mask=row < x_ref.shape[0], other=0.0)[:, None]
        inverse = plgpu.load(inverse_ref.at[row], mask=row < x_ref.shape[0], other=0.0)[:, None]
        x = plgpu.load(x_ref.at[indices], mask=inside, other=0.0).astype(jnp.float32)
        cotangent = plgpu.load(cotangent_ref.at[indices], mask=inside, other=0.0).astype(jnp.float32)
        y = jnp.where(inside, (x - mean) * inverse, 0.0)
        scaled = cotangent * scale[None, :]
        mean_scaled = scaled.sum(1)[:, None] / channels
        mean_product = (scaled * y).sum(1)[:, None] / channels
        dx = inverse * (scaled - mean_scaled - y * mean_product)
        plgpu.store(dx_ref.at[indices], dx.astype(dx_ref.dtype), mask=inside)
        return sums[0] + cotangent * y, sums[1] + cotangent

    zeros = jnp.zeros(_block(channels), jnp.float32)
    dscale, dbias = lax.fori_loop(0, steps, add_block, (zeros, zeros))
    plgpu.store(dscale_ref.at[pl.program_id(0), column], dscale.sum(0), mask=column < channels)
    plgpu.store(dbias_ref.at[pl.program_id(0), column], dbias.sum(0), mask=column < channels)
