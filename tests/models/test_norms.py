"""RMSNorm and SimpleNorm against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.models import Variant
from convnext_jax.models.norms import RMSNorm, SimpleNorm, create_norm


def divisor(kind, x, epsilon):
    square = np.square(x).mean(-1, keepdims=True) if kind is RMSNorm else x.var(-1, ddof=1, keepdims=True)
    return np.sqrt(square + epsilon)


@pytest.mark.parametrize('kind', [RMSNorm, SimpleNorm])
@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-5), ('bfloat16', 2**-8)])
def test_values_equal_float64(kind, dtype, tolerance):
    """timm's models with these norms would give other logits. The mean is not 0, which distinguishes the two."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(2.0, 1.0, (2, 3, 5, 24)), dtype)
    norm = kind(24, epsilon=0.1)
    norm.scale[...] = scale = rng.standard_normal(24).astype(np.float32)
    wide = np.asarray(x, np.float64)
    y = norm(x)
    assert y.dtype == dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), wide / divisor(kind, wide, 0.1) * scale, tolerance, 1e-6)


@pytest.mark.parametrize('kind', [RMSNorm, SimpleNorm])
def test_gradients_are_finite_for_constant_channels(kind):
    """The loss would become NaN for an image with a uniform region."""
    gradient = jax.grad(lambda x: kind(8)(x).sum())(jnp.full((2, 8), 3.0))
    assert jnp.isfinite(gradient).all()


def test_the_variant_decides_kind_and_epsilon():
    """timm's models with another norm or epsilon would give other logits."""
    norm = create_norm(Variant((1,), (8,), norm='simplenorm', norm_eps=1e-5), 8)
    assert (type(norm), norm.epsilon) == (SimpleNorm, 1e-5)
    assert create_norm(Variant((1,), (8,), norm='rmsnorm'), 8, epsilon=1e-3).epsilon == 1e-3
