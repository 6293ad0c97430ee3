"""The whole network: shapes, drop path, types, sharding, how it is compiled, and what it says to bad arguments."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convnext_jax.errors import UserError
from convnext_jax.models import VARIANTS, ConvNeXt, Variant, create_model, get_parameters, with_parameters

DEPTHS = (3, 2)
V1 = Variant(DEPTHS, (8, 16), layer_scale_init=0.5)
V2 = Variant(DEPTHS, (8, 16), grn=True, layer_scale_init=0)
ISOTROPIC = Variant((2,), (8,), patch_size=8, layer_scale_init=0, stem_norm=False)


def build(variant, **options):
    """A small model; every parameter is random, so that none can be left out unseen."""
    defaults = {
        'num_classes': 5,
        'in_channels': 3,
        'drop_path_rate': 0.5,
        'head_init_scale': 1.0,
        'layer_norm_eps': 1e-6,
        'remat': 'none',
        'dtype': jnp.float32,
    }
    model = jax.eval_shape(lambda key: ConvNeXt(variant, key=key, **(defaults | options)), jax.random.key(0))
    rng = np.random.default_rng(0)
    parameters = {
        name: jnp.asarray(name.endswith('scale') + 0.3 * rng.standard_normal(leaf.shape), jnp.float32)
        for name, leaf in get_parameters(model).items()
    }
    return with_parameters(model, parameters)


call = jax.jit(lambda model, images, key=None: model(images, key=key))


@pytest.fixture(scope='module')
def v1():
    return build(V1)


@pytest.fixture(scope='module')
def v2():
    return build(V2)


@pytest.fixture(scope='module')
def images():
    return jnp.asarray(np.random.default_rng(1).standard_normal((16, 16, 16, 3)), jnp.float32)


@pytest.fixture(scope='module')
def keys():
    return jax.random.split(jax.random.key(7), 16)


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
        (  # no multiples of 32: what is left over is left out, as in the original
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
    """Detection and segmentation read maps by name, at strides 4 to 32."""
    model = jax.eval_shape(partial(create_model, name), key=jax.random.key(0))
    images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    maps = jax.eval_shape(lambda model, images: model.features(images), model, images)
    assert {name: leaf.shape for name, leaf in maps.items()} == {name: (2, *shape) for name, shape in expected.items()}


def test_features_come_in_the_order_of_the_data(v1, images):
    assert list(v1.features(images[:1])) == ['stem', 'stage1', 'stage2']


@pytest.mark.parametrize(('name', 'num_classes'), [('convnext_atto', 7), ('convnext_isotropic_small', 1000)])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_logits_are_float32_of_num_classes(name, num_classes, dtype):
    """A loss over bfloat16 logits loses the difference between near classes."""
    build = partial(create_model, name, num_classes=num_classes, dtype=dtype)
    model = jax.eval_shape(build, key=jax.random.key(0))
    logits = jax.eval_shape(call, model, jax.ShapeDtypeStruct((3, 64, 64, 3), jnp.float32))
    assert (logits.shape, logits.dtype) == ((3, num_classes), jnp.float32)


def layer_norm(x, scale, bias, epsilon=1e-6):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale + bias


def forward_in_numpy(variant, parameters, images, last_epsilon):
    """The architecture as ../shared/reference/variants.md says it, in plain float64 numpy."""
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
            weights = norms / (norms.mean(-1, keepdims=True) + 1e-6)
            y = p[f'{name}.grn.gamma'][i] * y * weights + p[f'{name}.grn.beta'][i] + y
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
    """A part left out, doubled or moved, or an epsilon in the wrong norm: published weights lose their accuracy."""
    model = build(variant, layer_norm_eps=epsilon)
    expected = forward_in_numpy(variant, get_parameters(model), images, epsilon)
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(call(model, images), expected, rtol=1e-4, atol=1e-4)


def test_without_a_key_or_a_rate_nothing_is_dropped(v1, images):
    """Evaluation must not depend on chance, nor on the drop path rate."""
    logits = call(v1, images)
    np.testing.assert_array_equal(logits, call(v1, images))
    assert np.abs(call(v1, images, jax.random.key(0)) - logits).max() > 0.01
    without = call(build(V1, drop_path_rate=0.0), images, jax.random.key(0))
    np.testing.assert_allclose(without, logits, rtol=1e-5, atol=1e-6)


def test_drop_rates_rise_linearly_from_zero_over_all_blocks():
    """Rates that start anew in each stage would regularise the early blocks as strongly as the last."""
    model = jax.eval_shape(partial(create_model, 'convnext_tiny', drop_path_rate=0.34), key=jax.random.key(0))
    rates = [rate for stage in model.stages for rate in stage.drop_rates]
    np.testing.assert_allclose(rates, [0.02 * block for block in range(18)])


def test_blocks_and_images_draw_independently():
    """One key for every block, within a stage or across stages, drops a whole image's network at once."""
    # Block i of this model adds 2 ** i to an empty image: the sum tells which blocks were kept.
    count, blocks = 2048, sum(DEPTHS)
    model = build(Variant(DEPTHS, (8, 8), layer_scale_init=0))
    parameters = {name: jnp.zeros_like(leaf) for name, leaf in get_parameters(model).items()}
    for stage, numbers in enumerate(np.split(np.arange(blocks), [DEPTHS[0]])):
        parameters[f'stages.{stage}.blocks.pointwise2.bias'] += 2.0 ** numbers[:, None]
    model = with_parameters(model, parameters)
    keys, empty = jax.random.split(jax.random.key(3), count), jnp.zeros((count, 1, 1, 8))
    total = 0
    for stage in model.stages:
        stage.downsample, stage.drop_rates = None, (0.5,) * len(stage.drop_rates)
        total += np.asarray(jax.jit(lambda stage, keys: stage(empty, keys))(stage, keys))[:, 0, 0, 0] / 2
    kept = total.astype(int)[:, None] >> np.arange(blocks) & 1

    assert np.abs(kept.mean(0) - 0.5).max() < 5 * 0.5 / count**0.5
    assert np.abs(np.corrcoef(kept.T) - np.eye(blocks)).max() < 5 / count**0.5
    assert abs(np.corrcoef(kept[:-1].ravel(), kept[1:].ravel())[0, 1]) < 5 / kept.size**0.5


