"""Exact metrics over a whole split: every example counted once, whatever the batch size and the devices."""

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.data.augment import normalize
from convnext_jax.data.pipeline import Batch
from convnext_jax.models import ConvNeXt, Parameters, with_parameters

Sums = dict[str, jax.Array]

CALIBRATION_BINS = 15  # of equal width, as in arXiv:1706.04599


def make_eval_step(
    model: ConvNeXt,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    judged: Sequence[int] | None = None,
    flip: bool = False,
) -> Callable[[Parameters, Batch], Sums]:
    """Builds the step from parameters and a batch to sums over its examples.

    An example of several labels is right with any of them, and its loss is the least of theirs.

    Args:
        model: the architecture; its own parameters are not used.
        mean, std: of each channel, of pixels in [0, 1].
        judged: the labels to choose among; None for all.
        flip: average the logits with those of the mirrored image.

    Returns:
        Of a batch the sums of `loss`, `top1`, `top5` and `count`; by bins of the confidence `bin_count`, `bin_hits` and
        `bin_confidence`; by (first) label `label_count` and `label_hits`.
    """

    def eval_step(parameters: Parameters, batch: Batch) -> Sums:
        network = with_parameters(model, parameters)
        images = normalize(batch['image'], mean, std)
        logits = network(images)
        if flip:
            logits = (logits + network(images[:, :, ::-1])) / 2
        if judged is not None:
            among = jnp.zeros(logits.shape[-1], bool).at[jnp.asarray(judged)].set(True)
            logits = jnp.where(among, logits, -jnp.inf)
        labels, weights = batch['label'].reshape(len(logits), -1), batch['weight']
        log_shares = jax.nn.log_softmax(logits)
        of_labels = jnp.take_along_axis(log_shares, jnp.maximum(labels, 0), -1, mode='clip')
        losses = -jnp.where(labels >= 0, of_labels, -jnp.inf).max(-1)
        _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        hits = (best[:, :, None] == labels[:, None]).any(-1)
        # A row that only fills up the batch may hold anything, so it is left out, not multiplied by its weight of 0.
        counted = weights > 0
        ones, top1 = jnp.ones_like(losses), hits[:, 0].astype(jnp.float32)
        confidence = jnp.exp(log_shares.max(-1))
        bins = jnp.clip(jnp.ceil(confidence * CALIBRATION_BINS) - 1, 0, CALIBRATION_BINS - 1)

        def total(values: jax.Array) -> jax.Array:
            return jnp.where(counted, values, 0.0).sum()

        def by(groups: jax.Array, count: int, values: jax.Array) -> jax.Array:
            members = (groups[:, None] == jnp.arange(count)) & counted[:, None]
            return jnp.where(members, values[:, None], 0.0).sum(0)

        return {
            'loss': total(losses),
            'top1': total(top1),
            'top5': total(hits.any(1)),
            'count': total(ones),
            'bin_count': by(bins, CALIBRATION_BINS, ones),
            'bin_hits': by(bins, CALIBRATION_BINS, top1),
            'bin_confidence': by(bins, CALIBRATION_BINS, confidence),
            'label_count': by(labels[:, 0], logits.shape[-1], ones),
            'label_hits': by(labels[:, 0], logits.shape[-1], top1),
        }

    return eval_step


def evaluate(
    eval_step: Callable[[Parameters, Batch], Sums], weights: dict[str, Parameters], batches: Iterable[Batch]
) -> dict[str, float]:
    """Evaluates several sets of weights in one pass over the data.

    Args:
        eval_step: as `make_eval_step` builds it, jitted.
        weights: prefix of the metrics' names → parameters, as in {'': raw, 'ema_': ema}.
        batches: all of the split.

    Returns:
        The metrics of `summary` under each prefix, and `images`, how many there were.
    """
    metrics = {}
    for prefix, sums in add_up(eval_step, weights, batches).items():
        metrics['images'] = int(sums['count'])
        metrics |= {f'{prefix}{name}': value for name, value in summary(sums).items()}
    return metrics


def add_up(
    eval_step: Callable[[Parameters, Batch], Sums], weights: dict[str, Parameters], batches: Iterable[Batch]
) -> dict[str, dict[str, np.ndarray]]:
    """The step's sums over all batches for each set of weights; arguments as `evaluate`."""
    totals: dict[str, Sums] = {}
    for batch in batches:
        sums = {prefix: eval_step(parameters, batch) for prefix, parameters in weights.items()}
        jax.block_until_ready(totals)  # one batch ahead of the device, no more: the host does not run away
        totals = jax.tree.map(jnp.add, totals, sums) if totals else sums
    return jax.device_get(totals)


def summary(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean cross-entropy `loss`; `top1`, `top5` and expected calibration error `ece` in percent; 0 of no images."""
    count = max(float(sums['count']), 1)
    gaps = np.abs(sums['bin_hits'].astype(np.float64) - sums['bin_confidence'])
    return {
        'loss': float(sums['loss']) / count,
        'top1': 100 * float(sums['top1']) / count,
        'top5': 100 * float(sums['top5']) / count,
        'ece': 100 * float(gaps.sum()) / count,
    }


def class_accuracies(sums: dict[str, np.ndarray]) -> list[float | None]:
    """Top-1 of each label in percent; None where there was no image of it."""
    pairs = zip(sums['label_hits'], sums['label_count'], strict=True)
    return [100 * float(hits) / float(count) if count else None for hits, count in pairs]
