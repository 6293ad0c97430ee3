"""A model's parameters and statistics as flat dicts, and a model from these dicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convnext_jax.models import (
    Variant,
    create_model,
    get_parameters,
    get_statistics,
    get_weights,
    parameter_roles,
    with_parameters,
)
from convnext_jax.models.batch_norm import BatchNorm
from convnext_jax.models.layers import Linear

call = jax.jit(lambda model, images: model(images))


@pytest.fixture(scope='module')
def model():
    """A small model whose parameters are all random, so that an omitted one changes the output."""
    variant = Variant((3, 2), (8, 16), grn=True, layer_scale_init=0)
    model = create_model(variant, num_classes=5, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    parameters = {
        name: jnp.asarray(name.endswith('scale') + 0.3 * rng.standard_normal(leaf.shape), jnp.float32)
        for name, leaf in get_parameters(model).items()
    }
    return with_parameters(model, parameters)


def names(name):
    return list(get_parameters(jax.eval_shape(lambda: create_model(name, key=jax.random.key(0)))))


def test_parameters_round_trip(model):
    """Optimizer, checkpoint and EMA use the flat dict only: a parameter missing or swapped in it would be lost."""
    images = jnp.asarray(np.random.default_rng(1).standard_normal((2, 32, 32, 3)), jnp.float32)
    parameters = get_parameters(model)
    assert all(isinstance(leaf, jax.Array) for leaf in parameters.values())
    assert len(parameters) == len(jax.tree.leaves(model))
    logits = call(model, images)
    abstract = jax.eval_shape(lambda model: model, model)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in get_parameters(abstract).values())
    for other in (jax.tree.map(jnp.zeros_like, model), abstract):
        restored = with_parameters(other, dict(reversed(parameters.items())))
        np.testing.assert_array_equal(call(restored, images), logits)
        assert list(get_parameters(restored)) == list(parameters)
    doubled = with_parameters(model, {name: 2 * leaf for name, leaf in parameters.items()})
    assert np.abs(call(doubled, images) - logits).max() > 0.01
    np.testing.assert_array_equal(call(model, images), logits)  # the first model is unchanged


def test_parameter_names():
    """Layer decay, checkpoints and converters depend on these names."""
    assert names('convnextv2_atto')[:4] == [
        'head.bias',
        'head.kernel',
        'norm.bias',
        'norm.scale',
    ]
    stage = {name.removeprefix('stages.1.') for name in names('convnext_atto') if name.startswith('stages.1.')}
    assert stage == {
        'downsample.norm.scale',
        'downsample.norm.bias',
        'downsample.conv.kernel',
        'downsample.conv.bias',
        'blocks.depthwise.kernel',
        'blocks.depthwise.bias',
        'blocks.norm.scale',
        'blocks.norm.bias',
        'blocks.pointwise1.kernel',
        'blocks.pointwise1.bias',
        'blocks.pointwise2.kernel',
        'blocks.pointwise2.bias',
        'blocks.layer_scale',
    }


def test_a_missing_parameter_is_an_error(model):
    """A missing parameter of a checkpoint would silently keep its initial value."""
    parameters = get_parameters(model)
    del parameters['head.bias']
    with pytest.raises(KeyError, match='head.bias'):
        with_parameters(model, parameters)


class Head(nnx.Module):
    """A linear layer and a BatchNorm, as in heads for segmentation."""

    def __init__(self):
        self.linear = Linear(4, 3, key=jax.random.key(0))
        self.norm = BatchNorm(3)


def test_statistics_are_separate_from_parameters():
    """The optimizer would apply weight decay to a running mean."""
    head = jax.eval_shape(Head)
    assert list(get_parameters(head)) == ['linear.bias', 'linear.kernel', 'norm.bias', 'norm.scale']
    assert list(get_statistics(head)) == ['norm.mean', 'norm.variance']
    assert list(parameter_roles(head)) == list(get_parameters(head))
    assert get_weights(head) == get_parameters(head) | get_statistics(head)
    weights = {name: jnp.full(x.shape, i, x.dtype) for i, (name, x) in enumerate(get_weights(head).items())}
    jax.tree.map(np.testing.assert_array_equal, get_weights(with_parameters(head, weights)), weights)
    with pytest.raises(KeyError, match='norm.mean'):
        with_parameters(head, get_parameters(with_parameters(head, weights)))


def test_a_convnext_has_no_statistics(model):
    """Checkpoints of existing runs have no statistics: with one, they could not be resumed."""
    assert get_statistics(model) == {}
