"""The linear probe: a linear classifier on frozen features.

Optimizer, batch size, schedule and epochs are those of DINO (arXiv:2104.14294, appendix F). Unlike in DINO, images are
not augmented, and the features are standardised.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

EPOCHS = 100
BATCH_SIZE = 1024
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""The peak learning rates for batches of 256 images. One head is trained with each."""
MOMENTUM = 0.9
BLOCK_BYTES = 2**27
"""Maximum size of the features that are sent to the device at once; at least one batch is sent."""

Heads = dict[str, jax.Array]
Scaling = tuple[Float[Array | np.ndarray, ' d'], Float[Array | np.ndarray, ' d']]
"""Mean and standard deviation of each feature."""


class LinearAccuracy(NamedTuple):
    """The accuracy of a head on the evaluated features.

    Attributes:
        learning_rate: the peak learning rate, for batches of 256 images.
        top1, top5: fractions of the features, in [0, 1].
    """

    learning_rate: float
    top1: float
    top5: float


def linear_accuracies(
    train_features: Float[np.ndarray, 'm d'],
    train_labels: Int[np.ndarray, ' m'],
    features: Float[np.ndarray, 'n d'],
    labels: Int[np.ndarray, ' n'],
    *,
    learning_rates: tuple[float, ...] = LEARNING_RATES,
    epochs: int = EPOCHS,
) -> list[LinearAccuracy]:
    """Trains a linear classifier with each learning rate, all on the same batches, and evaluates them.

    The features are standardised with mean and standard deviation of the training features. The heads start at zero.
    SGD has a momentum of 0.9, no weight decay, and a learning rate that falls to 0 as a cosine. An epoch consists of
    full batches of 1,024 features, or of one smaller batch if there are fewer features. The number of the epoch seeds
    their order.

    Args:
        train_features: (M, D) float; they stay in the memory of the host.
        train_labels: (M,) int, the classes of the training features, at least 0.
        features: (N, D) float, the features to classify.
        labels: (N,) int, the classes of the features.
        learning_rates: the peak learning rates, for batches of 256 features.
        epochs: the number of passes over the training features.

    Returns:
        The accuracies, in the order of the learning rates.
    """
    # In float64, because float32 sums over a million features are inexact.
    mean, std = train_features.mean(0, dtype=np.float64), train_features.std(0, dtype=np.float64)
    scaling = (mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32))
    heads = _train(train_features, np.asarray(train_labels, np.int32), scaling, learning_rates, epochs)
    evaluate = jax.jit(_best_classes)
    parts = [
        np.asarray(evaluate(heads, np.asarray(features[start : start + BATCH_SIZE], np.float32), scaling))
        == np.asarray(labels)[start : start + BATCH_SIZE, None, None]
        for start in range(0, len(features), BATCH_SIZE)
    ]
    hits = np.concatenate(parts)
    top1, top5 = hits[..., 0].mean(0), hits.any(-1).mean(0)
    return [LinearAccuracy(*map(float, values)) for values in zip(learning_rates, top1, top5, strict=True)]


def _train(
    features: Float[np.ndarray, 'm d'],
    labels: Int[np.ndarray, ' m'],
    scaling: Scaling,
    learning_rates: tuple[float, ...],
    epochs: int,
) -> Heads:
    """The trained heads: `kernel` (learning rates, D, classes) and `bias` (learning rates, classes)."""
    batch_size = min(BATCH_SIZE, len(features))
    steps = len(features) // batch_size
    block = max(BLOCK_BYTES // (4 * batch_size * features.shape[1]), 1)  # batches
    peaks = jnp.asarray(learning_rates, jnp.float32) * batch_size / 256
    schedule = optax.cosine_decay_schedule(1.0, epochs * steps)
    momentum = optax.trace(MOMENTUM)

    def loss(head: Heads, images: Float[Array, 'n d'], labels: Int[Array, ' n']) -> Float[Array, '']:
        return optax.softmax_cross_entropy_with_integer_labels(_logits(head, images), labels).mean()

    def update(head, trace, peak, images, labels, step):
        direction, trace = momentum.update(jax.grad(loss)(head, images, labels), trace)
        return jax.tree.map(lambda x, change: x - peak * schedule(step) * change, head, direction), trace

    def train_step(state, batch):
        heads, traces, step = state
        images = _standardise(batch[0], scaling)
        heads, traces = jax.vmap(update, (0, 0, 0, None, None, None))(heads, traces, peaks, images, batch[1], step)
        return (heads, traces, step + 1), None

    train_block = jax.jit(lambda state, *batches: jax.lax.scan(train_step, state, batches)[0], donate_argnums=0)
    shape = (len(learning_rates), features.shape[1], int(labels.max()) + 1)
    heads = {'kernel': jnp.zeros(shape), 'bias': jnp.zeros((shape[0], shape[2]))}
    state = (heads, jax.vmap(momentum.init)(heads), jnp.int32(0))
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(len(features))[: steps * batch_size].reshape(steps, -1)
        for start in range(0, steps, block):
            chosen = order[start : start + block]
            batches = (np.asarray(features[chosen], np.float32), labels[chosen])
            jax.block_until_ready(state)  # the host would otherwise send more blocks than the device has used
            state = train_block(state, *batches)
    return state[0]


def _standardise(features: Float[Array, 'n d'], scaling: Scaling) -> Float[Array, 'n d']:
    return (features - scaling[0]) / scaling[1]


def _logits(head: Heads, features: Float[Array, 'n d']) -> Float[Array, 'n classes']:
    return jnp.matmul(features, head['kernel'], precision=jax.lax.Precision.HIGHEST) + head['bias']


def _best_classes(heads: Heads, features: Float[Array, 'n d'], scaling: Scaling) -> Int[Array, 'n rates best']:
    """The five classes with the largest logits, or all if there are fewer: (N, learning rates, 5)."""
    logits = jax.vmap(_logits, (0, None), 1)(heads, _standardise(features, scaling))
    return jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
