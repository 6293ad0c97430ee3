"""The standard normal distribution's density φ and cumulative distribution Φ, for the GELU.

The functions are plain JAX and also run inside Pallas kernels.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Φ(−z) = exp(−z²/2) · Σ TAIL[k] · t^(k+1) with t = 1 / (1 + SLOPE · z), z ≥ 0. The formula is Abramowitz and Stegun
# 7.1.26; these coefficients minimise the largest relative error, which is 4.7e-6.
SLOPE = 0.31
TAIL = (0.1238606, 0.12044213, 0.13342702, 0.01574904, 0.18044703, -0.07392814)


def widened(x: Float[Array, '*shape']) -> Float[Array, '*shape']:
    """x in float32; unchanged if its dtype is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def density_and_cdf(
    y: Float[Array, '*shape'], dtype: jnp.dtype
) -> tuple[Float[Array, '*shape'], Float[Array, '*shape']]:
    """φ(y) and Φ(y), with an error below the rounding of `dtype`.

    For a dtype of 16 bits, both take one exponential and one division.

    Args:
        y: any shape, float32 or wider.
        dtype: dtype to which the caller rounds the values that it computes from φ and Φ.

    Returns:
        Two arrays of y's shape and dtype.
    """
    exponential = jnp.exp(-0.5 * y * y)
    density = exponential * (2 * jnp.pi) ** -0.5
    if jnp.dtype(dtype).itemsize >= 4:
        return density, 0.5 + 0.5 * lax.erf(y * 0.5**0.5)
    t = 1 / (1 + SLOPE * jnp.abs(y))
    series = jnp.zeros_like(t)
    for coefficient in reversed(TAIL):
        series = (series + coefficient) * t
    tail = exponential * series
    return density, jnp.where(y < 0, tail, 1 - tail)
