"""The execution of the blocks: drop path, sharding, recomputation, dtypes, and one scan for each stage."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from small_models import DEPTHS, V1, V2, build, call, some_images

from convnext_jax.errors import UserError
from convnext_jax.models import Variant, create_model, get_parameters, with_parameters


@pytest.fixture(scope='module')
def v1():
    return build(V1)


@pytest.fixture(scope='module')
def v2():
    return build(V2)


@pytest.fixture(scope='module')
def images():
    return some_images()


@pytest.fixture(scope='module')
def keys():
    return jax.random.split(jax.random.key(7), 16)


def test_without_a_key_or_a_rate_nothing_is_dropped(v1, images):
    """Evaluation would be random, or depend on the drop path rate."""
    logits = call(v1, images)
    np.testing.assert_array_equal(logits, call(v1, images))
    assert np.abs(call(v1, images, jax.random.key(0)) - logits).max() > 0.01
    without = call(build(V1, drop_path_rate=0.0), images, jax.random.key(0))
    np.testing.assert_allclose(without, logits, rtol=1e-5, atol=1e-6)


def test_drop_rates_rise_linearly_from_zero_over_all_blocks():
    """With rates that start again from 0 in each stage, early blocks would be regularised as strongly as late ones."""
    model = jax.eval_shape(partial(create_model, 'convnext_tiny', drop_path_rate=0.34), key=jax.random.key(0))
    rates = [rate for stage in model.stages for rate in stage.drop_rates]
    np.testing.assert_allclose(rates, [0.02 * block for block in range(18)])


def test_blocks_and_images_draw_independently():
    """With one key for all blocks, all blocks of an image would be dropped together."""
    # Block i of this model adds 2 ** i to an image of zeros: the sum shows which blocks were kept.
    count, blocks = 2048, sum(DEPTHS)
    model = build(Variant(DEPTHS, (8, 8), layer_scale_init=0))
    parameters = {name: jnp.zeros_like(leaf) for name, leaf in get_parameters(model).items()}
    for stage, indices in enumerate(np.split(np.arange(blocks), [DEPTHS[0]])):
        parameters[f'stages.{stage}.blocks.pointwise2.bias'] += 2.0 ** indices[:, None]
    model = with_parameters(model, parameters)
    keys, zeros = jax.random.split(jax.random.key(3), count), jnp.zeros((count, 1, 1, 8))
    total = 0
    for stage in model.stages:
        stage.downsample, stage.drop_rates = None, (0.5,) * len(stage.drop_rates)
        total += np.asarray(jax.jit(lambda stage, keys: stage(zeros, keys))(stage, keys))[:, 0, 0, 0] / 2
    kept = total.astype(int)[:, None] >> np.arange(blocks) & 1

    assert np.abs(kept.mean(0) - 0.5).max() < 5 * 0.5 / count**0.5
    assert np.abs(np.corrcoef(kept.T) - np.eye(blocks)).max() < 5 / count**0.5
    assert abs(np.corrcoef(kept[:-1].ravel(), kept[1:].ravel())[0, 1]) < 5 / kept.size**0.5


def test_one_key_gives_each_image_its_own_draw(v1, images):
    """One draw for the whole batch would have the right mean but would not regularise."""
    equal = jnp.broadcast_to(images[:1], images.shape)
    logits = np.asarray(call(v1, equal, jax.random.key(0)))
    assert len(np.unique(logits.round(4), axis=0)) > 4
    np.testing.assert_array_equal(logits, call(v1, equal, jax.random.key(0)))
    assert np.abs(logits - call(v1, equal, jax.random.key(1))).max() > 0.01


def test_the_draw_of_an_image_depends_on_its_key_only(v1, images, keys):
    """Gradient accumulation, another number of devices or another order would change the run."""
    logits = np.asarray(call(v1, images, keys))
    order = np.random.default_rng(0).permutation(len(images))
    np.testing.assert_allclose(call(v1, images[order], keys[order]), logits[order], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(call(v1, images[4:8], keys[4:8]), logits[4:8], rtol=1e-4, atol=1e-5)
    assert np.abs(call(v1, images, keys[order]) - logits).max() > 0.01


def test_a_sharded_batch_gives_equal_logits(v2, images):
    """A run on eight devices would differ from a run on one device, for instance in drop path."""
    assert jax.device_count() >= 8, 'tests/conftest.py simulates eight devices'
    mesh = Mesh(np.asarray(jax.devices()[:8]), ('data',))
    sharded, replicated = NamedSharding(mesh, PartitionSpec('data')), NamedSharding(mesh, PartitionSpec())
    key = jax.random.key(5)
    logits = call(jax.device_put(v2, replicated), jax.device_put(images, sharded), jax.device_put(key, replicated))
    assert len(logits.sharding.device_set) == 8
    np.testing.assert_allclose(logits, call(v2, images, key), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('variant', [Variant((2,), (8,), grn=True, layer_scale_init=0), Variant((3,), (8,))])
def test_remat_saves_memory_and_changes_neither_value_nor_gradient(variant, images, keys):
    """If recomputed blocks drew other random numbers, the gradient would belong to another network."""
    # Two blocks would save too little memory to measure.
    variant = variant.replace(depths=tuple(2 * depth for depth in variant.depths))

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


def test_the_statistics_of_norms_are_saved(images):
    """They are two numbers per position, and recomputing them would take three passes over the block's input."""

    def roots(remat):
        model = build(Variant((1,), (8,)), remat=remat)
        return jax.jit(jax.grad(lambda model: model(images).sum())).lower(model).as_text().count('stablehlo.rsqrt')

    assert roots('dots') == roots('none')
    assert roots('full') > roots('none')


