"""Probabilities of photographs, with the pipeline of transformers as the judge."""

import jax
import numpy as np
import pytest
from PIL import Image

from convnext_jax import ImageProcessor, create_model, save_pretrained
from convnext_jax.errors import UserError
from convnext_jax.interop import Pretrained, read_pretrained
from convnext_jax.prediction import predict


@pytest.fixture
def photos(tmp_path):
    """Three that look different."""
    rng = np.random.default_rng(0)
    paths = []
    for number, size in enumerate(((40, 50), (96, 64), (70, 70))):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        paths.append(tmp_path / f'{number}.png')
        coarse.resize(size, Image.Resampling.BICUBIC).save(paths[-1])
    return paths


@pytest.mark.parametrize(
    ('names', 'kind'),
    [
        (('rust', 'crack', 'dent'), 'multi_label_classification'),
        (('rust', 'crack', 'dent'), 'single_label_classification'),
        (('rust', 'crack', 'dent'), None),
        (('rust',), 'multi_label_classification'),
        (('rust',), None),
    ],
    ids=str,
)
def test_probabilities_equal_those_of_the_pipeline(tmp_path, photos, names, kind):
    """A multi-label head read by a softmax loses all labels but the strongest; of one output it says 100 % to all."""
    transformers = pytest.importorskip('transformers', reason='transformers is a development requirement')
    model = create_model(
        'convnextv2_atto', key=jax.random.key(0), num_classes=len(names), head_init_scale=30.0, layer_norm_eps=1e-12
    )
    model.head.bias[...] = np.asarray([1.0, 0.5, -1.0][: len(names)], np.float32)
    save_pretrained(model, tmp_path / 'out', class_names=names, processor=ImageProcessor(size=64), problem_type=kind)
    pipeline = transformers.pipeline(
        'image-classification',
        model=str(tmp_path / 'out'),
        image_processor=transformers.ConvNextImageProcessorPil.from_pretrained(tmp_path / 'out'),
    )
    pretrained = read_pretrained(tmp_path / 'out')
    seen = list(predict(pretrained, photos))
    assert [prediction.path for prediction in seen] == photos
    for prediction, path in zip(seen, photos, strict=True):
        theirs = pipeline(str(path))
        assert [name for _, name, _ in prediction.best] == [score['label'] for score in theirs]
        for (_, _, ours), score in zip(prediction.best, theirs, strict=True):
            assert ours == pytest.approx(score['score'], abs=1e-5)
    if len(names) > 1:
        assert (abs(sum(p for _, _, p in seen[0].best) - 1) < 1e-5) == (kind != 'multi_label_classification')


def test_a_regression_has_no_probabilities(photos):
    """The pipeline gives its values as scores; as percentages they would mean nothing."""
    model = create_model('convnextv2_atto', key=jax.random.key(0), num_classes=2)
    with pytest.raises(UserError, match='the head is a regression: its outputs are values, not probabilities'):
        next(predict(Pretrained(model, 'huggingface', None, None, (), [], 'regression'), photos))
