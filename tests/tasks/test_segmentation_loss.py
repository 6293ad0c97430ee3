"""The loss of segmentation, against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.models.upernet import HeadLogits, resize
from convnext_jax.tasks.segmentation_loss import segmentation_loss
from tests.reference import draw, draw_bytes

LOGITS = HeadLogits(jnp.asarray(draw('main', (3, 4, 6, 5))), jnp.asarray(draw('auxiliary', (3, 2, 3, 5))))
LABELS = np.where(draw_bytes('labels', (3, 16, 24), 6) == 5, 255, draw_bytes('labels', (3, 16, 24), 6))


def expected_sum(logits, labels):
    """The sum over all pixels that are not ignored."""
    large = np.asarray(resize(logits, labels.shape[1:]), np.float64)
    log_probabilities = large - np.log(np.exp(large).sum(-1, keepdims=True))
    known = labels != 255
    return -np.take_along_axis(log_probabilities, np.where(known, labels, 0)[..., None], -1)[known].sum()


@pytest.mark.parametrize('average', ['all', 'labelled'])
def test_the_loss_of_both_heads(average):
    """Sparsely labelled images would weigh more or less than in the published training."""
    total, weight, terms = jax.jit(lambda logits: segmentation_loss(logits, LABELS, average=average))(LOGITS)
    main, auxiliary = (expected_sum(logits, LABELS) for logits in LOGITS)
    np.testing.assert_allclose(total, main + 0.4 * auxiliary, rtol=1e-5)
    np.testing.assert_allclose(terms['auxiliary_loss'], auxiliary, rtol=1e-5)
    assert weight == (LABELS.size if average == 'all' else (LABELS != 255).sum())


def test_parts_of_a_batch_add_up():
    """The loss would depend on the number of devices."""
    whole = segmentation_loss(LOGITS, LABELS, average='labelled')
    parts = [
        segmentation_loss(jax.tree.map(lambda x, n=n: x[n : n + 1], LOGITS), LABELS[n : n + 1], average='labelled')
        for n in range(3)
    ]
    summed = jax.tree.map(lambda *values: sum(values), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), summed, whole)


def test_a_network_without_auxiliary_head_and_another_ignored_label():
    """Masks with another ignored value would train on it as a class."""
    labels = np.where(LABELS == 255, 3, LABELS)
    total, _, terms = segmentation_loss(HeadLogits(LOGITS.main, None), labels, average='all', ignored=3)
    np.testing.assert_allclose(total, expected_sum(LOGITS.main, np.where(labels == 3, 255, labels)), rtol=1e-5)
    assert terms == {}


def test_a_label_beyond_the_classes_is_not_silent():
    """A wrong list of classes would train without an error."""
    labels = LABELS.copy()
    labels[1, 2, 3] = 5
    assert np.isnan(segmentation_loss(LOGITS, labels, average='all').total)


def test_the_memory_does_not_grow_with_the_batch():
    """16 × 512² logits of 150 classes take 2.5 GB, and as much again for the gradient."""

    def temporary(images):
        logits = jax.ShapeDtypeStruct((images, 8, 8, 64), jnp.float32)
        labels = jax.ShapeDtypeStruct((images, 64, 64), jnp.int32)
        gradient = jax.grad(lambda x, y: segmentation_loss(HeadLogits(x, None), y, average='all').total)
        return jax.jit(gradient).lower(logits, labels).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < 1.3 * temporary(2)
