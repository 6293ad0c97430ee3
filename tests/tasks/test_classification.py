"""The classification task: classes and labels of its data, initial weights, and preprocessing of other weights."""

import unicodedata

import jax
import numpy as np
import pytest
from PIL import Image

from convnext_jax import create_model
from convnext_jax.config import default_config
from convnext_jax.errors import UserError
from convnext_jax.interop import ImageProcessor, Pretrained
from convnext_jax.models import Variant, get_parameters
from convnext_jax.tasks import LoadedWeights, make_task


def config_of(directory):
    config = default_config()
    config.data.name, config.data.dir, config.data.eval_split = 'folder', str(directory), 'val'
    return config


def write(directory, *names):
    for name in names:
        path = directory / name / '0.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 4)).save(path)


def test_the_evaluation_split_uses_the_labels_of_the_training_split(tmp_path):
    """If the validation folder has no images of a class, or was written by a Mac, accuracy uses wrong labels."""
    write(tmp_path, 'train/ant', 'train/bee', 'train/żubr', 'val/bee', f'val/{unicodedata.normalize("NFD", "żubr")}')
    config = config_of(tmp_path)
    with pytest.warns(UserWarning, match='^1 of 3 classes are missing in split val$'):
        train, evaluation = make_task(config).open()
    assert evaluation.facts == train.facts == {'class names': ['ant', 'bee', 'żubr']}
    assert [evaluation.load(index)['label'] for index in range(2)] == [1, 2]
    assert config.model.num_classes == 3
    assert train.features == make_task(config).features, (
        'the step is compiled for other arrays than the loader delivers'
    )


def test_an_evaluation_class_that_is_not_in_training_is_refused(tmp_path):
    """All its images silently count as wrong, because no output of the model stands for the class."""
    write(tmp_path, 'train/ant', 'train/bee', 'val/ant', 'val/dog')
    with pytest.raises(UserError, match='^split val does not fit the training split: split train lacks .*: dog$'):
        make_task(config_of(tmp_path)).open()


def test_one_class_is_refused_and_the_message_says_where_the_classes_are(tmp_path):
    """A wrong folder level trains a classifier with a single class."""
    write(tmp_path, 'train/images/ant', 'train/images/bee', 'val/images/ant', 'val/images/bee')
    config = config_of(tmp_path)
    line = "^split train has one class, 'images': a classifier .*, or train with the split train/images$"
    with pytest.raises(UserError, match=line):
        make_task(config).open()
    config.data.train_split, config.data.eval_split = 'train/images', 'val/images'
    assert make_task(config).open()[1].facts == {'class names': ['ant', 'bee']}


def small_model(seed, classes=2):
    return create_model(Variant((1,), (8,), patch_size=4), key=jax.random.key(seed), num_classes=classes)


def test_weights_without_a_head_get_a_new_one():
    """An encoder from FCMAE pre-training, which has neither norm nor head, is refused as another architecture."""
    initial, trained = (get_parameters(small_model(seed)) for seed in range(2))
    encoder = {name: x for name, x in trained.items() if not name.startswith(('norm.', 'head.'))}
    facts = {'class names': ['ant', 'bee']}
    chosen, notes = make_task(default_config()).initial_weights(
        initial, LoadedWeights(encoder, {}, 'runs/fcmae'), facts
    )
    assert chosen.keys() == initial.keys()
    assert notes == ['newly initialised: norm.scale, norm.bias, head.kernel, head.bias']
    for name, x in chosen.items():
        np.testing.assert_array_equal(x, encoder.get(name, initial[name]))


def test_an_evaluation_uses_the_preprocessing_stored_with_the_weights(tmp_path):
    """Published accuracies cannot be reproduced with another resize or filter."""
    write(tmp_path, 'val/ant', 'val/bee')
    config = config_of(tmp_path)
    processor = ImageProcessor(32, 0.9, resample=2, squash=False, rescale_factor=1 / 127.5, mean=(1, 1, 1))
    pretrained = Pretrained(small_model(0), 'huggingface', ('bee', 'ant'), processor, (), [])
    config = make_task(config).config_for(pretrained, 'somewhere')
    config.eval.flip = True
    task = make_task(config)
    split = task.open_split('folder', 'val', pretrained.facts)
    assert (split.size, split.crop_pct, split.squash, split.resample) == (32, 0.9, False, 2)
    assert [split.load(index)['label'] for index in range(2)] == [1, 0]
    evaluator = task.evaluator(split)
    assert (evaluator.flip, evaluator.mean) == (True, pytest.approx((0.5, 0.5, 0.5)))
    assert list(evaluator.class_names) == ['bee', 'ant']
