"""Numerical parity with transformers, timm and torch, by stored values for random weights.

`tests/judges` compares with the libraries themselves.
"""

import functools

import jax
import numpy as np
import pytest
from random_models import layouts_of

from convnext_jax.interop.layouts import from_layout, to_layout
from convnext_jax.models import create_model, get_parameters, get_variant, list_models, with_parameters
from tests import reference
from tests.reference import cases

BOUND = 2e-5  # in standard deviations of the reference, for float32


def random_model(name: str, **arguments):
    """A model whose parameters are all random and large enough to matter, and the parameters."""
    build = functools.partial(create_model, name, num_classes=cases.CLASSES, **arguments)
    model = jax.eval_shape(lambda key: build(key=key), jax.random.key(0))
    parameters = reference.draw_parameters({name: x.shape for name, x in get_parameters(model).items()})
    return with_parameters(model, parameters), parameters


@jax.jit
def outputs(model, x) -> dict:
    return {'logits': model(x)} | model.features(x)


@pytest.mark.parametrize(('judge', 'name', 'epsilon'), cases.MODELS)
def test_logits_and_maps_equal_the_originals(judge, name, epsilon):
    """With a slightly different padding, epsilon or order, published weights would give other predictions."""
    model, _ = random_model(name, layer_norm_eps=epsilon)
    found = outputs(model, cases.images(cases.SIZE))
    stored = reference.arrays('models')
    theirs = {key.split('/')[-1]: x for key, x in stored.items() if key.startswith(f'{judge}/{name}/')}
    assert set(found) - set(theirs) == ({'stem'} if judge == 'timm' else set())
    differences = {feature: reference.difference(found[feature], x) for feature, x in theirs.items()}
    assert max(differences.values()) < BOUND, differences


@pytest.mark.parametrize('name', [name for name in list_models() if 'isotropic' not in name])
def test_every_model_has_the_names_and_shapes_of_timm_and_transformers(name):
    """Published weights of a variant could not be loaded. Broadcast zeros replace the weights, to save memory."""
    model = jax.eval_shape(lambda key: create_model(name, key=key, num_classes=cases.CLASSES), jax.random.key(0))
    ours = {parameter: np.broadcast_to(np.int8(0), x.shape) for parameter, x in get_parameters(model).items()}
    stored = names_and_shapes()[name]
    assert set(stored) == set(layouts_of(get_variant(name))) - {'original'}
    for layout, theirs in stored.items():
        tensors = to_layout(without_head(ours) if layout == 'dinov3' else ours, get_variant(name), layout)
        assert {tensor: list(value.shape) for tensor, value in tensors.items()} == theirs, layout


@functools.cache
def names_and_shapes() -> dict:
    return reference.table('names_and_shapes')


def without_head(parameters: dict) -> dict:
    return {name: x for name, x in parameters.items() if not name.startswith('head.')}


@pytest.mark.parametrize(
    ('name', 'layout'),
    [(name, layout) for name in ('convnext_atto', 'convnextv2_atto') for layout in layouts_of(get_variant(name))],
)
def test_conversion_and_back_is_bit_exact(name, layout):
    """Weights would change when they are converted."""
    _, parameters = random_model(name)
    parameters = without_head(parameters) if layout == 'dinov3' else parameters
    shapes = {parameter: value.shape for parameter, value in parameters.items()}
    variant = get_variant(name)
    back = from_layout(to_layout(parameters, variant, layout), shapes, variant, layout)
    assert back.keys() == parameters.keys()
    for parameter, value in parameters.items():
        np.testing.assert_array_equal(back[parameter], value, err_msg=parameter)


def test_missing_unexpected_and_misshapen_tensors_are_all_listed():
    """Users would have to find the problems one after the other."""
    _, parameters = random_model('convnext_atto')
    shapes = {parameter: value.shape for parameter, value in parameters.items()}
    variant = get_variant('convnext_atto')
    tensors = to_layout(parameters, variant, 'timm')
    tensors['extra'] = tensors.pop('stem.0.bias')
    tensors['head.fc.bias'] = tensors['head.fc.bias'][:-1]
    listed = r'extra is unexpected; head.fc.bias is \(49,\), not \(50,\); stem.0.bias is missing'
    with pytest.raises(ValueError, match=listed):
        from_layout(tensors, shapes, variant, 'timm')
