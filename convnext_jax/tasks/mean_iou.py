"""Evaluation of semantic segmentation: the mean intersection over union (mIoU), and the accuracy of pixels."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from convnext_jax.data.mask_classes import IGNORED
from convnext_jax.data.segmentation import view_features
from convnext_jax.models import UPerNet
from convnext_jax.tasks.pixel_classes import NOT_FINITE, PixelClasses, View
from convnext_jax.tasks.task import Batch, Evaluator, Measured, warn_on_main_process


@dataclasses.dataclass(frozen=True)
class MeanIoU(Evaluator):
    """Compares the predicted class of each labelled pixel of whole images with its label, at the original size.

    Attributes:
        predict: predicts the classes.
        class_names: names of the first classes of the network; the others are called 'class 7', for example.
        views: number of views of each image.
    """

    predict: PixelClasses
    class_names: Sequence[str] = ()
    views: int = 1

    def measure(self, model: UPerNet, batch: Batch) -> Measured:
        """Measures a batch, image by image.

        Args:
            model: the network.
            batch: the features of `EvalMasks`, and `weight` (N,).

        Returns:
            Sums over the examples with weight above 0: `confusion`, (classes, classes) int32, the number of pixels of
            each label (row) and predicted class (column), without ignored pixels; and `not_finite`, the number of
            labelled pixels whose logits are NaN or infinite.
        """

        def of_image(example: Batch) -> tuple[jax.Array, jax.Array]:
            counted, label = example['weight'] > 0, example['label']
            label_size = jnp.where(counted, example['label_size'], 0)
            views = [View(image, jnp.where(counted, size, 0)) for image, size in views_of(example, self.views)]
            predicted = self.predict(model, views, label_size, label.shape)
            rows, columns = (jnp.arange(side) for side in label.shape)
            label = jnp.where((rows[:, None] < label_size[0]) & (columns < label_size[1]), label, IGNORED)
            not_finite = ((label != IGNORED) & (predicted == NOT_FINITE)).sum()
            return confusion_matrix(label, predicted, model.num_classes), not_finite

        names = ['label', 'label_size', 'weight', *(name for view in range(self.views) for name in view_features(view))]
        confusions, not_finite = jax.lax.map(of_image, {name: batch[name] for name in names})
        return Measured({'confusion': confusions.sum(0), 'not_finite': not_finite.sum()})

    def summary(self, measured: Measured) -> dict[str, float]:
        """The metrics of a split in percent.

        `miou` is the mean IoU over the classes that occur among the labels or the predictions, `macc` the mean accuracy
        over the classes that occur among the labels, and `aacc` the accuracy over all labelled pixels. All are NaN if
        logits are NaN or infinite, or if no pixel has a label, which a warning explains.
        """
        confusion = np.asarray(measured.sums['confusion'])
        if measured.sums['not_finite']:
            confusion = np.full(confusion.shape, np.nan)
        elif not confusion.any():
            warn_on_main_process(
                'no pixel of the evaluated masks has a class, so there is no mIoU: evaluate other masks, or correct '
                'data.reduce_zero_label'
            )
        iou, accuracy, labelled = class_scores(confusion)
        with np.errstate(invalid='ignore'):
            return {
                'miou': mean_of_known(iou),
                'macc': mean_of_known(accuracy),
                'aacc': 100 * float(np.trace(confusion) / labelled.sum()),
            }

    def table(self, measured: Measured) -> list[dict[str, object]]:
        """IoU, accuracy in percent and number of labelled pixels of each class; None for a value that is undefined."""
        scores = class_scores(np.asarray(measured.sums['confusion']))
        names = [*self.class_names, *(f'class {label}' for label in range(len(self.class_names), len(scores[0])))]
        return [
            {
                'label': label,
                'class': names[label],
                'iou': None if np.isnan(iou) else float(iou),
                'accuracy': None if np.isnan(accuracy) else float(accuracy),
                'pixels': int(pixels),
            }
            for label, (iou, accuracy, pixels) in enumerate(zip(*scores, strict=True))
        ]


def views_of(example: Batch, count: int) -> list[View]:
    """The views of an example of `EvalMasks`."""
    return [View(*(example[name] for name in view_features(view))) for view in range(count)]


def confusion_matrix(
    labels: UInt8[Array, 'h w'], predicted: UInt8[Array, 'h w'], classes: int
) -> Int[Array, '{classes} {classes}']:
    """The number of pixels of each label (row) and predicted class (column), int32.

    Pixels without a label and pixels whose prediction is `NOT_FINITE` do not count: their index is out of bounds.
    """
    known = (labels < classes) & (predicted < classes)
    pairs = jnp.where(known, labels.astype(jnp.int32) * classes + predicted, classes**2)
    counts = jnp.zeros(classes**2, jnp.int32).at[pairs.reshape(-1)].add(1, mode='drop')
    return counts.reshape(classes, classes)


def class_scores(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """IoU and accuracy of each class in percent, NaN if undefined, and the number of its labelled pixels."""
    correct, labelled, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid='ignore'):
        return 100 * correct / (labelled + predicted - correct), 100 * correct / labelled, labelled


def mean_of_known(values: np.ndarray) -> float:
    """The mean of the values that are not NaN; NaN if there is none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float('nan')
