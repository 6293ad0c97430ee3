"""Exact metrics over a whole split: every example counted once, whatever the batch size and the devices."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax

from convnext_jax.data.augment import normalize
from convnext_jax.data.pipeline import Batch
from convnext_jax.models import ConvNeXt, Parameters, with_parameters

Sums = dict[str, jax.Array]


def make_eval_step(
    model: ConvNeXt, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Parameters, Batch], Sums]:
    """Builds the step from parameters and a batch to sums over its examples: `loss`, `top1`, `top5` and `count`."""

    def eval_step(parameters: Parameters, batch: Batch) -> Sums:
        logits = with_parameters(model, parameters)(normalize(batch['image'], mean, std))
        labels, weights = batch['label'], batch['weight']
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        hits = best == labels[:, None]
        # A row that only fills up the batch may hold anything, so it is left out, not multiplied by its weight of 0.
        sums = {'loss': losses, 'top1': hits[:, 0], 'top5': hits.any(1), 'count': jnp.ones_like(losses)}
        return {name: jnp.where(weights > 0, value, 0.0).sum() for name, value in sums.items()}

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
        `loss` (mean cross-entropy), `top1` and `top5` (percent) under each prefix, and `images`, how many there were.
    """
    totals: dict[str, Sums] = {}
    for batch in batches:
        sums = {prefix: eval_step(parameters, batch) for prefix, parameters in weights.items()}
        jax.block_until_ready(totals)  # one batch ahead of the device, no more: the host does not run away
        totals = jax.tree.map(jnp.add, totals, sums) if totals else sums
    fetched = jax.device_get(totals)
    metrics = {}
    for prefix, sums in fetched.items():
        metrics['images'] = int(sums['count'])
        metrics[f'{prefix}loss'] = float(sums['loss']) / metrics['images']
        metrics[f'{prefix}top1'] = 100 * float(sums['top1']) / metrics['images']
        metrics[f'{prefix}top5'] = 100 * float(sums['top5']) / metrics['images']
    return metrics
