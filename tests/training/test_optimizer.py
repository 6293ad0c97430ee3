"""The optimizer follows the published recipes."""

import jax
import numpy as np
import pytest

from convnext_jax.errors import UserError
from convnext_jax.interop.layouts import entries
from convnext_jax.models import Role, UPerNet, create_model, get_parameters, get_variant, list_models, parameter_roles
from convnext_jax.training.optimizer import adamw, cosine_schedule, layer_factors, linear_schedule, moving_average
from tests import reference
from tests.reference import cases


def published_schedule(peak, minimum, warmup, total):
    """The schedule in utils.py of the original ConvNeXt code, in float64."""
    rise = np.linspace(0, peak, warmup) if warmup else np.array([])
    steps = np.arange(total - warmup)
    fall = minimum + 0.5 * (peak - minimum) * (1 + np.cos(np.pi * steps / len(steps)))
    return np.concatenate([rise, fall])


@pytest.mark.parametrize(('warmup', 'total'), [(0, 50), (1, 50), (20, 300), (6240, 93600)])
def test_every_step_has_the_published_learning_rate(warmup, total):
    """Runs would not reach the published accuracy."""
    schedule = cosine_schedule(4e-3, 1e-6, warmup, total)
    ours = np.asarray(jax.jit(jax.vmap(schedule))(np.arange(total)))
    np.testing.assert_allclose(ours, published_schedule(4e-3, 1e-6, warmup, total), rtol=2e-5, atol=1e-9)


def mmsegmentation_schedule(base, minimum, warmup, total):
    """`PolyLrUpdaterHook` of power 1 with linear warm-up in mmcv, in float64."""
    rates = []
    for step in range(total):
        regular = (base - minimum) * (1 - step / total) + minimum
        missing = (1 - step / warmup) * (1 - 1e-6) if step < warmup else 0
        rates.append(regular * (1 - missing))
    return rates


@pytest.mark.parametrize(('minimum', 'warmup', 'total'), [(0.0, 1500, 160_000), (1e-6, 0, 50), (0.0, 1, 50)])
def test_every_step_of_the_linear_schedule_has_the_rate_of_mmsegmentation(minimum, warmup, total):
    """Published segmentation recipes would train with other rates."""
    schedule = linear_schedule(1e-4, minimum, warmup, total)
    ours = np.asarray(jax.jit(jax.vmap(schedule))(np.arange(total)))
    np.testing.assert_allclose(ours, mmsegmentation_schedule(1e-4, minimum, warmup, total), rtol=3e-4, atol=1e-11)


@pytest.mark.parametrize('name', list_models())
def test_weight_decay_applies_to_kernels_only(name):
    """A rule by rank, as in the original code, would decay GRN, and also stacked biases, which are matrices."""
    model = jax.eval_shape(lambda key: create_model(name, key=key), jax.random.key(0))
    decayed = {parameter for parameter, role in parameter_roles(model).items() if role.decays}
    kernels = {parameter for parameter in get_parameters(model) if parameter.endswith('.kernel')}
    assert decayed == kernels
    assert 'stages.0.blocks.depthwise.kernel' in decayed


def test_update_is_adamw_with_decoupled_decay():
    """Published hyperparameters would not apply. Two steps must equal arXiv:1711.05101, computed in float64."""
    rng = np.random.default_rng(0)
    weights = {'head.kernel': rng.normal(size=(3, 2)), 'head.bias': rng.normal(size=2)}
    factors, roles = dict.fromkeys(weights, 1.0), {name: Role(decays=name.endswith('kernel')) for name in weights}
    optimizer = adamw(factors, roles, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.05, clip_norm=0)
    ours = {name: value.astype(np.float32) for name, value in weights.items()}
    state = optimizer.init(ours)
    first, second = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)
    for step in (1, 2):
        gradient = {name: rng.normal(size=value.shape) for name, value in weights.items()}
        updates, state = optimizer.update(jax.tree.map(np.float32, gradient), state, ours, good=True)
        ours = {name: ours[name] - 0.1 * np.asarray(updates[name]) for name in ours}
        for name, g in gradient.items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            direction = first[name] / (1 - 0.9**step) / (np.sqrt(second[name] / (1 - 0.999**step)) + 1e-8)
            decay = 0.05 if name == 'head.kernel' else 0
            weights[name] = weights[name] - 0.1 * (direction + decay * weights[name])
    for name, value in weights.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-5)  # 1 − beta2 ** step has float32 error 3e-5


