"""The Pallas kernels of the layer norm for NVIDIA GPUs in interpret mode, against the native computation."""

import jax
import jax.numpy as jnp
import pytest

from convnext_jax.models import layers, norm_gpu


@pytest.mark.parametrize('shape', [(2, 5, 7, 96), (2, 2, 768), (40, 24)])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-8)])
def test_the_kernels_equal_the_native_computation(shape, dtype, tolerance):
    """Layer norms would be wrong on GPUs, for instance where rows and channels do not fill a block."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, cotangent = ((3 * jax.random.normal(key, shape) + 1).astype(dtype) for key in keys[:2])
    scale = jax.random.normal(keys[2], shape[-1:])

    @jax.jit
    def native_and_ours(x, scale, cotangent):
        statistics = layers._statistics(x, epsilon=1e-6)
        on_gpu = norm_gpu.statistics(x, 1e-6, interpret=True)
        expected = (*statistics, *layers._gradients(x, *statistics, scale, cotangent))
        return expected, (*on_gpu, *norm_gpu.gradients(x, *statistics, scale, cotangent, interpret=True))

    expected, results = native_and_ours(x, scale, cotangent)
    for result, wanted in zip(results, expected, strict=True):
        assert (result.shape, result.dtype) == (wanted.shape, wanted.dtype)
        difference = jnp.abs(result.astype(jnp.float32) - wanted.astype(jnp.float32)).max()
        assert difference <= tolerance * jnp.abs(wanted.astype(jnp.float32)).max()
