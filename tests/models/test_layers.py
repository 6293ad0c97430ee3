"""The small layers against plain float64 numpy, and their values at the edges."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from convnext_jax.errors import UserError
from convnext_jax.models import Execution, get_statistics, get_weights, with_parameters
from convnext_jax.models.layers import (
    GRN,
    BatchNorm,
    LayerNorm,
    Linear,
    PatchConv,
    SameConv,
    drop_path,
    matmul,
    normal,
)
from convnext_jax.models.trunk import Depthwise


def random(*shape, seed=0, scale=1.0, shift=0.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale + shift).astype(np.float32)


@pytest.mark.parametrize('epsilon', [1e-6, 1e-12])
@pytest.mark.parametrize(
    ('shift', 'tolerance'),
    [
        (0.0, 1e-5),
        # E[x²] − E[x]² would be off by 1 and more here; float32 itself holds the input to 3e-5.
        (1000.0, 2e-3),
    ],
)
def test_layer_norm_equals_float64(epsilon, shift, tolerance):
    """Parity with the published weights is lost where the mean is large against the spread."""
    x = random(2, 3, 5, 24, shift=shift)
    norm = LayerNorm(24, epsilon=epsilon)
    norm.scale[...] = random(24, seed=1)
    norm.bias[...] = random(24, seed=2)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + epsilon)
    expected = expected * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(norm(x), expected, rtol=tolerance, atol=tolerance)


def test_layer_norm_epsilon_is_used():
    """The epsilon of a Hugging Face file would be read and then ignored."""
    x = jnp.asarray([[1e-3, -1e-3]])
    np.testing.assert_allclose(LayerNorm(2, epsilon=1e-6)(x), [[0.5**0.5, -(0.5**0.5)]], rtol=1e-5)
    np.testing.assert_allclose(LayerNorm(2, epsilon=1e-12)(x), [[1, -1]], rtol=1e-5)


def test_layer_norm_of_bfloat16_computes_in_float32_and_returns_bfloat16():
    """Means of thousands of channels in bfloat16 would be off by percents."""
    x = jnp.asarray(random(4, 512, shift=3.0), jnp.bfloat16)
    y = LayerNorm(512)(x)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-5)  # one rounding


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_layer_norm_gradients_equal_float64(dtype):
    """Its derivative is written by hand: a slip trains another network, and the loss still falls."""
    x, weights = random(3, 5, 24, shift=1.0), random(3, 5, 24, seed=1)
    x = jnp.asarray(x, dtype)
    norm = LayerNorm(24)
    norm.scale[...] = scale = random(24, seed=2)
    gradients, x_gradient = jax.grad(lambda norm, x: (norm(x) * jnp.asarray(weights, dtype)).sum(), (0, 1))(norm, x)
    wide, weights = np.asarray(x, np.float64), np.asarray(jnp.asarray(weights, dtype), np.float64)
    inverse = 1 / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    y = (wide - wide.mean(-1, keepdims=True)) * inverse
    error = weights * scale
    expected = inverse * (error - error.mean(-1, keepdims=True) - y * (error * y).mean(-1, keepdims=True))
    tolerance = {'rtol': 1e-5, 'atol': 1e-5} if dtype == 'float32' else {'rtol': 2**-8, 'atol': 1e-5}
    np.testing.assert_allclose(np.asarray(x_gradient, np.float64), expected, **tolerance)
    np.testing.assert_allclose(gradients.scale[...], (weights * y).sum((0, 1)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients.bias[...], weights.sum((0, 1)), rtol=1e-5, atol=1e-5)
    assert x_gradient.dtype == dtype


def grn(channels):
    layer = GRN(channels)
    layer.gamma[...] = random(channels, seed=3)
    layer.beta[...] = random(channels, seed=4)
    return layer


def grn_in_numpy(layer, x):
    x = np.asarray(x, np.float64)
    norms = np.sqrt((x**2).sum((1, 2), keepdims=True))
    weights = norms / (norms.mean(-1, keepdims=True) + 1e-6)
    return np.asarray(layer.gamma[...]) * (x * weights) + np.asarray(layer.beta[...]) + x


def batch_norm(channels):
    norm = BatchNorm(channels)
    norm.scale[...] = random(channels, seed=1)
    norm.bias[...] = random(channels, seed=2)
    return norm


@pytest.mark.parametrize(('shift', 'tolerance'), [(0.0, 1e-5), (1000.0, 2e-3)])
def test_batch_norm_equals_pytorch_s(shift, tolerance):
    """A published head would drift in fine-tuning: the running variance is unbiased, the batch's own is not."""
    norm, mean, variance = batch_norm(24), np.zeros(24), np.ones(24)
    scale, bias = np.asarray(norm.scale[...]), np.asarray(norm.bias[...])
    for step in range(3):
        x = random(2, 3, 5, 24, seed=10 + step, scale=3, shift=shift)
        wide = x.astype(np.float64).reshape(-1, 24)
        expected = (x - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5) * scale + bias
        np.testing.assert_allclose(norm(x, training=True), expected, rtol=tolerance, atol=tolerance)
        mean = 0.9 * mean + 0.1 * wide.mean(0)
        variance = 0.9 * variance + 0.1 * wide.var(0, ddof=1)
        np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(norm.variance[...], variance, rtol=1e-5)
    expected = (x - mean) / np.sqrt(variance + 1e-5) * scale + bias
    np.testing.assert_allclose(norm(x, training=False), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5, atol=1e-6, err_msg='inference moved it')


