"""GELU and GRN against closed forms and autodiff, and the Pallas kernels for NVIDIA GPUs in interpret mode."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.models import activation, activation_gpu
from convnext_jax.models.activation import gelu, gelu_and_response_norm
from convnext_jax.models.response_norm import response_norm

erf = np.vectorize(math.erf)
erfc = np.vectorize(math.erfc)


def exact_gelu(y):
    return 0.5 * y * erfc(-y / math.sqrt(2))


def exact_slope(y):
    return 0.5 * erfc(-y / math.sqrt(2)) + y * np.exp(-(y**2) / 2) / math.sqrt(2 * math.pi)


def test_gelu_is_the_erf_form():
    """The tanh form differs by up to 5e-4 in each unit, which changes the logits of published weights."""
    x = np.linspace(-8, 8, 4001, dtype=np.float32)[:, None]
    y = gelu(jnp.asarray(x), jnp.zeros(1))
    np.testing.assert_allclose(y, exact_gelu(x.astype(np.float64)), rtol=1e-6, atol=1e-6)


def test_gelu_gradients_equal_the_closed_form():
    """Training would use wrong gradients, or end with NaN after an overflow at a large value."""
    x = np.concatenate([np.linspace(-8, 8, 401), [-1e30, -40, 40, 1e30]]).astype(np.float32)[:, None]
    bias, weights = jnp.asarray([0.25]), np.random.default_rng(0).standard_normal(x.shape)
    dx, dbias = jax.grad(lambda x, b: (gelu(x, b) * jnp.asarray(weights, jnp.float32)).sum(), (0, 1))(
        jnp.asarray(x), bias
    )
    with np.errstate(over='ignore'):
        expected = exact_slope(x.astype(np.float64) + 0.25) * weights
    np.testing.assert_allclose(dx, expected, atol=2e-6)
    np.testing.assert_allclose(dbias, [expected.sum()], rtol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_16_bit_gelu_has_only_rounding_errors(dtype):
    """The approximation of Φ must not cost precision at any of the values of the dtype."""
    bits = jnp.arange(2**16, dtype=jnp.uint16)
    x = jax.lax.bitcast_convert_type(bits, dtype)
    x = x[jnp.isfinite(x)][:, None]
    wide = np.asarray(x, np.float64)
    half_ulp, smallest = float(jnp.finfo(dtype).eps) / 2, 10 * float(jnp.finfo(dtype).tiny)
    y, pull_back = jax.vjp(lambda x: gelu(x, jnp.zeros(1)), x)
    assert y.dtype == dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), exact_gelu(wide), rtol=1.01 * half_ulp, atol=smallest)
    (slope,) = pull_back(jnp.ones_like(x))
    with np.errstate(over='ignore'):
        np.testing.assert_allclose(np.asarray(slope, np.float64), exact_slope(wide), atol=1.1 * half_ulp)


def inputs(shape, dtype):
    keys = jax.random.split(jax.random.key(0), 5)
    x, cotangent = (2 * jax.random.normal(key, shape).astype(dtype) for key in keys[:2])
    bias, gamma, beta = (jax.random.normal(key, shape[-1:]) for key in keys[2:])
    return x, cotangent, bias, gamma, beta


def float32_block(x, bias, gamma, beta):
    """GELU and GRN in plain JAX, which autodiff differentiates."""
    y = jax.nn.gelu(x + bias, approximate=False)
    norms = jnp.sqrt(jnp.square(y).sum((1, 2), keepdims=True))
    return gamma * y * norms / (norms.mean(-1, keepdims=True) + 1e-6) + beta + y


def relative(value, expected):
    return float(jnp.abs(value.astype(jnp.float32) - expected).max() / jnp.abs(expected).max())


# Channels and rows of an image that do not fill the blocks of the kernels; images smaller than a block.
SHAPES = [(3, 2, 5, 160), (2, 7, 7, 96)]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-7)])
def test_gelu_with_response_norm_equals_autodiff(shape, dtype, tolerance):
    """ConvNeXt V2 would train with wrong gradients, on GPUs or on other platforms."""
    x, cotangent, *parameters = inputs(shape, dtype)

    @jax.jit
    def by_autodiff(x, cotangent, *parameters):
        y, pull_back = jax.vjp(float32_block, x, *parameters)
        return y, *pull_back(cotangent)

    @jax.jit
    def native(x, cotangent, *parameters):
        y, pull_back = jax.vjp(gelu_and_response_norm, x, *parameters)
        return y, *pull_back(cotangent)

    @jax.jit
    def on_gpu(x, cotangent, *parameters):
        y = activation_gpu.gelu_and_response_norm(x, *parameters, interpret=True)
        return y, *activation_gpu.gelu_and_response_norm_gradients(x, *parameters, cotangent, interpret=True)

    expected = by_autodiff(x.astype(jnp.float32), cotangent.astype(jnp.float32), *parameters)
    for results in (native(x, cotangent, *parameters), on_gpu(x, cotangent, *parameters)):
        assert [relative(*pair) <= tolerance for pair in zip(results, expected, strict=True)] == [True] * 5
        assert [result.dtype for result in results] == [dtype, dtype, *['float32'] * 3]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-8)])
def test_the_gelu_kernel_equals_the_native_gradients(shape, dtype, tolerance):
    """ConvNeXt V1 would train with wrong gradients on GPUs."""
    x, cotangent, bias, *_ = inputs(shape, dtype)
    expected = jax.jit(activation._gelu_gradients)(x, bias, cotangent)
    results = jax.jit(partial(activation_gpu.gelu_gradients, interpret=True))(x, bias, cotangent)
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        assert relative(result, wanted.astype(jnp.float32)) <= tolerance


def test_gelu_and_response_norm_is_gelu_then_response_norm():
    """The GRN layer and the blocks must compute one function: published weights are checked with either."""
    x, _, bias, gamma, beta = inputs((2, 3, 3, 8), jnp.float32)
    np.testing.assert_allclose(
        response_norm(gelu(x, bias), gamma, beta), gelu_and_response_norm(x, bias, gamma, beta), atol=1e-6
    )
