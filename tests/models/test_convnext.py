"""The classifier: shapes, values, initial weights, and its errors for bad arguments."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import ISOTROPIC, V1, V2, build, call, some_images

from convnext_jax.errors import UserError
from convnext_jax.models import VARIANTS, Variant, create_model, get_parameters, get_variant


@pytest.fixture(scope='module')
def v1():
    return build(V1)


@pytest.fixture(scope='module')
def images():
    return some_images()


@pytest.mark.parametrize(
    ('name', 'height', 'width', 'expected'),
    [
        (
            'convnext_atto',
            64,
            96,
            {
                'stem': (16, 24, 40),
                'stage1': (16, 24, 40),
                'stage2': (8, 12, 80),
                'stage3': (4, 6, 160),
                'stage4': (2, 3, 320),
            },
        ),
        (  # sides that are not multiples of 32: the remaining pixels are ignored, as in the original
            'convnextv2_atto',
            47,
            33,
            {
                'stem': (11, 8, 40),
                'stage1': (11, 8, 40),
                'stage2': (5, 4, 80),
                'stage3': (2, 2, 160),
                'stage4': (1, 1, 320),
            },
        ),
        ('convnext_isotropic_small', 224, 64, {'stem': (14, 4, 384), 'stage1': (14, 4, 384)}),
    ],
)
def test_feature_names_and_shapes(name, height, width, expected):
    """Detection and segmentation use feature maps by name, at strides 4 to 32."""
    model = jax.eval_shape(partial(create_model, name), key=jax.random.key(0))
    images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    maps = jax.eval_shape(lambda model, images: model.features(images), model, images)
    assert {name: leaf.shape for name, leaf in maps.items()} == {name: (2, *shape) for name, shape in expected.items()}


def test_features_are_in_the_order_of_computation(v1, images):
    """Callers that take the last feature map would get another one."""
    assert list(v1.features(images[:1])) == ['stem', 'stage1', 'stage2']


@pytest.mark.parametrize(('name', 'num_classes'), [('convnext_atto', 7), ('convnext_isotropic_small', 1000)])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_logits_are_float32_of_num_classes(name, num_classes, dtype):
    """A loss over bfloat16 logits would not see small differences between classes."""
    build = partial(create_model, name, num_classes=num_classes, dtype=dtype)
    model = jax.eval_shape(build, key=jax.random.key(0))
    logits = jax.eval_shape(call, model, jax.ShapeDtypeStruct((3, 64, 64, 3), jnp.float32))
    assert (logits.shape, logits.dtype) == ((3, num_classes), jnp.float32)


def layer_norm(x, scale, bias, epsilon=1e-6):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale + bias


def forward_in_numpy(variant, parameters, images, last_epsilon):
    """The architecture of both papers, written independently in float64 numpy."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in parameters.items()}
    erf = np.vectorize(math.erf)

    def patches(x, name):
        kernel = p[f'{name}.kernel']
        size, n, (rows, columns) = kernel.shape[0], len(x), (side // kernel.shape[0] for side in x.shape[1:3])
        x = x.reshape(n, rows, size, columns, size, -1)
        return np.einsum('nracbi,abio->nrco', x, kernel) + p[f'{name}.bias']

    def norm(x, name, epsilon=1e-6):
        return layer_norm(x, p[f'{name}.scale'], p[f'{name}.bias'], epsilon)

    def block(x, name, i):
        kernel, bias = p[f'{name}.depthwise.kernel'][i], p[f'{name}.depthwise.bias'][i]
        padded = np.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))
        y = bias + sum(
            padded[:, r : r + x.shape[1], c : c + x.shape[2]] * kernel[r, c] for r in range(7) for c in range(7)
        )
        y = layer_norm(y, p[f'{name}.norm.scale'][i], p[f'{name}.norm.bias'][i])
        y = y @ p[f'{name}.pointwise1.kernel'][i] + p[f'{name}.pointwise1.bias'][i]
        y = y * (1 + erf(y / 2**0.5)) / 2
        if variant.grn:
            norms = np.sqrt((y**2).sum((1, 2), keepdims=True))
            relative = norms / (norms.mean(-1, keepdims=True) + 1e-6)
            y = p[f'{name}.grn.gamma'][i] * y * relative + p[f'{name}.grn.beta'][i] + y
        y = y @ p[f'{name}.pointwise2.kernel'][i] + p[f'{name}.pointwise2.bias'][i]
        return x + (y * p[f'{name}.layer_scale'][i] if variant.layer_scale_init else y)

    x = patches(np.asarray(images, np.float64), 'stem.conv')
    x = norm(x, 'stem.norm') if variant.stem_norm else x
    for stage, depth in enumerate(variant.depths):
        if stage:
            x = patches(norm(x, f'stages.{stage}.downsample.norm'), f'stages.{stage}.downsample.conv')
        for i in range(depth):
            x = block(x, f'stages.{stage}.blocks', i)
    return norm(x.mean((1, 2)), 'norm', last_epsilon) @ p['head.kernel'] + p['head.bias']


