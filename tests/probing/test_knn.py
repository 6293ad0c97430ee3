"""k-NN classification, compared with NumPy."""

import numpy as np
import pytest

from convnext_jax.errors import UserError
from convnext_jax.probing import knn
from convnext_jax.probing.knn import knn_accuracy, knn_classes

CLASSES = 7


def examples(seed, count):
    """Features of different norms around the centres of the classes, and the classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    centres = np.random.default_rng(9).normal(size=(CLASSES, 6))
    features = (centres[labels] + 1.5 * rng.normal(size=(count, 6))) * rng.uniform(0.1, 9, (count, 1))
    return features.astype(np.float32), labels


TRAIN, QUERIES = examples(0, 130), examples(1, 41)


def classes_in_numpy(neighbours, temperature):
    units = [x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (TRAIN[0], QUERIES[0])]
    similarities = units[1] @ units[0].T
    best = []
    for row in similarities:
        nearest = np.argsort(-row)[:neighbours]
        votes = np.zeros(CLASSES)
        for index in nearest:
            votes[TRAIN[1][index]] += np.exp(row[index] / temperature)
        best.append(np.argsort(-votes, kind='stable'))
    return np.asarray(best)


@pytest.mark.parametrize('chunks', [(2**16, 1024), (32, 16), (1, 1)])
@pytest.mark.parametrize(('neighbours', 'temperature'), [(20, 0.07), (1, 0.07), (130, 0.5)])
def test_classes_equal_numpy_for_any_chunks(neighbours, temperature, chunks, monkeypatch):
    """The accuracy would differ from DINO's protocol, or depend on how many features fit on the device."""
    monkeypatch.setattr(knn, 'TRAIN_CHUNK', chunks[0])
    monkeypatch.setattr(knn, 'CHUNK', chunks[1])
    expected = classes_in_numpy(neighbours, temperature)
    found = knn_classes(*TRAIN, QUERIES[0], neighbours=neighbours, temperature=temperature)
    np.testing.assert_array_equal(found, expected[:, :5])
    accuracy = knn_accuracy(*TRAIN, *QUERIES, neighbours=neighbours, temperature=temperature)
    assert accuracy == np.mean(expected[:, 0] == QUERIES[1])
    assert 0.3 < accuracy < 1


def test_a_low_temperature_takes_the_nearest_neighbour():
    """exp(1 / temperature) would overflow, and all votes would be infinite."""
    found = knn_classes(*TRAIN, QUERIES[0], neighbours=20, temperature=1e-4)
    np.testing.assert_array_equal(found[:, 0], knn_classes(*TRAIN, QUERIES[0], neighbours=1)[:, 0])


def test_fewer_classes_than_requested():
    """Top-5 of two classes would end in an error."""
    train = (TRAIN[0], TRAIN[1] % 2)
    assert knn_classes(*train, QUERIES[0]).shape == (len(QUERIES[0]), 2)


@pytest.mark.parametrize('neighbours', [0, 131])
def test_more_neighbours_than_training_images_are_refused(neighbours):
    """The error would come from inside JAX."""
    with pytest.raises(UserError, match=f'{neighbours} neighbours cannot be chosen among 130 training images'):
        knn_accuracy(*TRAIN, *QUERIES, neighbours=neighbours)
