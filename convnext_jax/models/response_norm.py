"""Global response normalisation (GRN; arXiv:2301.00808, algorithm 1) as a function of arrays."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from convnext_jax.models.normal import widened
from convnext_jax.models.parameters import AnyArray


def response_norm(
    x: Float[Array, 'n h w c'], gamma: Float[AnyArray, ' c'], beta: Float[AnyArray, ' c']
) -> Float[Array, 'n h w c']:
    """gamma · x · n + beta + x, where n is each channel's norm over H and W, divided by the mean norm of all channels.

    Args:
        x: (N, H, W, C) float; norms are computed for each image, in at least float32.
        gamma, beta: (C,) float32.

    Returns:
        (N, H, W, C) of x's dtype.
    """
    wide = widened(x)
    norms = relative_norms(jnp.square(wide).sum((1, 2), keepdims=True))
    return (wide * norms * gamma + beta + wide).astype(x.dtype)


def relative_norms(squares: Float[Array, '*batch c']) -> Float[Array, '*batch c']:
    """Each channel's norm divided by the mean norm of all channels, from the sums of squares: (..., C) → (..., C)."""
    # The derivative of the square root is infinite at 0. A channel of zeros gets a norm and a gradient of 0 instead.
    positive = squares > 0
    norms = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)
    return norms / (norms.mean(-1, keepdims=True) + 1e-6)
