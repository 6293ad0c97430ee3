"""The benchmark with few labels: the choice of labelled images, and its results from given accuracies."""

import json

import numpy as np
from PIL import Image

from benchmarks import few_labels, tables
from convnext_jax.config import check_values
from convnext_jax.data.sources import open_source
from convnext_jax.models.variants import VARIANTS


def test_each_class_has_as_many_labelled_images(tmp_path, monkeypatch):
    """The accuracies would not be comparable, or training images would be among the test images."""
    for seed in (0, 1):
        few_labels.write_labelled_images(tmp_path, seed)
    first, second = (open_source('folder', str(tmp_path), f'labelled_{seed}') for seed in (0, 1))
    assert np.bincount([label for _, label in first.files]).tolist() == [10] * 10
    assert {first[i].image for i in range(100)} != {second[i].image for i in range(100)}
    test = open_source('folder', str(tmp_path), 'test')
    assert len(test) == 1000
    assert not {first[i].image for i in range(100)} & {test[i].image for i in range(1000)}
    monkeypatch.setitem(VARIANTS, few_labels.MODEL, few_labels.VARIANT)
    check_values(few_labels.pretraining_config())
    check_values(few_labels.fine_tuning_config(tmp_path, 0, 1e-3, 'weights'))


def test_results_become_a_measurement_and_two_pictures(tmp_path):
    """The command would fail after minutes of training, when it writes its results."""
    figures = tmp_path / 'pretrained' / 'figures'
    figures.mkdir(parents=True)
    Image.new('RGB', (3 * 64, 16 * 64)).save(figures / 'reconstructions.png')
    top1 = {
        (start, rate): [70.0 + rate, 71.0, 72.04] for rate in few_labels.LEARNING_RATES for start in few_labels.STARTS
    }
    few_labels.write_results(tmp_path, top1, [(0, 50.0), (1, 60.06)])
    measurement = json.loads((tmp_path / 'few_labels.json').read_text())
    assert measurement.keys() == json.loads((tables.MEASUREMENTS / 'demo.json').read_text()).keys()
    row = {'start': 'from scratch', 'learning_rate': 1e-3, 'mean': 71.0, 'least': 70.0, 'most': 72.0}
    assert row in measurement['results']
    assert measurement['results'][-1] == {'epoch': 1, 'knn': 60.1}
    assert Image.open(tmp_path / 'few_labels.png').size == (800, 320)
    assert Image.open(tmp_path / 'reconstructions.png').size == (6 * 64, 4 * 64)
