"""Evaluation of classifiers: top-1, top-5, cross-entropy, calibration error, and the accuracy of each class."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, Shaped

from convnext_jax.data.augment import normalize
from convnext_jax.models import ConvNeXt
from convnext_jax.tasks.task import Batch, Evaluator, Measured

CALIBRATION_BINS = 15  # bins of equal width, as in arXiv:1706.04599


@dataclasses.dataclass(frozen=True)
class Accuracy(Evaluator):
    """Evaluates logits against labels.

    If an image has several labels, a prediction of any of them is correct, and its loss is the smallest loss of all its
    labels.

    Attributes:
        mean, std: mean and standard deviation of each channel, for pixel values in [0, 1].
        class_names: names of the first outputs.
        eval_classes: the outputs that are compared; None for all. The other outputs are masked with −∞.
        flip: whether to average the logits of each image and its mirror image.
    """

    mean: Sequence[float]
    std: Sequence[float]
    class_names: Sequence[str] = ()
    eval_classes: Sequence[int] | None = None
    flip: bool = False

    def measure(self, model: ConvNeXt, batch: Batch) -> Measured:
        """Measures a batch.

        Args:
            model: a classifier.
            batch: `image` (N, H, W, C), as for `normalize`; `label` (N,) or (N, labels) int32, padded with −1; `weight`
                (N,).

        Returns:
            Float32 sums over the examples with weight above 0. Scalars: `loss`, `top1`, `top5`, `count`. One value for
            each bin of the confidence: `bin_count`, `bin_hits`, `bin_confidence`. One value for each output, counted by
            the first label of an image: `label_count`, `label_hits`.
        """
        images = normalize(batch['image'], self.mean, self.std)
        logits = model(images)
        if self.flip:
            logits = (logits + model(images[:, :, ::-1])) / 2
        if self.eval_classes is not None:
            allowed = jnp.zeros(logits.shape[-1], bool).at[jnp.asarray(self.eval_classes)].set(True)
            logits = jnp.where(allowed, logits, -jnp.inf)
        labels, weights = batch['label'].reshape(len(logits), -1), batch['weight']
        log_probabilities = jax.nn.log_softmax(logits)
        losses = _smallest_losses(log_probabilities, labels)
        _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        hits = (best[:, :, None] == labels[:, None]).any(-1)
        # Padding may produce NaN, so it is masked: NaN times a weight of 0 would be NaN.
        counted = weights > 0
        ones, top1 = jnp.ones_like(losses), hits[:, 0].astype(jnp.float32)
        confidence = jnp.exp(log_probabilities.max(-1))
        bins = jnp.clip(jnp.ceil(confidence * CALIBRATION_BINS) - 1, 0, CALIBRATION_BINS - 1)

        def total(values: Shaped[Array, ' n']) -> Float[Array, '']:
            return jnp.where(counted, values, 0.0).sum()

        def by(groups: Num[Array, ' n'], count: int, values: Float[Array, ' n']) -> Float[Array, ' {count}']:
            members = (groups[:, None] == jnp.arange(count)) & counted[:, None]
            return jnp.where(members, values[:, None], 0.0).sum(0)

        return Measured(
            {
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
        )

    def summary(self, measured: Measured) -> dict[str, float]:
        """The metrics of a split: mean cross-entropy `loss`; `top1`, `top5` and calibration error `ece` in percent."""
        sums = measured.sums
        count = max(float(sums['count']), 1)
        gaps = np.abs(sums['bin_hits'] - sums['bin_confidence'])
        return {
            'loss': float(sums['loss']) / count,
            'top1': 100 * float(sums['top1']) / count,
            'top5': 100 * float(sums['top5']) / count,
            'ece': 100 * float(gaps.sum()) / count,
        }

    def table(self, measured: Measured) -> list[dict[str, object]]:
        """The top-1 accuracy of each class in percent; None if the split has no image of the class."""
        counts, hits = measured.sums['label_count'], measured.sums['label_hits']
        return [
            {'label': label, 'class': name, 'top1': 100 * float(hits[label] / counts[label]) if counts[label] else None}
            for label, name in enumerate(self.class_names)
        ]


def _smallest_losses(
    log_probabilities: Float[Array, 'n classes'], labels: Int[Array, 'n labels']
) -> Float[Array, ' n']:
    """The smallest cross-entropy of all labels of each image. A label of −1 is padding."""
    of_labels = jnp.take_along_axis(log_probabilities, jnp.maximum(labels, 0), -1, mode='clip')
    return -jnp.where(labels >= 0, of_labels, -jnp.inf).max(-1)
