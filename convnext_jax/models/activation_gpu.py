"""The activation's passes over memory on NVIDIA GPUs, as Pallas kernels for JAX's Triton backend.

Left to itself, XLA does not merge a GELU with the sums over it: it writes values in float32, in another layout, and
reads them again for each sum.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from convnext_jax.models.normal import density_and_cdf, widened
from convnext_jax.models.nvidia import triton as plgpu

ROWS, COLUMNS, WARPS = 16, 128, 4  # of a block: 16 elements for each of a program's 128 threads
PROGRAMS = 132 * 8  # about; each sums many rows, so that few partial sums go through memory


def gelu_gradients(
    x: jax.Array, bias: jax.Array, cotangent: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The cotangents of x and bias of `activation.gelu`."""
    return _gradients(x, bias, cotangent, interpret=interpret)


def gelu_and_response_norm(
    x: jax.Array, bias: jax.Array, gamma: jax.Array, beta: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """As `activation.gelu_and_response_norm`: two reads of x, one write."""
    (squares,) = _sums(x, bias, interpret=interpret)
    factors = (gamma * response_weights(squares) + 1)[:, None, None]
    y = widened(x) + bias
    return (y * density_and_cdf(y, x.dtype)[1] * factors + beta).astype(x.dtype)


def gelu_and_response_norm_gradients(
    x: jax.Array, bias: jax.Array, gamma: jax.Array, beta: jax.Array, cotangent: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The cotangents of the arguments of `gelu_and_response_norm`: two reads of x and cotangent, one write."""
    squares, products, sums = _sums(x, bias, cotangent, interpret=interpret)
    weights, pull_back = jax.vjp(response_weights, squares)
    (squares_cotangent,) = pull_back(gamma * products)
    scale = gamma * weights + 1
    dx, dbias = _gradients(x, bias, cotangent, (scale, 2 * squares_cotangent), interpret=interpret)
    return dx, dbias, (weights * products).sum(0), sums.sum(0)


def response_weights(squares: jax.Array) -> jax.Array:
    """The weight of each channel from its sum of squares: (..., C) → (..., C)."""
    # The square root's derivative at zero is infinite: a dead channel takes a norm, and a gradient, of zero.
    alive = squares > 0
    norms = jnp.where(alive, jnp.sqrt(jnp.where(alive, squares, 1)), 0)
    return norms / (norms.mean(-1, keepdims=True) + 1e-6)


def _sums(x: jax.Array, bias: jax.Array, *cotangent: jax.Array, interpret: bool) -> tuple[jax.Array, ...]:
    """Sums over H and W of y², with y = gelu(x + bias); with a cotangent c also of c · y and of c. One pass.

    Args:
        x: (N, H, W, C).
        bias: (C,).
        cotangent: none, or one of x's shape.
        interpret: run on any platform, for tests.

    Returns:
        (N, C) float32 each.
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
        at, exists = (n, row[:, None], column[None, :]), (row < rows)[:, None] & (column < channels)[None, :]
        y = plgpu.load(x_ref.at[at], mask=exists, other=0.0).astype(jnp.float32) + bias
        y = jnp.where(exists, y * density_and_cdf(y, x_ref.dtype)[1], 0.0)
        terms = [y * y]
        if cotangent_ref is not None:
            cotangent = plgpu.load(cotangent_ref.at[at], mask=exists, other=0.0).astype(jnp.float32)
            terms += [cotangent * y, cotangent]
        return tuple(total + term for total, term in zip(sums, terms, strict=True))

    sums = lax.fori_loop(0, steps, add_block, (jnp.zeros((ROWS, COLUMNS), jnp.float32),) * len(sum_refs))
    for ref, total in zip(sum_refs, sums, strict=True):
        plgpu.store(ref.at[n, part, column], total.sum(0), mask=column < channels)


def _gradients(
    x: jax.Array, bias: jax.Array, cotangent: jax.Array, factors: tuple[jax.Array, ...] = (), *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """The cotangents of x and bias of z = gelu(x + bias), in one pass.

    Args:
        x, cotangent: (N, ..., C).
        bias: (C,).
        factors: none; or a and b, (N, C) each, where z's cotangent is a · cotangent + b · z.
        interpret: run on any platform, for tests.
    """
    channels = x.shape[-1]
    flat = x.reshape(-1, channels)
    tiles, blocks = pl.cdiv(channels, COLUMNS), pl.cdiv(flat.shape[0], ROWS)
    steps = pl.cdiv(blocks * tiles, PROGRAMS)
    programs = pl.cdiv(blocks, steps)
    dx, dbias = pl.pallas_call(
        functools.partial(_kernel, steps=steps, rows_of_example=flat.shape[0] // x.shape[0]),
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


def _kernel(x_ref, bias_ref, cotangent_ref, *refs, steps: int, rows_of_example: int) -> None:
    *factor_refs, dx_ref, dbias_ref = refs
    rows, channels = x_ref.shape
    column = pl.program_id(0) * COLUMNS + lax.iota(jnp.int32, COLUMNS)
    first = pl.program_id(1) * steps
    bias = plgpu.load(bias_ref.at[column], mask=column < channels, other=0.0)[None, :]

    def add_block(step, total):
        row = (first + step) * ROWS + lax.iota(jnp.int32, ROWS)
        exists = (row < rows)[:, None] & (column < channels)[None, :]

        def load(ref, row):
            return plgpu.load(ref.at[row[:, None], column[None, :]], mask=exists, other=0.0).astype(jnp.float32)

        y = load(x_ref, row) + bias
        density, cdf = density_and_cdf(y, x_ref.dtype)
        cotangent = load(cotangent_ref, row)
        if factor_refs:
            a, b = (load(ref, row // rows_of_example) for ref in factor_refs)
            cotangent = a * cotangent + b * y * cdf
        gradient = cotangent * (cdf + y * density)
        plgpu.store(dx_ref.at[row[:, None], column[None, :]], gradient.astype(dx_ref.dtype), mask=exists)
        return total + jnp.where(exists, gradient, 0.0)

    total = lax.fori_loop(0, steps, add_block, jnp.zeros((ROWS, COLUMNS), jnp.float32))
    plgpu.store(dbias_ref.at[pl.program_id(1), column], total.sum(0), mask=column < channels)
