"""The task of image classification: its config fields, and cross-entropy with label smoothing, mixup and cutmix."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict
from PIL import Image

from convnext_jax.data.arrays import PILLOW_CHANNELS
from convnext_jax.data.augment import augment
from convnext_jax.data.dataset import Features
from convnext_jax.data.labelled_images import EvalImages, TrainImages, image_features
from convnext_jax.data.mixing import mix
from convnext_jax.data.relabelling import open_labelled_splits, with_classes_of_model
from convnext_jax.data.sources import Source, open_source
from convnext_jax.errors import UserError
from convnext_jax.fields import Fields
from convnext_jax.interop import ImageProcessor, Pretrained, PretrainedModel, as_classifier
from convnext_jax.models import AFTER_TRUNK, ConvNeXt, Weights
from convnext_jax.models.fcmae import split_decoder
from convnext_jax.tasks.accuracy import Accuracy
from convnext_jax.tasks.classes import matched_outputs, set_num_classes
from convnext_jax.tasks.task import Batch, Headline, LoadedWeights, Loss, Task, warn_on_main_process

HEAD = ('head.kernel', 'head.bias')
SQUASH = {'auto': None, 'crop': False, 'squash': True}
"""`config.eval.resize` → argument `squash` of the evaluation images."""


def _defaults(config: ConfigDict) -> None:
    config.model.num_classes = 0  # 0: the number of classes of the data set
    config.model.head_init_scale = 1.0
    config.init.head = 'match'  # 'match': copy the head's outputs for classes with the same name; 'new': random head
    config.data.crop_scale = (0.08, 1.0)  # random resized crop: range of the fraction of the area; (): the whole image
    config.data.crop_pct = 0.875  # evaluation: resize the shorter side to int(image_size / crop_pct), then centre crop
    config.data.exact = False  # training crops bit-identical to Pillow, at half the speed (evaluation crops always are)
    config.eval = ConfigDict()
    config.eval.flip = False  # average the logits of each image and its mirror image
    config.eval.resize = 'auto'  # 'crop': use data.crop_pct; 'squash' to a square; 'auto': squash from 384 pixels on
    config.eval.resample = 'bicubic'  # a filter of Pillow

    config.augment = ConfigDict()  # computed on the device
    config.augment.flip = True  # horizontally, with probability ½
    config.augment.crop_padding = 0  # pixels by which the image is padded before a random crop
    config.augment.policy = 'rand-m9-mstd0.5-inc1'  # RandAugment in timm's syntax; '3a': three-augment; '': none
    config.augment.color_jitter = 0.0  # maximum relative change of brightness, contrast and saturation; 0.3 with '3a'
    config.augment.erasing = 0.25  # probability of erasing a random rectangle of the image
    config.augment.erasing_mode = 'pixel'  # fill: noise per 'pixel', noise per channel ('rand'), or 0 ('const')

    config.mix = ConfigDict()  # mixes neighbouring images of the batch
    config.mix.mixup = 0.0  # α of the Beta distribution of the mixing weight; 0: off
    config.mix.cutmix = 0.0  # α, as for mixup; if both are on, one of them is chosen at random
    config.mix.mode = 'batch'  # draw once per 'batch', or once per image ('elem')
    config.mix.off_epoch = 0.0  # no mixing from this epoch on; 0: mixing in all epochs
    config.label_smoothing = 0.1


class Classification(Task):
    """Classification of images with one label each.

    A batch has `image` (N, H, W, C), uint8 for 1 or 3 channels and otherwise float32, and `label` (N,) int32. After
    `augment`, it has `image` (N, H, W, C) float32, normalised, and `target` (N, classes) float32.
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
        scale, augmentation, lines = self.config.data.crop_scale, self.config.augment, []
        if scale and not (len(scale) == 2 and all(isinstance(value, int | float) for value in scale)):
            lines.append(f'data.crop_scale must be two numbers with 0 < minimum ≤ maximum ≤ 1, or (), not {scale}')
        if self.channels not in PILLOW_CHANNELS and (augmentation.policy or augmentation.color_jitter):
            lines.append(
                f'augment.policy and augment.color_jitter change colours, but data.mean has {self.channels} values, so '
                "the images are not RGB: set --config.augment.policy='' --config.augment.color_jitter=0.0"
            )
        return lines

    @property
    def channels(self) -> int:
        """The number of channels of the images."""
        return len(self.config.data.mean)

    @property
    def features(self) -> Features:
        return image_features(self.config.data.image_size, self.channels)

    def open(self) -> tuple[TrainImages, EvalImages]:
        """Opens the training and the evaluation split, and sets `model.num_classes` if it is 0.

        Both splits get the labels of the training split. Warns if the evaluation split lacks a class.

        Raises:
            UserError: as for `open_labelled_splits`, or the training split has more classes than `model.num_classes`.
        """
        data = self.config.data
        train, evaluation, missing = open_labelled_splits(data.name, data.dir, data.train_split, data.eval_split)
        classes = len(train.class_names)
        if missing:
            warn_on_main_process(f'{missing} of {classes} classes are missing in split {data.eval_split}')
        set_num_classes(self.config, classes)
        images = TrainImages(train, data.image_size, self.channels, crop_scale=data.crop_scale, exact=data.exact)
        return images, self._eval_images(evaluation)

    def open_split(self, name: str, split: str, facts: Mapping[str, Any]) -> EvalImages:
        """Opens a split, and maps its labels to outputs of the network by class name.

        Warns if the mapping could not be verified.

        Raises:
            UserError: as for `open_source` and `with_classes_of_model`.
        """
        try:
            source = open_source(name, self.config.data.dir, split)
            names, outputs = facts.get('class names'), self.config.model.num_classes
            source, note = with_classes_of_model(source, names, outputs)
        except UserError as error:
            raise UserError(f'{name} {split}: {error}') from error
        if note:
            warn_on_main_process(f'{name} {split}: {note}')
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
        """Sets `model.num_classes` to 1,000 (ImageNet-1k) if it is 0."""
        self.config.model.num_classes = self.config.model.num_classes or 1000

    def build(self, key: Key[Array, '']) -> ConvNeXt:
        """Builds the classifier with random parameters.

        Raises:
            UserError: as for `ConvNeXt`, or the images are smaller than the total stride of the network.
        """
        model, size, variant = self.config.model, self.config.data.image_size, self.variant()
        if size < variant.total_stride:
            raise UserError(
                f'data.image_size={size} is below the total stride {variant.total_stride} of {model.name}: raise it, '
                f'or lower model.patch_size={variant.patch_size}'
            )
        return ConvNeXt(
            variant,
            key=key,
            num_classes=model.num_classes,
            drop_path_rate=model.drop_path_rate,
            head_init_scale=model.head_init_scale,
            in_channels=self.channels,
            execution=self.execution(),
        )

    @property
    def multiply_adds(self) -> int:
        config = self.config
        return self.variant().multiply_adds(config.data.image_size, config.model.num_classes, self.channels)

    def initial_weights(
        self, initial: Weights, trained: LoadedWeights, facts: Mapping[str, Any]
    ) -> tuple[Weights, list[str]]:
        """Copies the loaded weights, and matches the outputs of the head by class name.

        Outputs for classes that the loaded weights do not have are newly initialised. If the loaded weights have no
        head, or neither head nor final norm, these are newly initialised as well.

        Raises:
            UserError: the loaded head was not trained with a softmax over classes, or the weights belong to a UPerNet.
        """
        pretrained = trained.as_classifier()
        loaded, decoder = split_decoder(trained.weights)
        notes = list(pretrained.notes) if pretrained else []
        if decoder or (pretrained and pretrained.decoder):
            notes.append('the decoder of the pre-training is dropped')
        if 'head.bias' not in loaded:
            new = {name: initial[name] for name in AFTER_TRUNK if name in initial and name not in loaded}
            if not pretrained:
                notes.append(f'newly initialised: {", ".join(new)}')
            return loaded | new, notes
        names = trained.facts.get('class names')
        head, note = matched_outputs(HEAD, loaded, initial, names, facts['class names'], self.config.init.head)
        if head and pretrained and pretrained.activation != 'softmax':
            reason = _describe_head(pretrained, trained.where)
            raise UserError(f'{reason}; use --config.init.head=new for a newly initialised head')
        return loaded | (head or {name: initial[name] for name in HEAD}), [*notes, note] if note else notes

    def pretrained(self, model: ConvNeXt, facts: Mapping[str, Any]) -> Pretrained:
        names = facts['class names']
        unnamed = (f'class {label}' for label in range(len(names), model.num_classes))
        return Pretrained(model, 'convnext_jax', (*names, *unnamed), self.processor, (), [])

    @property
    def processor(self) -> ImageProcessor:
        data = self.config.data
        return ImageProcessor(
            data.image_size,
            data.crop_pct,
            resample=int(Image.Resampling[self.config.eval.resample.upper()]),
            squash=SQUASH[self.config.eval.resize],
            mean=tuple(data.mean),
            std=tuple(data.std),
        )

    def config_for(self, pretrained: PretrainedModel, where: str) -> ConfigDict:
        """The config for an evaluation of weights of another library.

        If preprocessing is stored with the weights, it replaces the preprocessing in the config.

        Raises:
            UserError: the head was not trained with a softmax over several classes, or the weights have no head.
        """
        pretrained = as_classifier(pretrained)
        pretrained.check_head()
        if pretrained.activation != 'softmax':
            raise UserError(_describe_head(pretrained, where))
        config = self.config.copy_and_resolve_references()
        config.model.num_classes = pretrained.model.num_classes
        processor = pretrained.processor
        if processor:
            mean, std = processor.mean_and_std_of_255()
            config.data.update(image_size=processor.size, crop_pct=processor.crop_pct, mean=mean, std=std)
            config.eval.resize = next(name for name, squash in SQUASH.items() if squash == processor.squash)
            config.eval.resample = Image.Resampling(processor.resample).name.lower()
        return config

    def augment(self, batch: Batch, keys: Key[Array, ' n']) -> Batch:
        """Augments and normalises the images."""
        mean, std = self.config.data.mean, self.config.data.std
        return batch | {'image': augment(batch['image'], keys, mean=mean, std=std, **self.config.augment)}

    def mix(self, batch: Batch, key: Key[Array, ''], epoch: Float[Array, '']) -> Batch:
        """Turns labels into smoothed targets, and mixes images and targets before `config.mix.off_epoch`."""
        config = self.config
        one_hot = jax.nn.one_hot(batch['label'], config.model.num_classes)
        images, targets = batch['image'], optax.smooth_labels(one_hot, config.label_smoothing)
        if config.mix.mixup or config.mix.cutmix:
            images, targets = mix(
                images,
                targets,
                key,
                mixup=config.mix.mixup,
                cutmix=config.mix.cutmix,
                mode=config.mix.mode,
                on=epoch < config.mix.off_epoch if config.mix.off_epoch else True,
            )
        return {'image': images, 'target': targets}

    def loss(self, model: ConvNeXt, batch: Batch, keys: Key[Array, ' n']) -> Loss:
        """The cross-entropy. Each example has weight 1."""
        losses = optax.softmax_cross_entropy(model(batch['image'], key=keys), batch['target'])
        return Loss(losses.sum(), jnp.float32(losses.size))


def _describe_head(pretrained: Pretrained, where: str) -> str:
    """A message that says why a head can be neither trained nor evaluated as a classifier with softmax."""
    outputs = pretrained.model.num_classes
    kind = pretrained.problem_type or 'independent sigmoid outputs'
    return (
        f'the head of {where} is for {kind}, with {outputs} output(s), but training and evaluation need a softmax over '
        'several classes'
    )
