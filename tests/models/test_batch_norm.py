"""BatchNorm against plain float64 numpy, on one device and over several."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from convnext_jax.errors import UserError
from convnext_jax.models import get_statistics, get_weights, with_parameters
from convnext_jax.models.batch_norm import BatchNorm


def random(*shape, seed=0, scale=1.0, shift=0.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale + shift).astype(np.float32)


def batch_norm(channels):
    norm = BatchNorm(channels)
    norm.scale[...] = random(channels, seed=1)
    norm.bias[...] = random(channels, seed=2)
    return norm


@pytest.mark.parametrize(('shift', 'tolerance'), [(0.0, 1e-5), (1000.0, 2e-3)])
def test_batch_norm_equals_pytorch(shift, tolerance):
    """A published head would drift in fine-tuning: the running variance is unbiased, the batch variance is biased."""
    norm, mean, variance = batch_norm(24), np.zeros(24), np.ones(24)
    scale, bias = np.asarray(norm.scale[...]), np.asarray(norm.bias[...])
    for step in range(3):
        x = jnp.asarray(random(2, 3, 5, 24, seed=10 + step, scale=3, shift=shift))
        wide = np.asarray(x, np.float64).reshape(-1, 24)
        expected = (np.asarray(x) - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5) * scale + bias
        np.testing.assert_allclose(norm(x, training=True), expected, rtol=tolerance, atol=tolerance)
        mean = 0.9 * mean + 0.1 * wide.mean(0)
        variance = 0.9 * variance + 0.1 * wide.var(0, ddof=1)
        np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(norm.variance[...], variance, rtol=1e-5)
    expected = (np.asarray(x) - mean) / np.sqrt(variance + 1e-5) * scale + bias
    np.testing.assert_allclose(norm(x, training=False), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5, atol=1e-6, err_msg='inference updated the running mean')


def test_batch_norm_of_bfloat16_computes_in_float32_and_returns_bfloat16():
    """Running statistics in bfloat16 would not change: a tenth of a small difference is rounded away."""
    norm, x = batch_norm(24), jnp.asarray(random(4, 8, 8, 24, shift=3.0), jnp.bfloat16)
    wide = np.asarray(x, np.float64).reshape(-1, 24)
    y = norm(x, training=True)
    expected = (np.asarray(x, np.float64) - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    expected = expected * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    assert y.dtype == norm(x, training=False).dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.1 * wide.mean(0), rtol=1e-6)
    assert norm.mean.dtype == norm.variance.dtype == jnp.float32


@pytest.mark.parametrize('shape', [(4, 3, 2), (8,)])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_batch_norm_gradients_equal_autodiff(shape, dtype):
    """A mistake in the hand-written derivative would give wrong gradients with which the loss still falls."""
    x, cotangent = (jnp.asarray(random(*shape, 6, seed=seed, shift=seed), dtype) for seed in (3, 4))
    norm = batch_norm(6)

    def formula(x, scale, bias):
        wide, axes = jnp.asarray(x, jnp.float32), tuple(range(len(shape)))
        y = (wide - wide.mean(axes)) / jnp.sqrt(wide.var(axes) + 1e-5) * scale + bias
        return (y * cotangent).sum()

    def layer(x, scale, bias):
        statistics = get_statistics(norm)
        return (with_parameters(norm, {'scale': scale, 'bias': bias, **statistics})(x, training=True) * cotangent).sum()

    arguments = (x, norm.scale[...], norm.bias[...])
    expected = jax.grad(formula, argnums=(0, 1, 2))(*arguments)
    for ours, other in zip(jax.grad(layer, argnums=(0, 1, 2))(*arguments), expected, strict=True):
        assert ours.dtype == other.dtype
        rounding = 2e-5 if ours.dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(*(np.asarray(g, np.float64) for g in (ours, other)), rtol=rounding, atol=rounding)


def test_batch_norm_over_devices_uses_the_global_batch():
    """With few images per device, the mean and variance of each device's images would be noise."""
    x, cotangent = jnp.asarray(random(16, 3, 6, shift=2)), random(16, 3, 6, seed=1)
    norm, mesh = batch_norm(6), Mesh(np.reshape(jax.devices(), (4, 2)), ('data', 'fsdp'))

    def run(weights, x, cotangent):
        def loss(weights, x):
            model = with_parameters(norm, weights)
            y = model(x, training=True)
            return (y * cotangent).sum(), (y, get_statistics(model))

        (_, outputs), (_, gradient) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, x)
        return outputs, gradient

    sharded, replicated = PartitionSpec(('data', 'fsdp')), PartitionSpec()
    in_specs, out_specs = (replicated, sharded, sharded), ((sharded, replicated), sharded)
    on_devices = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    weights = get_weights(norm)
    found, expected = jax.jit(on_devices)(weights, x, cotangent), run(weights, x, cotangent)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


def test_batch_norm_refuses_one_value_per_channel():
    """With one image and a 1×1 feature map, the running variance would be NaN for the rest of the run."""
    with pytest.raises(UserError, match='more than one value per channel: increase batch_size'):
        BatchNorm(6)(jnp.ones((1, 1, 1, 6)), training=True)
    assert BatchNorm(6)(jnp.ones((1, 1, 1, 6)), training=False).shape == (1, 1, 1, 6)