def test_batch_norm_of_bfloat16_computes_in_float32_and_returns_bfloat16():
    """Running statistics in bfloat16 would stand still: a tenth of a small change is rounded away."""
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
def test_batch_norm_gradients_equal_those_of_the_formula(shape, dtype):
    """Its derivative is written by hand: a slip trains another network, and the loss still falls."""
    x, error = (jnp.asarray(random(*shape, 6, seed=seed, shift=seed), dtype) for seed in (3, 4))
    norm = batch_norm(6)

    def formula(x, scale, bias):
        wide, axes = jnp.asarray(x, jnp.float32), tuple(range(len(shape)))
        y = (wide - wide.mean(axes)) / jnp.sqrt(wide.var(axes) + 1e-5) * scale + bias
        return (y * error).sum()

    def layer(x, scale, bias):
        statistics = get_statistics(norm)
        return (with_parameters(norm, {'scale': scale, 'bias': bias, **statistics})(x, training=True) * error).sum()

    arguments = (x, norm.scale[...], norm.bias[...])
    expected = jax.grad(formula, argnums=(0, 1, 2))(*arguments)
    for ours, other in zip(jax.grad(layer, argnums=(0, 1, 2))(*arguments), expected, strict=True):
        assert ours.dtype == other.dtype
        rounding = 2e-5 if ours.dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(*(np.asarray(g, np.float64) for g in (ours, other)), rtol=rounding, atol=rounding)


def test_batch_norm_over_devices_is_that_of_the_whole_batch():
    """Small batches on many devices: each device's own mean and variance would be noise."""
    x, error = random(16, 3, 6, shift=2), random(16, 3, 6, seed=1)
    norm, mesh = batch_norm(6), Mesh(np.reshape(jax.devices(), (4, 2)), ('data', 'fsdp'))

    def run(weights, x, error):
        def loss(weights, x):
            model = with_parameters(norm, weights)
            y = model(x, training=True)
            return (y * error).sum(), (y, get_statistics(model))

        (_, outputs), (_, gradient) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, x)
        return outputs, gradient

    rows, same = PartitionSpec(('data', 'fsdp')), PartitionSpec()
    spread = jax.shard_map(run, mesh=mesh, in_specs=(same, rows, rows), out_specs=((rows, same), rows), check_vma=False)
    weights = get_weights(norm)
    found, expected = jax.jit(spread)(weights, x, error), run(weights, x, error)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


def test_batch_norm_refuses_one_value_for_each_channel():
    """A pyramid's 1×1 level of one image: the running variance would be not a number for the rest of the run."""
    with pytest.raises(UserError, match='more than one value for each channel: raise batch_size'):
        BatchNorm(6)(jnp.ones((1, 1, 1, 6)), training=True)
    assert BatchNorm(6)(jnp.ones((1, 1, 1, 6)), training=False).shape == (1, 1, 1, 6)


def test_grn_equals_float64():
    """V2 weights would give other logits. Two images of different scale: the norms must not mix images."""
    x = random(2, 4, 3, 8) * np.asarray([1.0, 50.0], np.float32)[:, None, None, None]
    x[..., 2] = 0
    layer = grn(8)
    np.testing.assert_allclose(layer(x), grn_in_numpy(layer, x), rtol=1e-5, atol=1e-5)


def test_new_grn_is_the_identity():
    """γ and β start at zero: a new block must start as the paper's."""
    x = random(2, 3, 3, 4)
    np.testing.assert_array_equal(GRN(4)(x), x)


def test_grn_reduces_bfloat16_in_float32():
    """A sum over a whole map in bfloat16 stops growing after 256 equal terms."""
    x = jnp.ones((1, 64, 64, 4), jnp.bfloat16) * jnp.asarray([1, 2, 3, 4], jnp.bfloat16)
    layer = grn(4)
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), grn_in_numpy(layer, x), rtol=2**-7)