def test_clipping_bounds_the_global_norm_of_the_gradient():
    """One exploding gradient would destroy the weights.

    Adam hides the scale of a single gradient, so the test applies a small gradient and then a huge one.
    """
    small, huge = {'head.kernel': np.full((2, 2), 0.1, np.float32)}, {'head.kernel': np.full((2, 2), 1e6, np.float32)}

    factors, roles = {'head.kernel': 1.0}, {'head.kernel': Role(decays=True)}

    def second_update(clip_norm):
        optimizer = adamw(
            factors,
            roles,
            beta1=0.9,
            beta2=0.999,
            epsilon=1e-8,
            weight_decay=0,
            clip_norm=clip_norm,
        )
        _, state = optimizer.update(small, optimizer.init(small), small, good=True)
        return np.asarray(optimizer.update(huge, state, small, good=True)[0]['head.kernel'])

    bounded = {'head.kernel': huge['head.kernel'] / np.float32(2e6)}  # of norm 1
    optimizer = adamw(factors, roles, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0, clip_norm=0)
    _, state = optimizer.update(small, optimizer.init(small), small, good=True)
    expected = np.asarray(optimizer.update(bounded, state, small, good=True)[0]['head.kernel'])
    np.testing.assert_allclose(second_update(1.0), expected, rtol=1e-5)
    assert not np.allclose(second_update(0.0), expected, rtol=1e-2)


def layers_of(name, rule, decay=0.5):
    """Parameter → number of layers between it and the head; for stacked blocks, one number per block."""
    model = jax.eval_shape(lambda key: create_model(name, key=key), jax.random.key(0))
    factors = layer_factors(list(get_parameters(model)), model.variant.depths, rule, decay)
    return {parameter: (np.log(factor) / np.log(decay)).round(9).tolist() for parameter, factor in factors.items()}


@pytest.mark.parametrize('name', cases.LAYERED)
def test_single_layer_decay_equals_the_parameter_groups_of_timm(name):
    """Fine-tuning recipes of timm would train each layer at another rate."""
    theirs = reference.table('layers')[name]
    model = jax.eval_shape(lambda key: create_model(name, key=key), jax.random.key(0))
    shapes = {parameter: x.shape for parameter, x in get_parameters(model).items()}
    ours = layers_of(name, 'single')
    for entry in entries(shapes, model.variant, 'timm'):
        layer = ours[entry.ours] if entry.block is None else ours[entry.ours][entry.block]
        assert layer == pytest.approx(theirs.pop(entry.theirs)), entry.theirs
    assert not theirs


