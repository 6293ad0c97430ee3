"""The linear probe, compared with a training loop in NumPy."""

import numpy as np
import pytest

from convnext_jax.probing import linear
from convnext_jax.probing.linear import linear_accuracies

CLASSES, EPOCHS, RATES = 7, 6, (0.01, 0.3, 30.0)


def examples(seed, count):
    """Features around the centres of the classes. Their scales differ, and one of them is constant."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    centres = np.random.default_rng(9).normal(size=(CLASSES, 6))
    features = (centres[labels] + 0.9 * rng.normal(size=(count, 6))) * (1, 10, 100, 0.1, 1, 0) + 5
    return features.astype(np.float32), labels.astype(np.int32)


TRAIN, QUERIES = examples(0, 70), examples(1, 1500)


def accuracies_in_numpy(batch_size):
    """SGD with momentum and a cosine schedule on the standardised features, for each learning rate alone."""
    mean, std = TRAIN[0].astype(np.float64).mean(0), TRAIN[0].astype(np.float64).std(0)
    std[std == 0] = 1
    images, queries = ((x.astype(np.float64) - mean) / std for x in (TRAIN[0], QUERIES[0]))
    steps = len(images) // batch_size
    results = []
    for rate in RATES:
        head, momentum, step = np.zeros((7, CLASSES)), 0, 0
        for epoch in range(EPOCHS):
            order = np.random.default_rng(epoch).permutation(len(images))
            for batch in np.split(order[: steps * batch_size], steps):
                x = np.column_stack([images[batch], np.ones(batch_size)])
                exponentials = np.exp(x @ head - (x @ head).max(1, keepdims=True))
                errors = exponentials / exponentials.sum(1, keepdims=True) - np.eye(CLASSES)[TRAIN[1][batch]]
                momentum = 0.9 * momentum + x.T @ errors / batch_size
                cosine = (1 + np.cos(np.pi * step / (EPOCHS * steps))) / 2
                head = head - rate * batch_size / 256 * cosine * momentum
                step += 1
        best = np.argsort(-(np.column_stack([queries, np.ones(len(queries))]) @ head), axis=1)
        hits = best[:, :5] == QUERIES[1][:, None]
        results.append((rate, hits[:, 0].mean(), hits.any(1).mean()))
    return results


@pytest.mark.parametrize(('batch_size', 'block'), [(16, 1), (16, 2**27), (1024, 2**27)])
def test_accuracies_equal_numpy(batch_size, block, monkeypatch):
    """The probe would train in another way than documented, or its heads would affect each other."""
    monkeypatch.setattr(linear, 'BATCH_SIZE', batch_size)
    monkeypatch.setattr(linear, 'BLOCK_BYTES', block)
    expected = accuracies_in_numpy(min(batch_size, len(TRAIN[0])))
    assert len({top1 for _, top1, _ in expected}) == 3, 'each learning rate gives another accuracy'
    found = linear_accuracies(*TRAIN, *QUERIES, learning_rates=RATES, epochs=EPOCHS)
    assert found == [tuple(map(pytest.approx, row)) for row in expected]


def test_two_classes():
    """Top-5 of two classes would end in an error."""
    train, queries = ((features, labels % 2) for features, labels in (TRAIN, QUERIES))
    (found,) = linear_accuracies(*train, *queries, learning_rates=(0.1,), epochs=1)
    assert found.top5 == 1
