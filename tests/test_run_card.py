"""The part of a model card about a run."""

import json

import pytest

from convnext_jax.checkpoints.workdir import CONFIG, CURVES, METRICS
from convnext_jax.config import as_dict
from convnext_jax.configs.fashion_mnist import get_config
from convnext_jax.run_card import run_section


@pytest.fixture
def workdir(tmp_path):
    """A workdir with the records of two evaluations."""
    config = get_config()
    config.data.dir, config.init.weights = 'photographs', 'timm/convnext_tiny.in12k'
    records = [
        {'step': 8, 'epoch': 1.0, 'split': 'train', 'loss': 1.5},
        {'step': 8, 'epoch': 1.0, 'split': 'test', 'top1': 60.0, 'images': 40},
        {'step': 1200, 'epoch': 2.0, 'split': 'test', 'top1': 70.123456789, 'images': 40},
    ]
    (tmp_path / CONFIG).write_text(json.dumps(as_dict(config)))
    (tmp_path / METRICS).write_text('\n'.join(map(json.dumps, records)))
    return tmp_path


def test_a_card_has_the_data_start_and_newest_metrics_of_the_run(workdir):
    """Others could not judge the weights, or train them again."""
    (workdir / CURVES).write_bytes(b'png')
    section = run_section(workdir)
    assert 'on `fashion_mnist_mini`: 1,200 steps of 64 images, starting from the weights timm/convnext' in section
    assert '| test | 1,200 | top1 | 70.1235 |\n| test | 1,200 | images | 40 |' in section
    assert 'top1 | 60' not in section
    assert '![loss and metrics](curves.png)' in section


def test_the_config_in_a_card_has_no_local_paths(workdir):
    """An upload would publish the names of the user's folders."""
    section = run_section(workdir)
    config = json.loads(section.split('```')[1].removeprefix('json'))
    assert config['data']['name'] == 'fashion_mnist_mini'
    assert 'dir' not in config['data']
    assert 'weights' not in config['init']
    assert CURVES not in section


def test_a_run_that_starts_from_local_weights_does_not_name_their_path(workdir):
    """The folder of the starting weights would be published."""
    config = json.loads((workdir / CONFIG).read_text())
    config['init']['weights'] = str(workdir)
    (workdir / CONFIG).write_text(json.dumps(config))
    section = run_section(workdir)
    assert 'starting from other weights.' in section
    assert str(workdir) not in section
