"""The layers against float64 numpy, including extreme values and shapes."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from convnext_jax.models import Execution, layers
from convnext_jax.models.layers import (
    GRN,
    LayerNorm,
    Linear,
    PatchConv,
    SameConv,
    conv_layout,
    drop_path,
    matmul,
    normal,
    patch_matmul,
)
from convnext_jax.models.trunk import Depthwise


def random(*shape, seed=0, scale=1.0, shift=0.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale + shift).astype(np.float32)


@pytest.mark.parametrize('epsilon', [1e-6, 1e-12])
@pytest.mark.parametrize(
    ('shift', 'tolerance'),
    [
        (0.0, 1e-5),
        # The formula E[x²] − E[x]² would be wrong by more than 1 here. float32 represents the input to 3e-5.
        (1000.0, 2e-3),
    ],
)
def test_layer_norm_equals_float64(epsilon, shift, tolerance):
    """Published weights would give other logits where the mean is much larger than the standard deviation."""
    x = random(2, 3, 5, 24, shift=shift)
    norm = LayerNorm(24, epsilon=epsilon)
    norm.scale[...] = random(24, seed=1)
    norm.bias[...] = random(24, seed=2)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + epsilon)
    expected = expected * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=tolerance, atol=tolerance)


def test_layer_norm_epsilon_is_used():
    """The epsilon of a Hugging Face config.json would be read and then ignored."""
    x = jnp.asarray([[1e-3, -1e-3]])
    np.testing.assert_allclose(LayerNorm(2, epsilon=1e-6)(x), [[0.5**0.5, -(0.5**0.5)]], rtol=1e-5)
    np.testing.assert_allclose(LayerNorm(2, epsilon=1e-12)(x), [[1, -1]], rtol=1e-5)


@pytest.mark.parametrize('shift', [3.0, 60.0])
def test_layer_norm_of_bfloat16_computes_in_float32_and_returns_bfloat16(shift):
    """Means over thousands of channels in bfloat16 would have errors of several percent."""
    x = jnp.asarray(random(4, 512, shift=shift), jnp.bfloat16)
    y = LayerNorm(512)(x)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-5)  # one rounding


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_layer_norm_gradients_equal_float64(dtype):
    """A mistake in the hand-written derivative would give wrong gradients with which the loss still falls."""
    x, cotangent = random(3, 5, 24, shift=1.0), random(3, 5, 24, seed=1)
    x = jnp.asarray(x, dtype)
    norm = LayerNorm(24)
    norm.scale[...] = scale = random(24, seed=2)
    cotangent = jnp.asarray(cotangent, dtype)
    gradients, x_gradient = jax.grad(lambda norm, x: (norm(x) * cotangent).sum(), (0, 1))(norm, x)
    wide, cotangent = np.asarray(x, np.float64), np.asarray(cotangent, np.float64)
    inverse = 1 / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    y = (wide - wide.mean(-1, keepdims=True)) * inverse
    scaled = cotangent * scale
    expected = inverse * (scaled - scaled.mean(-1, keepdims=True) - y * (scaled * y).mean(-1, keepdims=True))
    tolerance = {'rtol': 1e-5, 'atol': 1e-5} if dtype == 'float32' else {'rtol': 2**-8, 'atol': 1e-5}
    np.testing.assert_allclose(np.asarray(x_gradient, np.float64), expected, **tolerance)
    np.testing.assert_allclose(gradients.scale[...], (cotangent * y).sum((0, 1)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients.bias[...], cotangent.sum((0, 1)), rtol=1e-5, atol=1e-5)
    assert x_gradient.dtype == dtype


def grn(channels):
    layer = GRN(channels)
    layer.gamma[...] = random(channels, seed=3)
    layer.beta[...] = random(channels, seed=4)
    return layer


def grn_in_numpy(layer, x):
    x = np.asarray(x, np.float64)
    norms = np.sqrt((x**2).sum((1, 2), keepdims=True))
    relative = norms / (norms.mean(-1, keepdims=True) + 1e-6)
    return np.asarray(layer.gamma[...]) * (x * relative) + np.asarray(layer.beta[...]) + x


def test_grn_equals_float64():
    """V2 weights would give other logits. The images have different scales: norms must not be shared by images."""
    x = random(2, 4, 3, 8) * np.asarray([1.0, 50.0], np.float32)[:, None, None, None]
    x[..., 2] = 0
    layer = grn(8)
    np.testing.assert_allclose(layer(jnp.asarray(x)), grn_in_numpy(layer, x), rtol=1e-5, atol=1e-5)


def test_new_grn_is_the_identity():
    """Gamma and beta start at zero, as in the paper: other values would change the start of training."""
    x = jnp.asarray(random(2, 3, 3, 4))
    np.testing.assert_array_equal(GRN(4)(x), x)


def test_grn_reduces_bfloat16_in_float32():
    """A sum over a feature map in bfloat16 stops growing after 256 equal terms."""
    x = jnp.ones((1, 64, 64, 4), jnp.bfloat16) * jnp.asarray([1, 2, 3, 4], jnp.bfloat16)
    layer = grn(4)
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), grn_in_numpy(layer, x), rtol=2**-7)


@pytest.mark.parametrize('zeros', ['one channel', 'everything'])
def test_grn_gradient_is_finite_at_zero(zeros):
    """A single channel of zeros, from a masked input or a dead unit, would turn all weights into NaN."""
    x = random(2, 3, 3, 4)
    if zeros == 'one channel':
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
    assert np.abs(gradients[1]).min() > 0  # the gradient also reaches the zeros


def test_grn_gradient_equals_finite_differences():
    """The special case at zero must not change the gradient at other values."""
    x, layer = random(1, 3, 2, 4), grn(4)
    cotangent, direction = random(*x.shape, seed=5), random(*x.shape, seed=6)
    gradient = jax.grad(lambda x: (layer(x) * cotangent).sum())(x)
    step = 1e-6
    ahead, behind = (
        (grn_in_numpy(layer, x.astype(np.float64) + sign * step * direction) * cotangent).sum() for sign in (1, -1)
    )
    np.testing.assert_allclose((gradient * direction).sum(), (ahead - behind) / (2 * step), rtol=1e-4)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def test_drop_path_drops_whole_images_and_keeps_the_expectation():
    """Without division by the keep probability, branches would have another scale in evaluation than in training."""
    x = jnp.asarray(random(4096, 2, 2, 3))
    y = np.asarray(drop_path(x, 0.3, keys(4096)))
    dropped = (y == 0).all((1, 2, 3))
    np.testing.assert_allclose(y[~dropped], np.asarray(x)[~dropped] / 0.7, rtol=1e-6)
    assert abs(dropped.mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 4096)


def test_drop_path_draws_from_the_key_of_each_image():
    """If a draw depended on other images, the order or size of the batch would change the run."""
    x, draws = jnp.ones((64, 1, 1, 1)), keys(64)
    y = drop_path(x, 0.5, draws)
    assert 0 < np.count_nonzero(y) < 64
    np.testing.assert_array_equal(y, drop_path(x, 0.5, draws))
    order = np.random.default_rng(0).permutation(64)
    np.testing.assert_array_equal(y[order], drop_path(x, 0.5, draws[order]))
    np.testing.assert_array_equal(y[:7], drop_path(x[:7], 0.5, draws[:7]))
    assert (y != drop_path(x, 0.5, keys(64, seed=1))).any()


def test_drop_path_draws_in_float32_for_every_dtype():
    """A uniform bfloat16 has 256 values: the rate would be rounded, and other branches dropped than in float32."""
    x, draws, rate = jnp.ones((8192, 1, 1, 1)), keys(8192), 0.001
    wide, narrow = drop_path(x, rate, draws), drop_path(x.astype(jnp.bfloat16), rate, draws)
    assert narrow.dtype == jnp.bfloat16
    assert 0 < np.count_nonzero(wide == 0) < 30
    np.testing.assert_array_equal(wide == 0, narrow == 0)


def test_drop_path_of_rate_zero_is_the_identity():
    """The first block has rate 0: its branch must never be dropped."""
    x = jnp.asarray(random(256, 1, 1, 2))
    np.testing.assert_array_equal(drop_path(x, 0.0, keys(256)), x)


@pytest.mark.parametrize(('height', 'width', 'size'), [(8, 8, 4), (9, 14, 4), (7, 5, 2), (16, 17, 16), (3, 5, 1)])
def test_patch_conv_equals_the_convolution(height, width, size):
    """A transposed kernel or another treatment of incomplete patches would change the result of published stems."""
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


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-5), ('bfloat16', 2**-7)])
def test_patches_on_tpu_equal_those_on_other_platforms(dtype, tolerance):
    """TPUs compute the downsampling as a convolution: a transposed kernel would give another network there."""
    x, kernel = jnp.asarray(random(2, 6, 8, 5), dtype), jnp.asarray(random(20, 7, seed=1), dtype)
    cotangent = jnp.asarray(random(2, 3, 4, 7, seed=2), dtype)
    np.testing.assert_allclose(
        *(np.asarray(f(x, kernel, size=2), np.float32) for f in (layers._patch_conv, layers._patch_product)),
        rtol=tolerance,
        atol=tolerance,
    )
    arguments = {'size': 2, 'dtype': jnp.float32}
    ours = layers._patch_conv_gradients(x, kernel, cotangent, **arguments)
    theirs = layers._patch_product_gradients(x, kernel, cotangent, **arguments, sum_of_outer=layers._sum_of_outer)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(*(np.asarray(c, np.float32) for c in (a, b)), rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(('platform', 'channels', 'count'), [('tpu', 16, 1), ('tpu', 3, 0), ('cuda', 16, 0)])
def test_only_tpus_compute_patches_as_a_convolution(platform, channels, count):
    """The compiler for TPUs transposes patches; for 3 channels, its convolution is slower than the transpose."""
    x, conv = jax.ShapeDtypeStruct((2, 8, 8, channels), jnp.float32), PatchConv(channels, 6, 2, key=jax.random.key(0))
    program = jax.jit(conv.__call__).trace(x).lower(lowering_platforms=(platform,)).as_text()
    assert program.count('stablehlo.convolution') == count


@pytest.mark.parametrize(('platform', 'n', 'count'), [('tpu', 8, 2), ('tpu', 2, 0), ('cpu', 8, 0), ('cuda', 8, 0)])
def test_the_layout_of_convolutions_is_fixed_on_tpu_only(platform, n, count):
    """Without it a training step on TPU takes several percent more cycles; elsewhere it would cost transposes."""
    x = jax.ShapeDtypeStruct((n, 3, 4, 5), jnp.float32)
    step = jax.jit(jax.value_and_grad(lambda x: (conv_layout(x) ** 2).sum()))
    assert step.trace(x).lower(lowering_platforms=(platform,)).as_text().count('LayoutConstraint') == count


def test_linear_equals_numpy_and_computes_in_its_dtype():
    """A linear layer that ignored its dtype would run at half the speed of the accelerator."""
    x, linear = jnp.asarray(random(5, 7)), Linear(7, 3, key=jax.random.key(0))
    linear.bias[...] = random(3, seed=2)
    np.testing.assert_allclose(
        linear(x), x @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...]), rtol=1e-5, atol=1e-5
    )
    assert Linear(7, 3, dtype=jnp.bfloat16, key=jax.random.key(0))(x).dtype == jnp.bfloat16
    assert Linear(7, 3, dtype=jnp.bfloat16, key=jax.random.key(0)).kernel.dtype == jnp.float32


def test_initial_weights_have_std_0_02_untruncated():
    """Truncation at two standard deviations would reduce the standard deviation to 0.0176."""
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
def test_the_gradient_of_a_bias_is_summed_in_float32(layer):
    """A bfloat16 sum over all positions of all images would stop growing after a few hundred terms."""
    layer = layer(dtype=jnp.bfloat16, key=jax.random.key(0))
    images = jnp.ones((1, 1, 4099, 3), jnp.bfloat16)  # bfloat16 cannot represent 4099
    gradient = jax.jit(jax.grad(lambda layer: layer(images).astype(jnp.float32).sum()))(layer)
    np.testing.assert_array_equal(gradient.bias[...], 4099.0)


@pytest.mark.parametrize(('platform', 'barriers'), [('cpu', 1), ('tpu', 0), ('cuda', 0)])
def test_a_product_has_a_fusion_barrier_on_cpu_only(platform, barriers):
    """Fusion with the norm makes evaluation on CPU a fifth slower; accelerators need it to be fast."""
    x, kernel = jax.ShapeDtypeStruct((6, 4), jnp.float32), jax.ShapeDtypeStruct((4, 8), jnp.float32)
    program = jax.jit(matmul).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert program.count('optimization_barrier') == barriers


@pytest.mark.parametrize(
    ('shape', 'out'),
    [
        ((2, 16, 16, 8), 32),  # in two halves
        ((2, 16, 16, 32), 8),  # in two halves with swapped operands
        ((3, 15, 15, 8), 32),  # an odd number of positions
        ((2, 3, 3, 8), 32),  # few positions
        ((4, 0, 3, 8), 32),
    ],
)
def test_the_gradients_of_a_product_equal_numpy(shape, out):
    """On CPU the gradient of a kernel is computed in two halves of the positions: a missing one would go unnoticed."""
    x, kernel, cotangent = random(*shape), random(shape[-1], out, seed=1), random(*shape[:-1], out, seed=2)
    _, pullback = jax.vjp(matmul, jnp.asarray(x), jnp.asarray(kernel))
    x_gradient, kernel_gradient = jax.jit(pullback)(jnp.asarray(cotangent))
    left, right = x.reshape(-1, shape[-1]).astype(np.float64), cotangent.reshape(-1, out).astype(np.float64)
    np.testing.assert_allclose(kernel_gradient, left.T @ right, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(x_gradient, cotangent @ kernel.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
    ('product', 'shape', 'sides'),
    [(matmul, (8, 8), ()), (patch_matmul, (8, 2, 4, 8), (2, 2))],
    ids=['linear', 'patches'],
)
def test_a_sharded_kernel_gives_the_product_and_gradients_of_the_unsharded_one(product, shape, sides, dtype):
    """Shards gathered in another order would make training depend on the number of devices."""
    mesh = Mesh(np.asarray(jax.devices()[:4]), ('fsdp',))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(shape), dtype)
    kernel = jnp.asarray(rng.standard_normal((*sides, 8, 6)), jnp.float32)
    cotangent = jnp.asarray(rng.standard_normal(jax.eval_shape(product, x, kernel).shape), jnp.float32)

    def value_and_gradients(x, kernel, cotangent):
        y, pullback = jax.vjp(product, x, kernel)
        return (y, *pullback(cotangent.astype(y.dtype)))

    batch, shard = PartitionSpec('fsdp'), PartitionSpec(*[None] * len(sides), 'fsdp', None)
    on_four = jax.shard_map(
        value_and_gradients, mesh=mesh, in_specs=(batch, shard, batch), out_specs=(batch, batch, shard), check_vma=False
    )
    sharded, unsharded = jax.jit(on_four)(x, kernel, cotangent), value_and_gradients(x, kernel, cotangent)
    for found, expected in zip(sharded, unsharded, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(
            np.asarray(found, np.float32),
            np.asarray(expected, np.float32),
            rtol=1e-5 if found.dtype == 'float32' else 2**-7,
            atol=1e-5,
        )