@pytest.mark.parametrize('dead', ['one channel', 'everything'])
def test_grn_gradient_is_finite_at_zero(dead):
    """One masked input or dead unit would turn all weights into NaN."""
    x = random(2, 3, 3, 4)
    if dead == 'one channel':
        x[0, :, :, 1] = 0
    else:
        x[:] = 0
    layer = grn(4)

    def loss(layer, x):
        return (layer(x) * random(*x.shape, seed=5)).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(layer, x)
    assert np.isfinite(value)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()
    assert np.abs(gradients[1]).min() > 0  # the gradient still passes through the dead units


def test_grn_gradient_equals_finite_differences():
    """The guard at zero must not bend the gradient elsewhere."""
    x, layer = random(1, 3, 2, 4), grn(4)
    weights, direction = random(*x.shape, seed=5), random(*x.shape, seed=6)
    gradient = jax.grad(lambda x: (layer(x) * weights).sum())(x)
    step = 1e-6
    ahead, behind = (
        (grn_in_numpy(layer, x.astype(np.float64) + sign * step * direction) * weights).sum() for sign in (1, -1)
    )
    np.testing.assert_allclose((gradient * direction).sum(), (ahead - behind) / (2 * step), rtol=1e-4)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def test_drop_path_drops_whole_images_and_keeps_the_expectation():
    """Kept branches not divided by the keep probability: evaluation would see another scale than training did."""
    x = jnp.asarray(random(4096, 2, 2, 3))
    y = np.asarray(drop_path(x, 0.3, keys(4096)))
    dropped = (y == 0).all((1, 2, 3))
    np.testing.assert_allclose(y[~dropped], np.asarray(x)[~dropped] / 0.7, rtol=1e-6)
    assert abs(dropped.mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 4096)


def test_drop_path_draws_by_each_image_s_key():
    """An image's draw may depend on no other image: the batch's order or size would change the run."""
    x, draws = jnp.ones((64, 1, 1, 1)), keys(64)
    y = drop_path(x, 0.5, draws)
    assert 0 < np.count_nonzero(y) < 64
    np.testing.assert_array_equal(y, drop_path(x, 0.5, draws))
    order = np.random.default_rng(0).permutation(64)
    np.testing.assert_array_equal(y[order], drop_path(x, 0.5, draws[order]))
    np.testing.assert_array_equal(y[:7], drop_path(x[:7], 0.5, draws[:7]))
    assert (y != drop_path(x, 0.5, keys(64, seed=1))).any()


def test_drop_path_draws_in_float32_whatever_the_type():
    """bfloat16 has 256 values in [0, 1): the rate would be rounded, and bfloat16 and float32 runs would differ."""
    x, draws, rate = jnp.ones((8192, 1, 1, 1)), keys(8192), 0.001
    wide, narrow = drop_path(x, rate, draws), drop_path(x.astype(jnp.bfloat16), rate, draws)
    assert narrow.dtype == jnp.bfloat16
    assert 0 < np.count_nonzero(wide == 0) < 30
    np.testing.assert_array_equal(wide == 0, narrow == 0)


def test_drop_path_of_rate_zero_is_the_identity():
    """The first block's rate is 0: it must never lose its branch."""
    x = jnp.asarray(random(256, 1, 1, 2))
    np.testing.assert_array_equal(drop_path(x, 0.0, keys(256)), x)


@pytest.mark.parametrize(('height', 'width', 'size'), [(8, 8, 4), (9, 14, 4), (7, 5, 2), (16, 17, 16), (3, 5, 1)])
def test_patch_conv_equals_the_convolution(height, width, size):
    """A transposed kernel, or a ragged border handled another way: published stems would not fit."""
    conv = PatchConv(3, 6, size, key=jax.random.key(0))
    conv.kernel[...] = random(size, size, 3, 6, seed=1)
    conv.bias[...] = random(6, seed=2)
    x = random(2, height, width, 3)

    def native(conv, x):
        y = jax.lax.conv_general_dilated(
            x, conv.kernel[...], (size, size), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision='highest'
        )
        return y + conv.bias[...]

    @partial(jax.jit, static_argnums=0)
    def value_and_gradients(f, conv, x):
        y, pullback = jax.vjp(f, conv, x)
        return y, pullback(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    ours = value_and_gradients(PatchConv.__call__, conv, x)
    assert ours[0].shape == (2, height // size, width // size, 6)
    theirs = value_and_gradients(native, conv, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), ours, theirs)


def test_linear_equals_numpy_and_computes_in_its_type():
    """A linear layer that ignores its dtype runs at half the accelerator's speed."""
    x, linear = random(5, 7), Linear(7, 3, key=jax.random.key(0))
    linear.bias[...] = random(3, seed=2)
    np.testing.assert_allclose(
        linear(x), x @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...]), rtol=1e-5, atol=1e-5
    )
    assert Linear(7, 3, dtype=jnp.bfloat16, key=jax.random.key(0))(x).dtype == jnp.bfloat16
    assert Linear(7, 3, dtype=jnp.bfloat16, key=jax.random.key(0)).kernel.dtype == jnp.float32


