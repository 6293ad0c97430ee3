"""Weights that a run starts from, or that are evaluated."""

import jax
import pytest

from convnext_jax import create_model, save_pretrained
from convnext_jax.errors import UserError
from convnext_jax.models import get_parameters
from convnext_jax.training.evaluate import Protocol, evaluate_weights
from convnext_jax.training.weights import load_parameters


@pytest.mark.parametrize(
    ('classes', 'kind', 'called'),
    [
        (3, 'multi_label_classification', 'multi_label_classification, with 3 output'),
        (3, 'regression', 'regression, with 3 output'),
        (1, None, 'a sigmoid of each output, with 1 output'),
    ],
)
def test_heads_that_are_not_a_softmax_are_not_trained_or_judged_as_one(tmp_path, classes, kind, called):
    """The accuracy would be of a question that the model was never asked."""
    model = create_model('convnextv2_atto', key=jax.random.key(0), num_classes=classes)
    save_pretrained(model, tmp_path / 'out', problem_type=kind)
    with pytest.raises(UserError, match=f'the head of .*out is for {called}'):
        next(evaluate_weights(None, str(tmp_path / 'out'), 'raw', Protocol()))  # before it looks at a config
    with pytest.raises(UserError, match=f'the head of .*out is for {called}'):
        load_parameters(str(tmp_path / 'out'), 'raw', get_parameters(model))
    other = get_parameters(create_model('convnextv2_atto', key=jax.random.key(1), num_classes=5))
    loaded, notes = load_parameters(str(tmp_path / 'out'), 'raw', other)
    assert loaded['head.bias'].shape == (5,)
    assert 'the head is newly initialised' in notes[-1]
