"""Evaluation of semantic segmentation: the mean intersection over union (mIoU), and the accuracy of pixels."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from convnext_jax.data.mask_classes import IGNORED
from convnext_jax.models import UPerNet
from convnext_jax.tasks.sliding_windows import NOT_FINITE, SlidingWindows
from convnext_jax.tasks.task import Batch, Evaluator, Measured


@dataclasses.dataclass(frozen=True)
class MeanIoU(Evaluator):
    """Compares the predicted class of each labelled pixel of whole images with its label, at the original size.

    Attributes:
        windows: predicts the classes.
        class_names: names of the first classes of the network; the others are called 'class 7', for example.
    """

    windows: SlidingWindows
    class_names: Sequence[str] = ()

    def measure(self, model: UPerNet, batch: Batch) -> Measured:
        """Measures a batch, image by image.

        Args:
            model: the network.
            batch: the features of `EvalMasks`, and `weight` (N,).

        Returns:
            Sums over the examples with weight above 0: `confusion`, (classes, classes) int32, the number of pixels of
            each label (row) and predicted class (column), without ignored pixels; `padded_images`, the number of images
            that are smaller than a window in height or width; and `not_finite`, the number of labelled pixels whose
            logits are NaN or infinite.
        """

        def of_image(example: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
            counted = example['weight'] > 0
            size, label_size = (jnp.where(counted, example[name], 0) for name in ('image_size', 'label_size'))
            label = example['label']
            predicted = self.windows.classes(model, example['image'], size, label_size, label.shape)
            rows, columns = (jnp.arange(side) for side in label.shape)
            label = jnp.where((rows[:, None] < label_size[0]) & (columns < label_size[1]), label, IGNORED)
            padded = counted & (size < self.windows.crop).any()
            not_finite = ((label != IGNORED) & (predicted == NOT_FINITE)).sum()
            return confusion_matrix(label, predicted, model.num_classes), padded, not_finite

        names = ('image', 'image_size', 'label', 'label_size', 'weight')
        confusions, padded, not_finite = jax.lax.map(of_image, {name: batch[name] for name in names})
        return Measured({'confusion': confusions.sum(0), 'padded_images': padded.sum(), 'not_finite': not_finite.sum()})

    def summary(self, measured: Measured) -> dict[str, float]:
        """The metrics of a split in percent.

        `miou` is the mean IoU over the classes that occur among the labels or the predictions, `macc` the mean accuracy
        over the classes that occur among the labels, and `aacc` the accuracy over all labelled pixels. All are NaN if
        no pixel has a label, or if logits are NaN or infinite. `padded_images` is the number of images that are smaller
        than a window, if any.
        """
        confusion = np.asarray(measured.sums['confusion'])
        if measured.sums['not_finite']:
            confusion = np.full(confusion.shape, np.nan)
        iou, accuracy, labelled = class_scores(confusion)
        with np.errstate(invalid='ignore'):
            values = {
                'miou': mean_of_known(iou),
                'macc': mean_of_known(accuracy),
                'aacc': 100 * float(np.trace(confusion) / labelled.sum()),
            }
        padded = float(measured.sums['padded_images'])
        return values | ({'padded_images': padded} if padded else {})

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
