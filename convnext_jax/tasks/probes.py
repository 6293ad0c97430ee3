"""Probes: evaluations of the features of a frozen network by simple classifiers on them."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from convnext_jax.data.augment import normalize
from convnext_jax.data.labelled_images import EvalImages, JoinedImages
from convnext_jax.data.relabelling import open_labelled_splits
from convnext_jax.errors import UserError
from convnext_jax.interop import ImageProcessor
from convnext_jax.models.trunk import Trunk
from convnext_jax.probing.features import pooled_features
from convnext_jax.probing.knn import NEIGHBOURS, knn_classes
from convnext_jax.probing.linear import linear_accuracies
from convnext_jax.tasks.task import Batch, Evaluator, Headline, LabelledData, Measured


@dataclasses.dataclass(frozen=True)
class Probe(Evaluator):
    """Base class of the probes. Its data set has the images of a training split, then of an evaluation split.

    Attributes:
        mean, std: mean and standard deviation of each channel, for pixel values in [0, 1].
        train_images: the number of images of the training split.
        norm: whether to apply the last norm of the network, as for `pooled_features`.
        neighbours: the number of neighbours of the k-NN classifier.
        headline: the main metric.
    """

    headline: ClassVar[Headline]
    mean: Sequence[float]
    std: Sequence[float]
    train_images: int
    norm: bool
    neighbours: int = NEIGHBOURS

    def measure(self, model: Trunk, batch: Batch) -> Measured:
        """The features and the label of each image."""
        features = pooled_features(model, normalize(batch['image'], self.mean, self.std), norm=self.norm)
        return Measured(examples={'features': features, 'label': batch['label']})

    def summary(self, measured: Measured) -> dict[str, float]:
        """The accuracy on the evaluation split in percent; NaN if a feature is not finite."""
        features, labels = (np.asarray(measured.examples[name]) for name in ('features', 'label'))
        if not np.isfinite(features).all():
            return {self.headline.name: float('nan')}
        train, evaluation = slice(self.train_images), slice(self.train_images, None)
        return self.accuracy(features[train], labels[train], features[evaluation], labels[evaluation])

    @abc.abstractmethod
    def accuracy(
        self,
        train_features: Float[np.ndarray, 'm d'],
        train_labels: Int[np.ndarray, ' m'],
        features: Float[np.ndarray, 'n d'],
        labels: Int[np.ndarray, ' n'],
    ) -> dict[str, float]:
        """Classifies the features, and returns the metrics by name."""


class KnnProbe(Probe):
    """Classification by the nearest training images."""

    headline = Headline('knn_top1', 'k-NN top-1', ' %')

    def accuracy(self, train_features, train_labels, features, labels):
        hits = knn_classes(train_features, train_labels, features, neighbours=self.neighbours) == labels[:, None]
        return {'knn_top1': 100 * float(hits[:, 0].mean()), 'knn_top5': 100 * float(hits.any(1).mean())}


class LinearProbe(Probe):
    """Linear classification. The metrics are for the learning rate with the best top-1 on the evaluation split."""

    headline = Headline('linear_top1', 'linear top-1', ' %')

    def accuracy(self, train_features, train_labels, features, labels):
        best = max(linear_accuracies(train_features, train_labels, features, labels), key=lambda found: found.top1)
        return {
            'linear_top1': 100 * best.top1,
            'linear_top5': 100 * best.top5,
            'linear_learning_rate': best.learning_rate,
        }


PROBES: dict[str, type[Probe]] = {'knn': KnnProbe, 'linear': LinearProbe}


def open_probe(
    kind: str, data: LabelledData, processor: ImageProcessor, *, norm: bool, neighbours: int = NEIGHBOURS
) -> tuple[JoinedImages, Probe]:
    """Opens a probe and its images. Both splits are preprocessed as in an evaluation, without augmentation.

    Args:
        kind: one of `PROBES`.
        data: the splits.
        processor: the preprocessing.
        norm, neighbours: as for `Probe`.

    Raises:
        UserError: the data set does not exist, or has no labels, only one class, or several labels per image; or
            `neighbours` is below 1 or above the number of training images, for the k-NN probe.
    """
    try:
        train, evaluation, _ = open_labelled_splits(*data)
    except UserError as error:
        raise UserError(f'a probe needs images with labels: {error}') from error
    if kind == 'knn' and not 1 <= neighbours <= len(train):
        raise UserError(
            f'{neighbours} neighbours cannot be chosen among the {len(train)} images of {data.train_split}: choose 1 '
            f'to {len(train)} neighbours, or a larger split'
        )
    mean, std = processor.mean_and_std_of_255()

    def images(source):
        return EvalImages(
            source,
            processor.size,
            len(mean),
            crop_pct=processor.crop_pct,
            squash=processor.squash,
            resample=processor.resample,
        )

    probe = PROBES[kind](mean, std, len(train), norm, neighbours)
    return JoinedImages(images(train), images(evaluation)), probe