@pytest.mark.parametrize(
    ('name', 'third', 'last'),
    [
        ('convnext_tiny', [3, 3, 3, 4, 4, 4, 5, 5, 5], 6),
        ('convnext_base', [3 + block // 3 for block in range(27)], 12),
        ('convnextv2_large', [3 + block // 3 for block in range(27)], 12),
    ],
)
def test_group_layer_decay_equals_the_table_of_the_original_code(name, third, last):
    """Published fine-tuning recipes would train each layer at another rate.

    get_num_layer_for_convnext in ConvNeXt's `optim_factory.py` has 6 layers for the depth of tiny, and 12 otherwise.
    """
    layers = {parameter: last + 1 - np.asarray(layer) for parameter, layer in layers_of(name, 'group').items()}
    expected = {
        'stem.conv.kernel': 0,
        'stem.norm.scale': 0,
        'stages.0.blocks.depthwise.kernel': [1] * 3,
        'stages.1.downsample.conv.kernel': 2,
        'stages.1.blocks.norm.bias': [2] * 3,
        'stages.2.downsample.norm.scale': 3,
        'stages.2.blocks.pointwise1.kernel': third,
        'stages.3.downsample.conv.bias': last,
        'stages.3.blocks.pointwise2.bias': [last] * 3,
        'norm.scale': last + 1,
        'head.kernel': last + 1,
    }
    for parameter, layer in expected.items():
        np.testing.assert_array_equal(layers[parameter], layer, err_msg=parameter)


@pytest.mark.parametrize(
    ('name', 'stem', 'stages'),
    [
        ('convnext_tiny', 7, (6, 5, 4, 3)),  # powers of the decay
        ('convnext_small', 13, (12, 11, 10, 9)),
        ('convnextv2_base', 13, (12, 11, 10, 9)),
    ],
)
def test_stage_layer_decay_equals_the_original_segmentation_code(name, stem, stages):
    """Published segmentation recipes would train each layer at another rate.

    get_num_layer_stage_wise in ConvNeXt's `layer_decay_optimizer_constructor.py` has num_layers=6 for tiny, and 12
    otherwise. Output norms and heads have the full rate.
    """
    variant = get_variant(name)
    model = jax.eval_shape(lambda key: UPerNet(variant, key=key), jax.random.key(0))
    factors = layer_factors(list(get_parameters(model)), variant.depths, 'stage', 0.9)
    for parameter, factor in factors.items():
        part, *rest = parameter.split('.')
        if part != 'backbone' or rest[0] == 'norms':
            expected = 0
        elif rest[0] == 'stem' or rest[2] == 'downsample':
            expected = stem
        else:
            expected = stages[int(rest[1])]
        np.testing.assert_allclose(factor, 0.9**expected, err_msg=parameter)
    assert factors['backbone.stages.2.blocks.norm.bias'].shape == (variant.depths[2],)


def test_layer_decay_scales_the_whole_update_of_each_block():
    """Some blocks would be updated or decayed at a wrong rate: each factor acts as the learning rate of its block."""
    rng = np.random.default_rng(0)
    names = {'stages.0.blocks.pointwise1.kernel': (2, 3, 4), 'head.bias': (4,)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}
    gradient = {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}
    options = {'beta1': 0.9, 'beta2': 0.999, 'epsilon': 1e-8, 'weight_decay': 0.05, 'clip_norm': 0}

    def update(factors):
        optimizer = adamw(factors, dict.fromkeys(factors, Role(decays=True)), **options)
        return optimizer.update(gradient, optimizer.init(weights), weights, good=True)[0]

    plain = update(dict.fromkeys(names, 1.0))
    scaled = update(layer_factors(list(names), (2,), 'single', 0.5))
    kernel = 'stages.0.blocks.pointwise1.kernel'
    np.testing.assert_allclose(scaled[kernel], plain[kernel] * np.array([0.25, 0.5])[:, None, None], rtol=1e-6)
    np.testing.assert_array_equal(scaled['head.bias'], plain['head.bias'])


@pytest.mark.parametrize(
    ('depths', 'rule', 'match'),
    [
        ((3, 3, 9, 3), 'blockwise', 'must be one of single, group, stage'),
        ((18,), 'group', "rule='group' is for models of four stages"),
        ((18,), 'stage', "rule='stage' is for models of four stages"),
    ],
)
def test_unknown_or_unsuitable_layer_rules_are_refused(depths, rule, match):
    """A misspelt rule would train without layer decay, or end in a traceback."""
    with pytest.raises(UserError, match=match):
        layer_factors(['head.bias'], depths, rule, 0.9)


def test_the_moving_average_keeps_its_decay_of_the_old_value():
    """The evaluated average would follow the parameters at a wrong speed."""
    average = moving_average({'a': np.float32(1)}, {'a': np.float32(2)}, 0.9)
    np.testing.assert_allclose(average['a'], 1.1, rtol=1e-6)
