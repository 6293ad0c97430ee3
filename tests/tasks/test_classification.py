"""What classification demands of its data: classes, labels, shapes."""

import unicodedata

import pytest
from PIL import Image

from convnext_jax.config import default_config
from convnext_jax.errors import UserError
from convnext_jax.tasks import make_task


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
    config = config_of(tmp_path)
    with pytest.warns(UserWarning, match='^1 of 3 classes are not in split val$'):
        train, evaluation = make_task(config).open()
    assert evaluation.facts == train.facts == {'class names': ['ant', 'bee', 'żubr']}
    assert [evaluation.load(index)['label'] for index in range(2)] == [1, 2]
    assert config.model.num_classes == 3


def test_a_class_that_training_lacks_is_refused(tmp_path):
    """No output of the model means it: every image of it would count as wrong."""
    write(tmp_path, 'train/ant', 'train/bee', 'val/ant', 'val/dog')
    with pytest.raises(UserError, match='^split val does not fit: split train lacks these classes: dog$'):
        make_task(config_of(tmp_path)).open()


def test_one_class_is_refused_and_the_message_says_where_the_classes_are(tmp_path):
    write(tmp_path, 'train/images/ant', 'train/images/bee', 'val/images/ant', 'val/images/bee')
    config = config_of(tmp_path)
    with pytest.raises(UserError, match="^split train has one class, 'images', .* with the split train/images$"):
        make_task(config).open()
    config.data.train_split, config.data.eval_split = 'train/images', 'val/images'
    assert make_task(config).open()[1].facts == {'class names': ['ant', 'bee']}