def test_one_key_draws_for_each_image_apart(v1, images):
    """One draw for the whole batch keeps the mean and loses the regularisation."""
    same = jnp.broadcast_to(images[:1], images.shape)
    logits = np.asarray(call(v1, same, jax.random.key(0)))
    assert len(np.unique(logits.round(4), axis=0)) > 4
    np.testing.assert_array_equal(logits, call(v1, same, jax.random.key(0)))
    assert np.abs(logits - call(v1, same, jax.random.key(1))).max() > 0.01


def test_what_an_image_draws_depends_on_its_key_alone(v1, images, keys):
    """Gradient accumulation, another device count or another order would change the run."""
    logits = np.asarray(call(v1, images, keys))
    order = np.random.default_rng(0).permutation(len(images))
    np.testing.assert_allclose(call(v1, images[order], keys[order]), logits[order], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(call(v1, images[4:8], keys[4:8]), logits[4:8], rtol=1e-4, atol=1e-5)
    assert np.abs(call(v1, images, keys[order]) - logits).max() > 0.01


def test_sharded_batch_gives_the_same_logits(v2, images):
    """A run on eight devices would be another run than on one, drop path included."""
    assert jax.device_count() >= 8, 'tests/conftest.py simulates eight devices'
    mesh = Mesh(np.asarray(jax.devices()[:8]), ('data',))
    rows, everywhere = NamedSharding(mesh, PartitionSpec('data')), NamedSharding(mesh, PartitionSpec())
    key = jax.random.key(5)
    logits = call(jax.device_put(v2, everywhere), jax.device_put(images, rows), jax.device_put(key, everywhere))
    assert len(logits.sharding.device_set) == 8
    np.testing.assert_allclose(logits, call(v2, images, key), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('variant', [Variant((2,), (8,), grn=True, layer_scale_init=0), Variant((3,), (8,))])
def test_remat_saves_memory_and_changes_neither_value_nor_gradient(variant, images, keys):
    """Recomputed blocks that draw again give a gradient of another network than the one that was run."""

    def loss(model, parameters):
        return jnp.square(with_parameters(model, parameters)(images, key=keys)).mean()

    def results(remat):
        model = build(variant, remat=remat)
        step = jax.jit(jax.value_and_grad(partial(loss, model)))
        memory = step.lower(get_parameters(model)).compile().memory_analysis()
        return *step(get_parameters(model)), memory.temp_size_in_bytes

    value, gradient, memory = results('none')
    for remat in ('dots', 'full'):
        again, recomputed, less = results(remat)
        np.testing.assert_allclose(again, value, rtol=1e-5)
        for name, leaf in gradient.items():
            np.testing.assert_allclose(recomputed[name], leaf, rtol=1e-3, atol=1e-5, err_msg=name)
            assert np.abs(leaf).max() > 0, f'{name} gets no gradient'
        assert less < 0.9 * memory, f'{remat}: {less} of {memory} bytes'
        memory = less
    with pytest.raises(UserError, match="remat must be one of none, dots, full, not 'half'"):
        build(variant, remat='half')


def test_bfloat16_computes_near_float32(v2, images):
    """Half precision is for matrix products; parameters, norms and logits that lose bits lose accuracy."""
    model = build(V2, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in get_parameters(model).values()} == {jnp.dtype('float32')}
    assert {leaf.dtype for leaf in jax.eval_shape(model.features, images).values()} == {jnp.dtype('bfloat16')}
    logits, exact = call(model, images, jax.random.key(5)), np.asarray(call(v2, images, jax.random.key(5)))
    assert logits.dtype == jnp.float32
    assert np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()
    assert (logits != logits.astype(jnp.bfloat16)).any()  # not float32 in name only


def products(model, images):
    """Types of each product and convolution of the training step as it is for a TPU: (left, right, result)."""
    grad = jax.jit(jax.grad(lambda model, images: jnp.square(model(images)).sum()))
    program = grad.trace(model, images).lower(lowering_platforms=('tpu',)).as_text()
    lines = [line for line in program.splitlines() if re.search(r'stablehlo\.(dot_general|convolution)', line)]
    return [tuple(re.findall(r'tensor<(?:\d+x)*(\w+)>', line.rpartition(' : ')[2])) for line in lines]


@pytest.mark.parametrize('variant', [V1, V2])
@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
def test_bfloat16_leaves_no_float32_product_but_the_head_s_and_rounds_no_kernel_gradient(variant, remat, images):
    """One product in float32 costs as much as ten others; gradients summed over 256 chips in bfloat16 lose bits."""
    model = build(variant, dtype=jnp.bfloat16, remat=remat)
    found = products(model, images)
    kernels = [name for name in get_parameters(model) if name.endswith('.kernel') and not name.startswith('head')]
    assert found.count(('bf16', 'bf16', 'f32')) == len(kernels) == 3 * len(DEPTHS) + 2
    assert found.count(('f32', 'f32', 'f32')) == 3
    assert set(found) == {('bf16', 'bf16', 'bf16'), ('bf16', 'bf16', 'f32'), ('f32', 'f32', 'f32')}


def scans(jaxpr):
    """Lengths of the scans of a jaxpr that are not inside another scan."""
    lengths = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'scan':
            lengths.append(equation.params['length'])
        else:
            for inner in jaxprs_in_params(equation.params):
                lengths += scans(inner)
    return lengths


@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
def test_blocks_of_a_stage_run_under_one_scan(remat):
    """Unrolled, a model of 36 blocks takes minutes to compile."""
    model = jax.eval_shape(partial(create_model, 'convnext_small', remat=remat), key=jax.random.key(0))
    jaxpr = jax.make_jaxpr(lambda model, images: model(images))(model, jnp.zeros((1, 32, 32, 3)))
    assert scans(jaxpr.jaxpr) == [3, 3, 27, 3]


def shapes(name, **options):
    return {
        name: leaf.shape
        for name, leaf in get_parameters(
            jax.eval_shape(partial(create_model, name, **options), key=jax.random.key(0))
        ).items()
    }


@pytest.fixture(scope='module')
def initial():
    """The parameters of a new model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, 'two_stages', Variant((3, 2), (32, 64)))
        build = partial(create_model, 'two_stages', num_classes=100, head_init_scale=0.1, layer_scale_init=0.25)
        model = jax.jit(lambda key: build(key=key))(jax.random.key(0))
    return {name: np.asarray(leaf) for name, leaf in get_parameters(model).items()}


def test_head_init_scale(initial):
    """Fine-tuning starts from a small head: without the scale the first steps wreck the weights."""
    assert initial['head.kernel'].std() == pytest.approx(0.002, rel=0.05)
    assert not initial['head.bias'].any()


def test_every_block_starts_from_its_own_weights_of_std_0_02(initial):
    """Blocks or stages made from one key would start equal."""
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
    """0 removes the layer scale, and a value gives one to any architecture."""
    assert initial['stages.0.blocks.layer_scale'].shape == (3, 32)
    assert not [name for name in shapes('convnext_atto', layer_scale_init=0) if 'layer_scale' in name]
    assert shapes('convnextv2_atto', layer_scale_init=0.1)['stages.2.blocks.layer_scale'] == (6, 160)


def test_patch_size_and_in_channels():
    """Small and grey images need another stem; everything behind it stays as it is."""
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
        ({'num_classes': 0}, 'num_classes must be at least 1, not 0'),
        ({'in_channels': 0}, 'in_channels must be at least 1, not 0'),
        ({'patch_size': 0}, 'patch_size must be at least 1, not 0'),
        ({'dtype': 'int8'}, "dtype must be one of float32, bfloat16, float16, not 'int8'"),
        ({'dtype': 'float64'}, "dtype must be one of float32, bfloat16, float16, not 'float64'"),
        ({'key': None}, 'key must be a key such as jax.random.key.0., not NoneType'),
    ],
)
def test_bad_arguments_of_create_model(options, message):
    """A bad value must end in one line that names it, not deep inside JAX."""
    with pytest.raises(UserError, match=message):
        create_model(**({'name': 'convnext_atto', 'key': jax.random.key(0)} | options))


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        ((16, 16, 3), r'images must be \(N, H, W, 3\), these are \(16, 16, 3\)'),
        ((2, 16, 16, 1), r'images must be \(N, H, W, 3\), these are \(2, 16, 16, 1\)'),
        ((2, 3, 16, 16), r'images must be \(N, H, W, 3\), these are \(2, 3, 16, 16\)'),
        ((2, 7, 16, 3), 'images of 7×16 are smaller than the total stride of 8: enlarge them, or give a smaller'),
        ((2, 16, 7, 3), 'images of 16×7 are smaller than the total stride of 8'),
    ],
)
def test_bad_images(v1, shape, message):
    """Channels first, or too small an image: without the check the mean of an empty map is NaN."""
    for use in (v1, v1.features):
        with pytest.raises(UserError, match=message):
            use(jnp.zeros(shape))
