"""The norms of the architectures: LayerNorm in most of them, RMSNorm or SimpleNorm in some models of timm."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from convnext_jax.models.layers import STATISTICS, LayerNorm
from convnext_jax.models.parameters import AnyArray
from convnext_jax.models.variants import Variant


class RMSNorm(nnx.Module):
    """Divides by the root mean square of the last axis, then scales: (..., C) → (..., C)."""

    def __init__(self, channels: int, *, epsilon: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, '*batch c']) -> Float[Array, '*batch c']:
        square = jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True)
        return _divided(x, square + self.epsilon, self.scale[...])


class SimpleNorm(nnx.Module):
    """Divides by the standard deviation of the last axis, then scales: (..., C) → (..., C).

    The mean is not subtracted, and the variance is the unbiased estimate, with C − 1 in the denominator.
    """

    def __init__(self, channels: int, *, epsilon: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, '*batch c']) -> Float[Array, '*batch c']:
        variance = x.astype(jnp.float32).var(-1, ddof=1, keepdims=True)
        return _divided(x, variance + self.epsilon, self.scale[...])


def _divided(
    x: Float[Array, '*batch c'], square: Float[Array, '*batch 1'], scale: Float[AnyArray, ' c']
) -> Float[Array, '*batch c']:
    """x / √square · scale, computed in float32: (..., C) of x's dtype."""
    inverse = checkpoint_name(jax.lax.rsqrt(square), STATISTICS)
    return (x.astype(jnp.float32) * inverse * scale).astype(x.dtype)


Norm = LayerNorm | RMSNorm | SimpleNorm
NORM_CLASSES: dict[str, type[Norm]] = {'layernorm': LayerNorm, 'rmsnorm': RMSNorm, 'simplenorm': SimpleNorm}
"""Value of `Variant.norm` → class."""


def create_norm(variant: Variant, channels: int, *, epsilon: float | None = None) -> Norm:
    """A newly initialised norm of the architecture. The default of `epsilon` is `variant.norm_eps`."""
    return NORM_CLASSES[variant.norm](channels, epsilon=variant.norm_eps if epsilon is None else epsilon)
