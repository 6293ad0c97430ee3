"""Φ and φ of the standard normal distribution, for the GELU, as plain JAX that Pallas kernels can use too."""

import jax
import jax.numpy as jnp
from jax import lax

# Φ(−z) = exp(−z²/2) · Σ TAIL[k] · t^(k+1) with t = 1 / (1 + SLOPE · z), z ≥ 0: the form of Abramowitz and Stegun
# 7.1.26, fitted for the least relative error, 4.7e-6.
SLOPE = 0.31
TAIL = (0.1238606, 0.12044213, 0.13342702, 0.01574904, 0.18044703, -0.07392814)


def widened(x: jax.Array) -> jax.Array:
    """x in at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def density_and_cdf(y: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """φ(y) and Φ(y), for results that are rounded to `dtype`.

    For 16 bits one exponential and one division give both, with an error far below the rounding.

    Args:
        y: float32 or wider.
        dtype: of the results that are computed from them.
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
