"""Pallas kernels of the activation for NVIDIA GPUs, on JAX's Triton backend.

XLA does not fuse a GELU with the reductions over its result: it writes the values in float32, in another layout, and
reads them again for each reduction.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from convnext_jax.models.normal import density_and_cdf, widened
from convnext_jax.models.nvidia import triton as plgpu
from convnext_jax.models.response_norm import relative_norms

ROWS, COLUMNS, WARPS = 16, 128, 4  # size of a block: 16 elements for each of a program's 128 threads
PROGRAMS = 132 * 8  # approximate number of programs; each sums many rows, so that few partial sums go through memory


def gelu_gradients(
    x: Float[Array, '*batch c'],
    bias: Float[Array, ' c'],
    cotangent: Float[Array, '*batch c'],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, '*batch c'], Float[Array, ' c']]:
    """The cotangents of the arguments of `activation.gelu`.

    Args:
        x, cotangent: (..., C) float of 16 bits.
        bias: (C,) float32.
        interpret: run in Pallas' interpreter on any platform, for tests.

    Returns:
        Cotangents of x, (..., C), and of bias, (C,), in the dtypes of x and bias.
    """
    return _gradients(x, bias, cotangent, interpret=interpret)


def gelu_and_response_norm(
    x: Float[Array, 'n h w c'],
    bias: Float[Array, ' c'],
    gamma: Float[Array, ' c'],
    beta: Float[Array, ' c'],
    *,
    interpret: bool = False,
) -> Float[Array, 'n h w c']:
    """`activation.gelu_and_response_norm` in two reads of x and one write; `interpret` as for `gelu_gradients`."""
    (squares,) = _sums(x, bias, interpret=interpret)
    factors = (gamma * relative_norms(squares) + 1)[:, None, None]
    y = widened(x) + bias
    return (y * density_and_cdf(y, x.dtype)[1] * factors + beta).astype(x.dtype)


def gelu_and_response_norm_gradients(
    x: Float[Array, 'n h w c'],
    bias: Float[Array, ' c'],
    gamma: Float[Array, ' c'],
    beta: Float[Array, ' c'],
    cotangent: Float[Array, 'n h w c'],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, 'n h w c'], Float[Array, ' c'], Float[Array, ' c'], Float[Array, ' c']]:
    """The cotangents of the arguments of `gelu_and_response_norm`, in two reads of x and cotangent and one write."""
    squares, products, sums = _sums(x, bias, cotangent, interpret=interpret)
    norms, pull_back = jax.vjp(relative_norms, squares)
    (squares_cotangent,) = pull_back(gamma * products)
    scale = gamma * norms + 1
    dx, dbias = _gradients(x, bias, cotangent, (scale, 2 * squares_cotangent), interpret=interpret)
    return dx, dbias, (norms * products).sum(0), sums.sum(0)


def _sums(x: jax.Array, bias: jax.Array, *cotangent: jax.Array, interpret: bool) -> tuple[jax.Array, ...]:
    """Sums over H and W, in one pass: of y² with y = gelu(x + bias), and if a cotangent c is given, of c · y and of c.

    Args:
        x: (N, H, W, C) float of 16 bits.
        bias: (C,) float32.
        cotangent: at most one array, of x's shape.
        interpret: as for `gelu_gradients`.

    Returns:
        One or three arrays, (N, C) float32.
    """
    n, height, width, channels = x.shape
    tiles, blocks = pl.cdiv(channels, COLUMNS), pl.cdiv(height * width, ROWS)
    parts = min(pl.cdiv(PROGRAMS, n * tiles), blocks)
    steps = pl.cdiv(blocks, parts)
    parts = pl.cdiv(blocks, steps)
    sums = pl.pallas_call(
        functools.partial(_sums_kernel, steps=steps),
        grid=(tiles, parts, n),
        out_shape=[jax.ShapeDtypeStruct((n, parts, channels), jnp.float32)] * (3 if cotangent else 1),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name='gelu_sums',
    )(bias, *(array.reshape(n, height * width, channels) for array in (x, *cotangent)))
    return tuple(array.sum(1) for array in sums)


def _sums_kernel(bias_ref, x_ref, *refs, steps: int) -> None:
    _, rows, channels = x_ref.shape
    cotangent_ref, *sum_refs = refs if len(refs) > 1 else (None, *refs)
    column = pl.program_id(0) * COLUMNS + lax.iota(jnp.int32, COLUMNS)
    part, n = pl.program_id(1), pl.program_id(2)
    bias = plgpu.load(bias_ref.at[column], mask=column < channels, other=0.0)[None, :]

    def add_block(step, sums):
        row = (part * steps + step) * ROWS + lax.iota(jnp.int32, ROWS)
        indices, inside = (n, row[:, None], column[None, :]), (row < rows)[:, None] & (column < channels)[None, :]
        y = plgpu.load(x_ref.at[indices], mask=inside, other=0.0).astype(jnp.float32) + bias
        y = jnp.where(inside, y * density_and_cdf(y, x_ref.dtype)[1], 0.0)
        terms = [y * y]
        if cotangent_ref is not None:
            cotangent = plgpu.load(cotangent_ref.at[indices], mask=inside, other=0.0).astype(jnp.float32)
            terms += [cotangent * y, cotangent]
        return tuple(total + term for total, term in zip(sums, terms, strict=True))

    sums = lax.fori_loop(0, steps, add_block, (jnp.zeros((ROWS, COLUMNS), jnp.float32),) * len(sum_refs))
    for ref, total in zip(sum_refs, sums, strict=True):
        plgpu.store(ref.at[n, part, column], total.sum(0), mask=column < channels)


def _gradients(
    x: jax.Array, bias: jax.Array, cotangent: jax.Array, factors: tuple[jax.Array, ...] = (), *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """The cotangents of x and bias for z = gelu(x + bias), in one pass.

    Args:
        x, cotangent: (N, ..., C) float of 16 bits.
        bias: (C,) float32.
        factors: () if the cotangent of z is `cotangent`. With two arrays a and b, (N, C) float32 each, the cotangent of
            z is a · cotangent + b · z.
        interpret: as for `gelu_gradients`.

    Returns:
        (N, ..., C) and (C,), in the dtypes of x and bias.
    """
    channels = x.shape[-1]
    flat = x.reshape(-1, channels)
    tiles, blocks = pl.cdiv(channels, COLUMNS), pl.cdiv(flat.shape[0], ROWS)
    steps = pl.cdiv(blocks * tiles, PROGRAMS)
    programs = pl.cdiv(blocks, steps)
    dx, dbias = pl.pallas_call(
        functools.partial(_gradients_kernel, steps=steps, rows_per_image=flat.shape[0] // x.shape[0]),
        grid=(tiles, programs),
        out_shape=[
            jax.ShapeDtypeStruct(flat.shape, x.dtype),
            jax.ShapeDtypeStruct((programs, channels), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name='gelu_gradients',
    )(flat, bias, cotangent.reshape(flat.shape), *factors)
    return dx.reshape(x.shape), dbias.sum(0).astype(bias.dtype)


def _gradients_kernel(x_ref, bias_ref, cotangent_ref, *refs, steps: int, rows_per_image: int) -> None:
    *factor_refs, dx_ref, dbias_ref = refs
    rows, channels = x_ref.shape
    column = pl.program_id(0) * COLUMNS + lax.iota(jnp.int32, COLUMNS)
    first = pl.program_id(1) * steps
    bias = plgpu.load(bias_ref.at[column], mask=column < channels, other=0.0)[None, :]

    def add_block(step, total):
        row = (first + step) * ROWS + lax.iota(jnp.int32, ROWS)
        inside = (row < rows)[:, None] & (column < channels)[None, :]

        def load(ref, row):
            return plgpu.load(ref.at[row[:, None], column[None, :]], mask=inside, other=0.0).astype(jnp.float32)

        y = load(x_ref, row) + bias
        density, cdf = density_and_cdf(y, x_ref.dtype)
        cotangent = load(cotangent_ref, row)
        if factor_refs:
            a, b = (load(ref, row // rows_per_image) for ref in factor_refs)
            cotangent = a * cotangent + b * y * cdf
        gradient = cotangent * (cdf + y * density)
        plgpu.store(dx_ref.at[row[:, None], column[None, :]], gradient.astype(dx_ref.dtype), mask=inside)
        return total + jnp.where(inside, gradient, 0.0)

    total = lax.fori_loop(0, steps, add_block, jnp.zeros((ROWS, COLUMNS), jnp.float32))
    plgpu.store(dbias_ref.at[pl.program_id(1), column], total.sum(0), mask=column < channels)
