"""Image classification: cross-entropy with smoothed labels, mixup and cutmix."""

import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from convnext_jax.data.augment import augment
from convnext_jax.data.dataset import Features
from convnext_jax.data.labelled_images import EvalImages, TrainImages, image_features
from convnext_jax.data.mixing import mix
from convnext_jax.data.sources import (
    Source,
    check_has_classes,
    open_source,
    with_classes_of_model,
    with_classes_of_split,
)
from convnext_jax.errors import UserError
from convnext_jax.models import ConvNeXt
from convnext_jax.tasks.task import Batch, Headline, Loss, Task


class Classification(Task):
    """One label to an image.

    A batch holds `image` (N, H, W, C) uint8 and `label` (N,) int32; augmented, `image` is float and normalised, and
    `target` (N, classes) takes the label's place.
    """

    headline = Headline('top1', 'top-1', ' %')

    @property
    def channels(self) -> int:
        """Of the images."""
        return len(self.config.data.mean)

    @property
    def features(self) -> Features:
        return image_features(self.config.data.image_size, self.channels)

    def open(self) -> tuple[TrainImages, EvalImages]:
        """Opens both splits, with the labels that the training split gives the classes; sets `model.num_classes`.

        Warns if the evaluation split lacks a class.

        Raises:
            UserError: as `open_source`; the training split has one class, several labels to an image, or more classes
                than `model.num_classes`; or the evaluation split has a class that it lacks.
        """
        data = self.config.data
        train = open_source(data.name, data.dir, data.train_split)
        evaluation = open_source(data.name, data.dir, data.eval_split)
        if train.many_labels:
            raise UserError(f'{data.name} has images of several labels or none: it is for evaluation')
        check_has_classes(train, f'split {data.train_split}')
        classes = len(train.class_names)
        missing = classes - len(evaluation.class_names)
        try:
            evaluation = with_classes_of_split(evaluation, train, data.train_split)
        except UserError as error:
            raise UserError(f'split {data.eval_split} does not fit: {error}') from error
        if missing:
            _warn(f'{missing} of {classes} classes are not in split {data.eval_split}')
        self._set_classes(classes)
        images = TrainImages(train, data.image_size, self.channels, crop_scale=data.crop_scale, exact=data.exact)
        return images, self._eval_images(evaluation)

    def _set_classes(self, classes: int) -> None:
        """Sets `model.num_classes` to the data set's if it is 0."""
        model = self.config.model
        if model.num_classes == 0:
            model.num_classes = classes
        elif model.num_classes < classes:
            raise UserError(
                f'model.num_classes={model.num_classes}, but {self.config.data.name} has {classes} classes: '
                f'give {classes}, or 0 for as many as there are'
            )

    def open_split(self, name: str, split: str, facts: Mapping[str, object]) -> EvalImages:
        """Opens a split with the labels of the network's outputs, matched by class name; warns of what is trusted.

        Raises:
            UserError: as `open_source` and `with_classes_of_model`.
        """
        try:
            source = open_source(name, self.config.data.dir, split)
            names, outputs = facts.get('class names'), self.config.model.num_classes
            source, note = with_classes_of_model(source, names, outputs)
        except UserError as error:
            raise UserError(f'{name} {split}: {error}') from error
        if note:
            _warn(f'{name} {split}: {note}')
        return self._eval_images(source)

    def _eval_images(self, source: Source) -> EvalImages:
        data = self.config.data
        return EvalImages(source, data.image_size, self.channels, crop_pct=data.crop_pct)

    def augment(self, batch: Batch, keys: jax.Array, batch_key: jax.Array, epoch: jax.Array) -> Batch:
        """Augments each image by its key, and mixes images and targets until `config.mix.off_epoch`."""
        config = self.config
        images = augment(batch['image'], keys, mean=config.data.mean, std=config.data.std, **config.augment)
        one_hot = jax.nn.one_hot(batch['label'], config.model.num_classes)
        targets = optax.smooth_labels(one_hot, config.label_smoothing)
        if config.mix.mixup or config.mix.cutmix:
            images, targets = mix(
                images,
                targets,
                batch_key,
                mixup=config.mix.mixup,
                cutmix=config.mix.cutmix,
                mode=config.mix.mode,
                on=epoch < config.mix.off_epoch if config.mix.off_epoch else True,
            )
        return {'image': images, 'target': targets}

    def loss(self, model: ConvNeXt, batch: Batch, keys: jax.Array) -> Loss:
        """The cross-entropy of each example, with weight 1."""
        losses = optax.softmax_cross_entropy(model(batch['image'], key=keys), batch['target'])
        return Loss(losses.sum(), jnp.float32(losses.size))


def _warn(line: str) -> None:
    """Warns once, whatever the number of processes."""
    if jax.process_index() == 0:
        warnings.warn(line, stacklevel=3)