@pytest.mark.parametrize('remat', ['dots', pytest.param('full', marks=pytest.mark.slow)])
def test_unrolled_blocks_are_an_equal_network_and_also_recompute(remat, images, keys):
    """Without a loop, the compiler would merge the recomputation with the forward pass, and memory would not shrink."""

    def run(unroll):
        model = build(Variant((3,), (8,)), remat=remat, unroll=unroll)

        def loss(parameters):
            return jnp.square(with_parameters(model, parameters)(images, key=keys)).mean()

        step = jax.jit(jax.value_and_grad(loss))
        program = step.trace(get_parameters(model)).lower(lowering_platforms=('tpu',)).as_text()
        return *step(get_parameters(model)), program.count('optimization_barrier')

    value, gradient, barriers = run(False)
    again, unrolled, more_barriers = run(True)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    for name, leaf in gradient.items():
        np.testing.assert_allclose(unrolled[name], leaf, rtol=1e-3, atol=1e-5, err_msg=name)
    assert more_barriers > barriers


def test_bfloat16_is_close_to_float32(v2, images):
    """Accuracy would suffer if parameters, norms or logits were bfloat16, not only matrix products."""
    model = build(V2, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in get_parameters(model).values()} == {jnp.dtype('float32')}
    assert {leaf.dtype for leaf in jax.eval_shape(model.features, images).values()} == {jnp.dtype('bfloat16')}
    logits, exact = call(model, images, jax.random.key(5)), np.asarray(call(v2, images, jax.random.key(5)))
    assert logits.dtype == jnp.float32
    assert np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()
    assert (logits != logits.astype(jnp.bfloat16)).any()  # computed in float32, not cast from bfloat16


def products(model, images):
    """The dtypes (left, right, result) of each product and convolution in the gradient's program for a TPU."""
    grad = jax.jit(jax.grad(lambda model, images: jnp.square(model(images)).sum()))
    program = grad.trace(model, images).lower(lowering_platforms=('tpu',)).as_text()
    lines = [line for line in program.splitlines() if re.search(r'stablehlo\.(dot_general|convolution)', line)]
    return [tuple(re.findall(r'tensor<(?:\d+x)*(\w+)>', line.rpartition(' : ')[2])) for line in lines]


@pytest.mark.parametrize('variant', [V1, V2])
@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
def test_only_the_head_has_float32_products_and_kernel_gradients_are_float32(variant, remat, images):
    """A float32 product costs as much as ten in bfloat16; bfloat16 gradients lose precision in sums over devices."""
    model = build(variant, dtype=jnp.bfloat16, remat=remat)
    found = products(model, images)
    kernels = [name for name in get_parameters(model) if name.endswith('.kernel') and not name.startswith('head')]
    assert found.count(('bf16', 'bf16', 'f32')) == len(kernels) == 3 * len(DEPTHS) + 2
    assert found.count(('f32', 'f32', 'f32')) == 3
    assert set(found) == {('bf16', 'bf16', 'bf16'), ('bf16', 'bf16', 'f32'), ('f32', 'f32', 'f32')}


def scans(jaxpr):
    """The lengths of the scans of a jaxpr, except scans inside another scan."""
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
    """A model of 36 unrolled blocks would take minutes to compile."""
    model = jax.eval_shape(partial(create_model, 'convnext_small', remat=remat), key=jax.random.key(0))
    jaxpr = jax.make_jaxpr(lambda model, images: model(images))(model, jnp.zeros((1, 32, 32, 3)))
    assert scans(jaxpr.jaxpr) == [3, 3, 27, 3]