def test_initial_weights_have_std_0_02_untruncated():
    """Cut at two sigma the std is 0.0176: the published recipes start from another point."""
    weights = np.asarray(normal(jax.random.key(0), (500, 400)))
    assert weights.dtype == np.float32
    assert abs(weights.std() - 0.02) < 2e-4
    assert abs(weights.mean()) < 2e-4
    assert np.abs(weights).max() > 0.08
    for layer in (Linear(300, 300, key=jax.random.key(1)), PatchConv(64, 300, 2, key=jax.random.key(1))):
        assert abs(np.asarray(layer.kernel[...]).std() - 0.02) < 3e-4
        assert not np.asarray(layer.bias[...]).any()


@pytest.mark.parametrize(
    'layer',
    [
        partial(Linear, 3, 2),
        partial(PatchConv, 3, 2, 1),
        partial(SameConv, 3, 2, 2, dilation=1),
        lambda dtype, key: Depthwise(3, dilation=1, execution=Execution(dtype), key=key),
    ],
    ids=['linear', 'patch', 'same', 'depthwise'],
)
def test_a_bias_gathers_its_gradient_in_float32(layer):
    """One number gathers from every place of every image: bfloat16 has eight bits for it."""
    layer = layer(dtype=jnp.bfloat16, key=jax.random.key(0))
    images = jnp.ones((1, 1, 4099, 3), jnp.bfloat16)  # so many places that bfloat16 cannot count them
    gradient = jax.jit(jax.grad(lambda layer: layer(images).astype(jnp.float32).sum()))(layer)
    np.testing.assert_array_equal(gradient.bias[...], 4099.0)


@pytest.mark.parametrize(('platform', 'barriers'), [('cpu', 1), ('tpu', 0), ('cuda', 0)])
def test_a_product_stands_apart_from_what_comes_before_it_on_cpu_alone(platform, barriers):
    """Merged with the norm, evaluation on CPU is a fifth slower; accelerators are fast because they merge the two."""
    x, kernel = jax.ShapeDtypeStruct((6, 4), jnp.float32), jax.ShapeDtypeStruct((4, 8), jnp.float32)
    program = jax.jit(matmul).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert program.count('optimization_barrier') == barriers


@pytest.mark.parametrize(
    ('shape', 'out'),
    [
        ((2, 16, 16, 8), 32),  # in halves
        ((2, 16, 16, 32), 8),  # in halves, the other way round
        ((3, 15, 15, 8), 32),  # places that do not halve
        ((2, 3, 3, 8), 32),  # few places
        ((4, 0, 3, 8), 32),
    ],
)
def test_the_gradients_of_a_product_equal_numpy(shape, out):
    """On CPU the gradient of a kernel is computed by halves of the places: a lost one is a wrong step."""
    x, kernel, error = random(*shape), random(shape[-1], out, seed=1), random(*shape[:-1], out, seed=2)
    _, pullback = jax.vjp(matmul, jnp.asarray(x), jnp.asarray(kernel))
    x_gradient, kernel_gradient = jax.jit(pullback)(jnp.asarray(error))
    places = x.reshape(-1, shape[-1]).astype(np.float64), error.reshape(-1, out).astype(np.float64)
    np.testing.assert_allclose(kernel_gradient, places[0].T @ places[1], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(x_gradient, error @ kernel.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('sides', [(), (2, 2)], ids=['linear', 'patches'])
def test_a_kernel_in_pieces_gives_the_product_and_the_gradients_of_the_whole(sides, dtype):
    """Pieces that were put together in another order would train a network that no single device has."""
    mesh = Mesh(np.asarray(jax.devices()[:4]), ('fsdp',))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, 8 * math.prod(sides))), dtype)
    kernel = jnp.asarray(rng.standard_normal((*sides, 8, 6)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((8, 6)), jnp.float32)

    def value_and_gradients(x, kernel, weights):
        y, pullback = jax.vjp(matmul, x, kernel)
        return (y, *pullback(weights.astype(y.dtype)))

    rows, pieces = PartitionSpec('fsdp'), PartitionSpec(*[None] * len(sides), 'fsdp', None)
    on_four = jax.shard_map(
        value_and_gradients, mesh=mesh, in_specs=(rows, pieces, rows), out_specs=(rows, rows, pieces), check_vma=False
    )
    for cut, whole in zip(jax.jit(on_four)(x, kernel, weights), value_and_gradients(x, kernel, weights), strict=True):
        assert cut.dtype == whole.dtype
        np.testing.assert_allclose(
            np.asarray(cut, np.float32),
            np.asarray(whole, np.float32),
            rtol=1e-5 if cut.dtype == 'float32' else 2**-7,
            atol=1e-5,
        )
