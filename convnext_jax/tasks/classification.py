"""Image classification: cross-entropy with smoothed labels, mixup and cutmix."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from PIL import Image

from convnext_jax.data.augment import augment
from convnext_jax.data.class_names import kept_outputs
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
from convnext_jax.fields import Fields
from convnext_jax.interop import ImageProcessor, Pretrained
from convnext_jax.models import ConvNeXt, Execution, Variant, Weights, get_variant
from convnext_jax.tasks.accuracy import Accuracy
from convnext_jax.tasks.task import Batch, Headline, LoadedWeights, Loss, Task

HEAD = ('head.kernel', 'head.bias')
SQUASH = {'auto': None, 'crop': False, 'squash': True}
"""`config.eval.resize` as `eval_resize` takes it."""


def _defaults(config: ConfigDict) -> None:
    config.model.num_classes = 0  # 0: as many as the data set has
    config.model.head_init_scale = 1.0
    config.init.head = 'match'  # outputs start from those of the classes of the same name; 'new': from new values
    config.data.crop_scale = (0.08, 1.0)  # share of the area in the random resized crop; (): the whole image
    config.data.crop_pct = 0.875  # evaluation below 384 pixels: shorter side to int(image_size / crop_pct), centre crop
    config.data.exact = False  # Pillow's pixels exactly, at half the speed, in training; in evaluation they always are
    config.eval = ConfigDict()
    config.eval.flip = False  # average the outputs with those of the mirrored image
    config.eval.resize = 'auto'  # 'crop' by data.crop_pct, 'squash' to the square; 'auto': squash from 384 pixels on
    config.eval.resample = 'bicubic'  # Pillow's name of the filter

    config.augment = ConfigDict()  # on the device, by key
    config.augment.flip = True
    config.augment.crop_padding = 0  # random crop of the image padded by so many pixels
    config.augment.policy = 'rand-m9-mstd0.5-inc1'  # RandAugment in timm's syntax; '3a': three-augment; '': none
    config.augment.color_jitter = 0.0  # brightness, contrast, saturation by up to this share; 0.3 goes with '3a'
    config.augment.erasing = 0.25  # probability that a rectangle of the image is erased
    config.augment.erasing_mode = 'pixel'  # noise for each 'pixel', 'rand' for each channel, or 'const' 0

    config.mix = ConfigDict()  # neighbours in the batch
    config.mix.mixup = 0.0  # α of the Beta distribution that the shares are drawn from; 0: off
    config.mix.cutmix = 0.0  # the same; where both are on, they take turns at random
    config.mix.mode = 'batch'  # one draw for the 'batch', or for each image: 'elem'
    config.mix.off_epoch = 0.0  # from this epoch on no mixing; 0: always
    config.label_smoothing = 0.1


class Classification(Task):
    """One label to an image.

    A batch holds `image` (N, H, W, C) uint8 and `label` (N,) int32; augmented, `image` is float and normalised, and
    `target` (N, classes) takes the label's place.
    """

    headline = Headline('top1', 'top-1', ' %')
    fields = Fields(
        _defaults,
        positive=('data.crop_pct',),
        not_negative=(
            *('model.num_classes', 'augment.crop_padding', 'augment.color_jitter', 'augment.erasing'),
            *('mix.mixup', 'mix.cutmix', 'mix.off_epoch'),
        ),
        below_one=('label_smoothing',),
        at_most_one=('data.crop_pct', 'augment.erasing'),
        choices={
            'init.head': ('match', 'new'),
            'eval.resize': tuple(SQUASH),
            'eval.resample': tuple(x.name.lower() for x in Image.Resampling),
            'augment.erasing_mode': ('pixel', 'rand', 'const'),
            'mix.mode': ('batch', 'elem'),
        },
        fixed=('augment', 'mix'),
        free=('data.crop_pct',),
        evaluation=('data.crop_pct', 'eval.flip', 'eval.resize', 'eval.resample'),
    )

    def problems(self) -> list[str]:
        scale = self.config.data.crop_scale
        if scale and not (len(scale) == 2 and all(isinstance(value, int | float) for value in scale)):
            return [f'data.crop_scale must be two shares of the area, 0 < least ≤ most ≤ 1, not {scale}']
        return []

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
        if train.multi_label:
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

    def open_split(self, name: str, split: str, facts: Mapping[str, Any]) -> EvalImages:
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
        data, evaluation = self.config.data, self.config.eval
        return EvalImages(
            source,
            data.image_size,
            self.channels,
            crop_pct=data.crop_pct,
            squash=SQUASH[evaluation.resize],
            resample=Image.Resampling[evaluation.resample.upper()],
        )

    def evaluator(self, dataset: EvalImages) -> Accuracy:
        data, source = self.config.data, dataset.source
        return Accuracy(data.mean, data.std, source.class_names, source.eval_classes, self.config.eval.flip)

    def assume_data(self) -> None:
        """As many classes as ImageNet-1k, where `model.num_classes` is 0."""
        self.config.model.num_classes = self.config.model.num_classes or 1000

    def _variant(self) -> Variant:
        model = self.config.model
        layer_scale_init = None if model.layer_scale_init < 0 else model.layer_scale_init
        return get_variant(model.name).replace(patch_size=model.patch_size or None, layer_scale_init=layer_scale_init)

    def build(self, key: jax.Array) -> ConvNeXt:
        """Builds the network with new parameters.

        Raises:
            UserError: as `ConvNeXt`, or the images are too small for it.
        """
        model, size, variant = self.config.model, self.config.data.image_size, self._variant()
        if size < variant.total_stride:
            raise UserError(
                f'data.image_size={size} is below the total stride {variant.total_stride} of {model.name}: enlarge it, '
                f'or lower model.patch_size={variant.patch_size}'
            )
        execution = Execution(model.dtype, remat=model.remat, unroll=model.unroll, pallas=model.pallas)
        return ConvNeXt(
            variant,
            key=key,
            num_classes=model.num_classes,
            drop_path_rate=model.drop_path_rate,
            head_init_scale=model.head_init_scale,
            in_channels=self.channels,
            execution=execution,
        )

    @property
    def multiply_adds(self) -> int:
        config = self.config
        return self._variant().multiply_adds(config.data.image_size, config.model.num_classes, self.channels)

    def adopt(self, initial: Weights, trained: LoadedWeights, facts: Mapping[str, Any]) -> tuple[Weights, list[str]]:
        """Each output of the head starts from the weights' output for the class of that name, the others are new.

        Where the weights have no head, it is new, and so is the norm before it if they lack that too.

        Raises:
            UserError: the head would start from one that is not a softmax over classes.
        """
        loaded, pretrained = trained.weights, trained.pretrained
        if 'head.bias' not in loaded:
            new = {name: initial[name] for name in ('norm.scale', 'norm.bias', *HEAD) if name not in loaded}
            return loaded | new, []
        names = trained.facts.get('class names')
        head, note = _matched_head(loaded, initial, names, facts['class names'], self.config.init.head)
        if head and pretrained and pretrained.activation != 'softmax':
            reason = _describe_head(pretrained, trained.where)
            raise UserError(f'{reason}. --config.init.head=new starts a new head')
        return loaded | (head or {name: initial[name] for name in HEAD}), [note] if note else []

    def pretrained(self, model: ConvNeXt, facts: Mapping[str, Any]) -> Pretrained:
        data, names = self.config.data, facts['class names']
        unnamed = (f'class {label}' for label in range(len(names), model.head.bias.shape[0]))
        processor = ImageProcessor(
            data.image_size,
            data.crop_pct,
            resample=int(Image.Resampling[self.config.eval.resample.upper()]),
            squash=SQUASH[self.config.eval.resize],
            mean=tuple(data.mean),
            std=tuple(data.std),
        )
        return Pretrained(model, 'convnext_jax', (*names, *unnamed), processor, (), [])

    def config_for(self, pretrained: Pretrained, where: str) -> ConfigDict:
        """Images are prepared as the weights' folder says; if it says nothing, as the config says.

        Raises:
            UserError: the head is not a softmax over several classes.
        """
        if pretrained.activation != 'softmax':
            raise UserError(_describe_head(pretrained, where))
        config = self.config.copy_and_resolve_references()
        config.model.num_classes = pretrained.model.head.bias.size
        processor = pretrained.processor
        if processor:
            mean, std = processor.mean_and_std_of_255()
            config.data.update(image_size=processor.size, crop_pct=processor.crop_pct, mean=mean, std=std)
            config.eval.resize = next(name for name, squash in SQUASH.items() if squash == processor.squash)
            config.eval.resample = Image.Resampling(processor.resample).name.lower()
        return config

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


def _matched_head(
    loaded: Weights, initial: Weights, old_names: Sequence[str] | None, new_names: Sequence[str], rule: str
) -> tuple[Weights, str]:
    """The head with the outputs that it keeps, {} if it keeps none; and a line for the user, or ''."""
    if rule == 'new':
        return {}, 'the head is newly initialised'
    outputs, old_outputs = initial['head.bias'].size, loaded['head.bias'].size
    kept, note = kept_outputs(new_names, outputs, old_names, old_outputs)
    if max(kept) < 0 or loaded['head.kernel'].shape[0] != initial['head.kernel'].shape[0]:
        return {}, note
    sources = np.asarray(kept)

    def merge(new: jax.Array, old: np.ndarray) -> jax.Array:
        return jnp.where(sources >= 0, old[..., np.maximum(sources, 0)], new)

    def merged(name: str) -> jax.Array:
        return jax.jit(merge, out_shardings=initial[name].sharding)(initial[name], np.asarray(loaded[name]))

    return {name: merged(name) for name in HEAD}, note


def _describe_head(pretrained: Pretrained, where: str) -> str:
    """The reason why a head is neither trained nor evaluated here."""
    outputs = pretrained.model.head.bias.size
    kind = pretrained.problem_type or 'a sigmoid of each output'
    return (
        f'the head of {where} is for {kind}, with {outputs} output(s): training and evaluation here choose one of '
        'several classes by a softmax'
    )


def _warn(line: str) -> None:
    """Warns once, whatever the number of processes."""
    if jax.process_index() == 0:
        warnings.warn(line, stacklevel=3)
