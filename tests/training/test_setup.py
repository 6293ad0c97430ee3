"""From a config to the parts of a run: what the splits must have in common, how the models are computed."""

import unicodedata

import pytest
from PIL import Image

from convnext_jax.config import default_config
from convnext_jax.errors import UserError
from convnext_jax.models import Execution
from convnext_jax.training.setup import abstract_model, evaluation_model, open_sources


def config_of(directory):
    config = default_config()
    config.data.name, config.data.dir, config.data.eval_split = 'folder', str(directory), 'val'
    return config


def write(directory, *names):
    for name in names:
        path = directory / name / '0.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 4)).save(path)


def test_evaluation_labels_are_those_of_the_training_split(tmp_path):
    """A validation folder without one class, or written by a Mac, scored the others under wrong labels."""
    write(tmp_path, 'train/ant', 'train/bee', 'train/żubr', 'val/bee', f'val/{unicodedata.normalize("NFD", "żubr")}')
    with pytest.warns(UserWarning, match='^1 of 3 classes are not in split val$'):
        train, evaluation = open_sources(config_of(tmp_path))
    assert evaluation.class_names == train.class_names == ['ant', 'bee', 'żubr']
    assert [evaluation[index].label for index in range(2)] == [1, 2]


def test_a_class_that_training_lacks_is_refused(tmp_path):
    """No output of the model means it: every image of it would count as wrong."""
    write(tmp_path, 'train/ant', 'train/bee', 'val/ant', 'val/dog')
    with pytest.raises(UserError, match='^split val does not fit: split train lacks these classes: dog$'):
        open_sources(config_of(tmp_path))


def test_one_class_is_refused_and_the_message_says_where_the_classes_are(tmp_path):
    write(tmp_path, 'train/images/ant', 'train/images/bee', 'val/images/ant', 'val/images/bee')
    config = config_of(tmp_path)
    with pytest.raises(UserError, match="^split train has one class, 'images', .* with the split train/images$"):
        open_sources(config)
    config.data.train_split, config.data.eval_split = 'train/images', 'val/images'
    assert open_sources(config)[1].class_names == ['ant', 'bee']


def test_the_models_are_computed_as_the_config_says_and_evaluation_never_by_pallas():
    """A field lost on the way costs memory or speed; evaluation on several devices cannot partition our kernels."""
    config = default_config()
    config.model.update(name='convnext_atto', num_classes=2, dtype='bfloat16', remat='full', unroll=True, pallas=True)
    assert abstract_model(config).execution == Execution('bfloat16', remat='full', unroll=True, pallas=True)
    assert evaluation_model(config).execution == Execution('bfloat16', remat='full', unroll=True, pallas=False)
