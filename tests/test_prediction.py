"""Predictions, compared with stored predictions of the pipeline of transformers (`tests/reference`)."""

import jax
import numpy as np
import pytest

from convnext_jax import create_model
from convnext_jax.errors import UserError
from convnext_jax.interop import Pretrained, read_pretrained
from convnext_jax.prediction import predict
from tests import reference
from tests.reference import cases


@pytest.fixture
def photos(tmp_path):
    return cases.write_photos(tmp_path)


@pytest.mark.parametrize('number', range(len(cases.PREDICTED)), ids=[str(case) for case in cases.PREDICTED])
def test_probabilities_equal_the_pipeline_of_transformers(tmp_path, photos, number):
    """With a softmax, a multi-label model would predict one label only, and a model with one output always 100 %."""
    names, kind = cases.PREDICTED[number]
    cases.save_predictor(tmp_path / 'out', names, kind)
    predictions = list(predict(read_pretrained(tmp_path / 'out'), photos))
    assert [prediction.path for prediction in predictions] == photos
    theirs = reference.arrays('predictions')[str(number)]
    assert len(names) == 1 or np.ptp(theirs, axis=0).min() > 1e-3, 'the scores of the photographs differ'
    for prediction, scores in zip(predictions, theirs, strict=True):
        best = sorted(zip(names, scores, strict=True), key=lambda pair: -pair[1])
        assert [name for _, name, _ in prediction.best] == [name for name, _ in best]
        assert [score for _, _, score in prediction.best] == pytest.approx([score for _, score in best], abs=1e-5)
    if len(names) > 1:
        assert (abs(sum(p for _, _, p in predictions[0].best) - 1) < 1e-5) == (kind != 'multi_label_classification')


def test_a_regression_has_no_probabilities(photos):
    """The outputs of a regression would be shown as percentages."""
    model = create_model('convnextv2_atto', key=jax.random.key(0), num_classes=2)
    with pytest.raises(UserError, match='the model has a regression head: its outputs are values, not probabilities'):
        next(predict(Pretrained(model, 'huggingface', None, None, (), [], 'regression'), photos))
