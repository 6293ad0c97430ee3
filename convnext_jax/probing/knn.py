"""k-NN classification of features, as in InstDisc (arXiv:1805.01978) and DINO (arXiv:2104.14294)."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from convnext_jax.errors import UserError

NEIGHBOURS, TEMPERATURE = 20, 0.07
TRAIN_CHUNK = 2**16
"""Number of training features on the device at once. The features of all ImageNet images would need up to 15 GB."""
CHUNK = 1024
"""Number of features that one call compares with a chunk of the training features."""


def knn_accuracy(
    train_features: Float[np.ndarray, 'm d'],
    train_labels: Int[np.ndarray, ' m'],
    features: Float[np.ndarray, 'n d'],
    labels: Int[np.ndarray, ' n'],
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> float:
    """The top-1 accuracy of `knn_classes`, in [0, 1].

    Args:
        train_features, train_labels, features, neighbours, temperature: as for `knn_classes`.
        labels: (N,) the classes of the features.

    Raises:
        UserError: as for `knn_classes`.
    """
    classes = knn_classes(
        train_features, train_labels, features, count=1, neighbours=neighbours, temperature=temperature
    )
    return float(np.mean(classes[:, 0] == labels))


def knn_classes(
    train_features: Float[np.ndarray, 'm d'],
    train_labels: Int[np.ndarray, ' m'],
    features: Float[np.ndarray, 'n d'],
    *,
    count: int = 5,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Int[np.ndarray, 'n classes']:
    """The classes with the most votes among the nearest neighbours of each feature, in descending order.

    A neighbour with cosine similarity s votes for its class with weight exp(s / temperature).

    Args:
        train_features: (M, D) float, the features among which neighbours are searched. They stay in the memory of the
            host, and are sent to the device in chunks.
        train_labels: (M,) int, the classes of the training features, at least 0.
        features: (N, D) float, the features to classify.
        count: the number of classes to return. If there are fewer classes, all are returned.
        neighbours: the number of neighbours that vote.
        temperature: the temperature of the votes, above 0.

    Returns:
        (N, count) int32. Classes without votes come last. Of classes with equal votes, the lowest comes first.

    Raises:
        UserError: `neighbours` is below 1 or above the number of training features.
    """
    if not 1 <= neighbours <= len(train_features):
        raise UserError(
            f'{neighbours} neighbours cannot be chosen among {len(train_features)} training images: take 1 to '
            f'{len(train_features)} neighbours, or more images'
        )
    similarities, labels = _nearest(train_features, np.asarray(train_labels, np.int32), features, neighbours)
    classes = int(np.max(train_labels)) + 1
    votes = jax.jit(_votes, static_argnums=(2, 3, 4))
    parts = [
        np.asarray(votes(similarities[part], labels[part], temperature, classes, min(count, classes)))
        for part in _slices(len(features), CHUNK)
    ]
    return np.concatenate(parts)


def _nearest(
    train_features: Float[np.ndarray, 'm d'],
    train_labels: Int[np.ndarray, ' m'],
    features: Float[np.ndarray, 'n d'],
    neighbours: int,
) -> tuple[Float[np.ndarray, 'n {neighbours}'], Int[np.ndarray, 'n {neighbours}']]:
    """The cosine similarities of the nearest neighbours, in descending order, and their classes: two of (N, k)."""
    # Initial values with similarity −∞, which training features replace.
    similarities = np.full((len(features), neighbours), -np.inf, np.float32)
    labels = np.zeros((len(features), neighbours), np.int32)
    closer = jax.jit(_closer)
    for train_part in _slices(len(train_features), TRAIN_CHUNK):
        chunk = jax.device_put((np.asarray(train_features[train_part], np.float32), train_labels[train_part]))
        chunk = (_unit(chunk[0]), chunk[1])
        pending = [
            (part, closer(*chunk, np.asarray(features[part], np.float32), similarities[part], labels[part]))
            for part in _slices(len(features), CHUNK)
        ]
        for part, (found, classes) in pending:
            similarities[part], labels[part] = found, classes
    return similarities, labels


def _closer(
    train_features: Float[Array, 'm d'],
    train_labels: Int[Array, ' m'],
    features: Float[Array, 'n d'],
    similarities: Float[Array, 'n k'],
    labels: Int[Array, 'n k'],
) -> tuple[Float[Array, 'n k'], Int[Array, 'n k']]:
    """Replaces neighbours by closer training features, and returns their similarities and classes: two of (N, k)."""
    new = jnp.matmul(_unit(features), train_features.T, precision=jax.lax.Precision.HIGHEST)
    neighbours = similarities.shape[1]
    new, positions = jax.lax.top_k(new, min(neighbours, new.shape[1]))
    similarities = jnp.concatenate([similarities, new], 1)
    labels = jnp.concatenate([labels, train_labels[positions]], 1)
    best, positions = jax.lax.top_k(similarities, neighbours)
    return best, jnp.take_along_axis(labels, positions, 1)


def _unit(features: Float[Array, 'n d']) -> Float[Array, 'n d']:
    """The features divided by their L2 norm. Vectors of zeros do not change."""
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def _votes(
    similarities: Float[Array, 'n k'],
    labels: Int[Array, 'n k'],
    temperature: float,
    classes: int,
    count: int,
) -> Int[Array, 'n {count}']:
    """The `count` classes with the most votes: (N, count) int32."""
    # Similarities are relative to the nearest neighbour, because exp(1 / temperature) may overflow.
    weights = jnp.exp((similarities - similarities[:, :1]) / temperature)
    votes = jnp.zeros((len(labels), classes)).at[jnp.arange(len(labels))[:, None], labels].add(weights)
    return jax.lax.top_k(votes, count)[1]


def _slices(length: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` positions that cover a length."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