@pytest.mark.parametrize(
    ('variant', 'epsilon'), [(V1, 0.5), (V2, 1e-6), (ISOTROPIC, 1e-12)], ids=['v1', 'v2', 'isotropic']
)
def test_logits_equal_a_plain_numpy_model(variant, epsilon, images):
    """An omitted, repeated or misplaced layer would reduce the accuracy of published weights."""
    model = build(variant, layer_norm_eps=epsilon)
    expected = forward_in_numpy(variant, get_parameters(model), images, epsilon)
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(call(model, images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('variant', [V1, V2], ids=['v1', 'v2'])
def test_tokens_are_the_normed_average_and_the_normed_map(variant, images):
    """Features of patches would not be comparable to those of the whole image."""
    model = build(variant, num_classes=0)
    tokens, outputs, last = jax.jit(lambda model, x: (model.tokens(x), model(x), model.features(x)['stage2']))(
        model, images
    )
    norm = {name: np.asarray(x) for name, x in get_parameters(model).items() if name.startswith('norm.')}
    expected = layer_norm(np.asarray(last, np.float64), norm['norm.scale'], norm['norm.bias'])
    np.testing.assert_allclose(tokens.patches, expected, rtol=1e-4, atol=1e-4)
    expected = layer_norm(np.asarray(last, np.float64).mean((1, 2)), norm['norm.scale'], norm['norm.bias'])
    np.testing.assert_allclose(tokens.pooled, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(outputs, tokens.pooled)
    assert (model.head, model.num_classes) == (None, 0)


def shapes(name, **options):
    return {
        name: leaf.shape
        for name, leaf in get_parameters(
            jax.eval_shape(partial(create_model, name, **options), key=jax.random.key(0))
        ).items()
    }


@pytest.fixture(scope='module')
def initial():
    """The parameters of a newly initialised model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, 'two_stages', Variant((3, 2), (32, 64)))
        build = partial(create_model, 'two_stages', num_classes=100, head_init_scale=0.1, layer_scale_init=0.25)
        model = jax.jit(lambda key: build(key=key))(jax.random.key(0))
    return {name: np.asarray(leaf) for name, leaf in get_parameters(model).items()}


def test_head_init_scale(initial):
    """Without the small initial head, the first steps of fine-tuning would destroy the pretrained weights."""
    assert initial['head.kernel'].std() == pytest.approx(0.002, rel=0.05)
    assert not initial['head.bias'].any()


def test_every_block_has_independent_initial_weights_of_std_0_02(initial):
    """Blocks or stages that share a key would have equal initial weights."""
    assert initial['stages.0.blocks.pointwise1.kernel'].shape == (3, 32, 128)
    kernels = {name: leaf for name, leaf in initial.items() if name.endswith('kernel') and name != 'head.kernel'}
    for name, kernel in kernels.items():
        assert kernel.std() == pytest.approx(0.02, rel=0.06), name
    starts = [kernel[i].ravel()[:100] for name, kernel in kernels.items() if 'blocks' in name for i in range(2)]
    assert np.abs(np.corrcoef(starts) - np.eye(len(starts))).max() < 0.6
    for name in initial.keys() - kernels.keys() - {'head.kernel'}:
        start = 0.25 if name.endswith('layer_scale') else 1 if name.endswith('scale') else 0
        assert (initial[name] == start).all(), name


def test_layer_scale_init(initial):
    """The option would have no effect: 0 removes the layer scale, another value adds one to any architecture."""
    assert initial['stages.0.blocks.layer_scale'].shape == (3, 32)
    assert not [name for name in shapes('convnext_atto', layer_scale_init=0) if 'layer_scale' in name]
    assert shapes('convnextv2_atto', layer_scale_init=0.1)['stages.2.blocks.layer_scale'] == (6, 160)


def test_patch_size_and_in_channels():
    """Small or greyscale images need another stem; all other parameters must keep their shapes."""
    plain, changed = shapes('convnextv2_atto'), shapes('convnextv2_atto', patch_size=2, in_channels=1)
    assert changed.pop('stem.conv.kernel') == (2, 2, 1, 40)
    assert plain.pop('stem.conv.kernel') == (4, 4, 3, 40)
    assert changed == plain
    model = jax.eval_shape(partial(create_model, 'convnextv2_atto', patch_size=2, in_channels=1), key=jax.random.key(0))
    maps = jax.eval_shape(lambda model, x: model.features(x), model, jax.ShapeDtypeStruct((1, 28, 28, 1), 'float32'))
    assert {name: leaf.shape[1] for name, leaf in maps.items()} == {
        'stem': 14,
        'stage1': 14,
        'stage2': 7,
        'stage3': 3,
        'stage4': 1,
    }


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'name': 'convnext_atom'}, "there is no model 'convnext_atom': did you mean .*convnext_atto"),
        ({'drop_path_rate': 1.0}, 'drop_path_rate must be in \\[0, 1\\), not 1.0'),
        ({'drop_path_rate': -0.1}, 'drop_path_rate must be in \\[0, 1\\), not -0.1'),
        ({'drop_path_rate': float('nan')}, 'drop_path_rate must be in \\[0, 1\\), not nan'),
        ({'num_classes': -1}, 'num_classes must be at least 0, not -1'),
        ({'in_channels': 0}, 'in_channels must be at least 1, not 0'),
        ({'patch_size': 0}, 'patch_size must be at least 1, not 0'),
        ({'dtype': 'int8'}, "dtype must be one of float32, bfloat16, float16, not 'int8'"),
        ({'dtype': 'float64'}, "dtype must be one of float32, bfloat16, float16, not 'float64'"),
        ({'key': None}, 'key must be a key such as jax.random.key.0., not NoneType'),
    ],
)
def test_bad_arguments_of_create_model(no_shape_checks, options, message):
    """A bad value would cause an obscure error inside JAX, not one line that names it."""
    with pytest.raises(UserError, match=message):
        create_model(**({'name': 'convnext_atto', 'key': jax.random.key(0)} | options))


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        ((16, 16, 3), r'images must have shape \(N, H, W, 3\), not \(16, 16, 3\)'),
        ((2, 16, 16, 1), r'images must have shape \(N, H, W, 3\), not \(2, 16, 16, 1\)'),
        ((2, 3, 16, 16), r'images must have shape \(N, H, W, 3\), not \(2, 3, 16, 16\)'),
        ((2, 7, 16, 3), 'images of 7×16 pixels are smaller than the total stride of 8: enlarge them, or set a smaller'),
        ((2, 16, 7, 3), 'images of 16×7 pixels are smaller than the total stride of 8'),
    ],
)
def test_bad_images(no_shape_checks, v1, shape, message):
    """Images with channels first, or too small ones, whose last feature map is empty, would give NaN."""
    for use in (v1, v1.features):
        with pytest.raises(UserError, match=message):
            use(jnp.zeros(shape))


def test_the_last_norm_may_come_before_the_pooling(images):
    """timm's convnext_tiny_hnf would give other logits."""
    model = build(dataclasses.replace(V1, head_norm_first=True))
    last = model.features(images)['stage2']
    expected = model.head(model.norm(last).mean((1, 2)))
    np.testing.assert_allclose(call(model, images), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - model.head(model.norm(last.mean((1, 2))))).max() > 0.1


def test_a_hidden_layer_before_the_head(images):
    """timm's convnext_large_mlp would give other logits."""
    model = build(dataclasses.replace(V1, head_hidden=24))
    x = model.norm(model.features(images)['stage2'].mean((1, 2)))
    hidden = jax.nn.gelu(x @ model.hidden.kernel[...] + model.hidden.bias[...], approximate=False)
    np.testing.assert_allclose(model.head_input(images), hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(call(model, images), model.head(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ('name', 'remat'), [('convnext_zepto_rms_ols', 'dots'), ('convnext_atto_rms', 'full'), ('test_convnext3', 'none')]
)
def test_models_of_timm_train_in_bfloat16(name, remat):
    """Their gradients would be wrong or missing. bfloat16 and remat must only round differently."""
    variant, images = get_variant(name), some_images()[:2]
    kernels = variant.kernel_size if isinstance(variant.kernel_size, int) else variant.kernel_size[-2:]
    variant = dataclasses.replace(variant, depths=(2, 1), widths=(8, 16), kernel_size=kernels)

    def gradient(**options):
        model = build(variant, **options)
        return get_parameters(jax.jit(jax.grad(lambda model: jnp.square(model(images)).mean()))(model))

    exact, ours = gradient(), gradient(dtype='bfloat16', remat=remat)
    for parameter, x in exact.items():
        assert np.linalg.norm(ours[parameter] - x) < 0.1 * np.linalg.norm(x), parameter
