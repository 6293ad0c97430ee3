"""Semantic segmentation with UPerNet: the class of each pixel of an image, in mmsegmentation's recipe for ADE20K."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Int, Key, UInt8
from ml_collections import ConfigDict
from PIL import Image

from convnext_jax.data.augment import normalize
from convnext_jax.data.class_names import same_names
from convnext_jax.data.dataset import Features
from convnext_jax.data.distortion import distort
from convnext_jax.data.mask_classes import IGNORED
from convnext_jax.data.masks import MaskSource, open_masks
from convnext_jax.data.segmentation import EvalMasks, TrainMasks
from convnext_jax.errors import UserError
from convnext_jax.fields import Fields
from convnext_jax.interop import ImageProcessor, PretrainedModel, PretrainedUPerNet
from convnext_jax.interop.pretrained_upernet import WindowProtocol
from convnext_jax.models import AFTER_TRUNK, UPerNet, Weights
from convnext_jax.models.fcmae import split_decoder
from convnext_jax.tasks.classes import matched_outputs, set_num_classes
from convnext_jax.tasks.mean_iou import MeanIoU, views_of
from convnext_jax.tasks.palette import class_colours
from convnext_jax.tasks.pixel_classes import PixelClasses
from convnext_jax.tasks.segmentation_loss import AUXILIARY_WEIGHT, segmentation_loss
from convnext_jax.tasks.task import Batch, Headline, LoadedWeights, Loss, Task, warn_on_main_process

HEADS = ('decode_head.', 'auxiliary_head.')
FIGURE_IMAGES, FIGURE_SIDE = 4, 256
"""Number of images in a figure, and the longer side of an image there in pixels."""


def _defaults(config: ConfigDict) -> None:
    config.model.num_classes = 0  # 0: the number of classes of the data set
    config.init.head = 'match'  # 'match': copy a UPerNet's outputs for classes with the same name; 'new': copy none
    config.data.name = 'masks'  # images and masks in two folders
    config.data.image_dir = 'images'  # folder in data.dir with a folder of images for each split
    config.data.mask_dir = 'annotations'  # folder in data.dir with a folder of masks (PNG) for each split
    config.data.classes = ''  # file with the names of the classes; '': found beside the masks
    config.data.reduce_zero_label = False  # whether pixels of value 0 have no class, as in ADE20K
    config.data.image_size = 512  # side of the crops in training, and of the windows in evaluation
    config.data.resize = (2048, 512)  # images are resized to fit into these limits of the longer and the shorter side
    config.data.scale = (0.5, 2.0)  # training: range of a random factor on data.resize
    config.data.max_class_share = 0.75  # training: crops are drawn again if a class has at least this share

    config.augment = ConfigDict()
    config.augment.flip = True  # horizontally, with probability ½
    config.augment.photometric = True  # random brightness, contrast, saturation and hue, on the device

    config.eval = ConfigDict()
    # 'slide': windows over images in data.resize. 'whole': these images in one pass. 'squash': images resized to a
    # square, without keeping their aspect ratio.
    config.eval.mode = 'slide'
    config.eval.stride = 0  # distance between windows in pixels; 0: two thirds of data.image_size
    config.eval.flip = False  # add the softmax values of each image and its mirror image
    config.eval.scales = (1.0,)  # factors by which data.resize is multiplied; the softmax values are added

    config.segmentation = ConfigDict()
    config.segmentation.channels = 512  # channels of the layers of the head
    config.segmentation.auxiliary_channels = 256  # channels of the auxiliary head; 0: no auxiliary head
    config.segmentation.auxiliary_weight = AUXILIARY_WEIGHT  # factor on the loss of the auxiliary head
    config.segmentation.dropout_rate = 0.1  # rate at which channels are dropped before the classifiers
    # 'all': the loss is the mean over all pixels, 0 for pixels without a class, as in the published training.
    # 'labelled': the loss is the mean over the pixels with a class.
    config.segmentation.average = 'all'


class Segmentation(Task):
    """Semantic segmentation.

    A batch has `image` (N, H, W, 3) uint8, `label` (N, H, W) uint8, 255 for pixels without a class, and `size` (N, 2)
    int32, the height and width of the part that is not padding. `augment` turns `image` into normalised floats. An
    evaluation batch has the features of `EvalMasks`.
    """

    headline = Headline('miou', 'mIoU', ' %')
    fields = Fields(
        _defaults,
        positive=('segmentation.channels', 'data.max_class_share'),
        not_negative=(
            *('model.num_classes', 'eval.stride'),
            *('segmentation.auxiliary_channels', 'segmentation.auxiliary_weight'),
        ),
        below_one=('segmentation.dropout_rate',),
        choices={
            'init.head': ('match', 'new'),
            'eval.mode': ('slide', 'whole', 'squash'),
            'segmentation.average': ('all', 'labelled'),
        },
        fixed=('augment', 'segmentation'),
        paths=('data.classes',),
        evaluation=(
            *('data.image_dir', 'data.mask_dir', 'data.classes', 'data.reduce_zero_label', 'data.resize'),
            *('eval.mode', 'eval.stride', 'eval.flip', 'eval.scales'),
        ),
    )

    def problems(self) -> list[str]:
        config, lines = self.config, []
        if config.accumulation_steps > 1:
            lines.append(
                f'accumulation_steps={config.accumulation_steps}, but UPerNet normalises over the whole batch: set it '
                'to 1, and lower batch_size or use more devices'
            )
        if len(config.data.mean) != 3:
            lines.append('segmentation needs RGB images: data.mean and data.std must have three values')
        if config.model.num_classes > IGNORED:
            lines.append(f'model.num_classes must be at most {IGNORED}, not {config.model.num_classes}')
        if config.eval.stride > config.data.image_size:
            lines.append(
                f'eval.stride={config.eval.stride} must be at most data.image_size={config.data.image_size}: windows '
                'must not leave gaps'
            )
        if config.eval.mode == 'squash' and tuple(config.eval.scales) != (1.0,):
            lines.append('eval.mode=squash has one scale: drop eval.scales, or set eval.mode to whole or slide')
        return lines

    @property
    def features(self) -> Features:
        crop = self.config.data.image_size
        return {
            'image': jax.ShapeDtypeStruct((crop, crop, 3), jnp.uint8),
            'label': jax.ShapeDtypeStruct((crop, crop), jnp.uint8),
            'size': jax.ShapeDtypeStruct((2,), jnp.int32),
        }

    def open(self) -> tuple[TrainMasks, EvalMasks]:
        """Opens both splits, and sets `model.num_classes` if it is 0.

        Raises:
            UserError: as for `open_masks`, or the data has more classes than `model.num_classes`.
        """
        data = self.config.data
        train, evaluation = (self._source(data.name, split) for split in (data.train_split, data.eval_split))
        set_num_classes(self.config, len(train.classes.names))
        images = TrainMasks(
            train,
            data.image_size,
            resize=tuple(data.resize),
            scale=tuple(data.scale),
            max_class_share=data.max_class_share,
            flip=self.config.augment.flip,
        )
        return images, self._eval_masks(evaluation)

    def open_split(self, name: str, split: str, facts: Mapping[str, Any]) -> EvalMasks:
        """Opens a split whose classes are the first outputs of the network. Warns if the names of classes differ.

        Raises:
            UserError: as for `open_masks`, or the data has more classes than the network.
        """
        source = self._source(name, split)
        names, known = source.classes.names, facts.get('class names', ())
        set_num_classes(self.config, len(names))
        for label, (ours, theirs) in enumerate(zip(names, known, strict=False)):
            if not same_names([ours], [theirs]):
                warn_on_main_process(
                    f'{name} {split}: classes are matched by position, but class {label} is {ours} in the data and '
                    f'{theirs} in the weights'
                )
                break
        return self._eval_masks(source)

    def warn_of_overrides(self, changed: ConfigDict) -> None:
        ours, theirs = (config.data.reduce_zero_label for config in (self.config, changed))
        if ours != theirs:
            warn_on_main_process(
                f'the run was trained with data.reduce_zero_label={ours}: with {theirs}, the labels of the same masks '
                'are shifted by one class'
            )

    def _source(self, name: str, split: str) -> MaskSource:
        data = self.config.data
        return open_masks(
            name,
            data.dir,
            split,
            image_dir=data.image_dir,
            mask_dir=data.mask_dir,
            classes=data.classes,
            reduce_zero_label=data.reduce_zero_label,
        )

    def _eval_masks(self, source: MaskSource) -> EvalMasks:
        data = self.config.data
        squash = data.image_size if self.config.eval.mode == 'squash' else 0
        return EvalMasks(source, resize=tuple(data.resize), scales=tuple(self.config.eval.scales), squash=squash)

    def evaluator(self, dataset: EvalMasks) -> MeanIoU:
        predict = self.pixel_classes(may_be_small=dataset.smallest_side < self.config.data.image_size)
        predict = dataclasses.replace(predict, shapes=dataset.shapes)
        return MeanIoU(predict, dataset.classes.names, len(dataset.scales))

    @property
    def windows(self) -> WindowProtocol:
        """How evaluation resizes images and slides windows over them."""
        data, evaluation = self.config.data, self.config.eval
        stride = evaluation.stride or max(data.image_size * 2 // 3, 1)
        return WindowProtocol(tuple(data.resize), data.image_size, stride, whole=evaluation.mode == 'whole')

    def pixel_classes(self, *, may_be_small: bool) -> PixelClasses:
        """Predicts classes with the options in `config.eval`; `may_be_small` as for `PixelClasses`."""
        data, windows = self.config.data, self.windows
        crop, stride = (0, 0) if windows.whole else (windows.crop, windows.stride)
        flip = self.config.eval.flip
        return PixelClasses(tuple(data.mean), tuple(data.std), crop, stride, flip, may_be_small)

    def assume_data(self) -> None:
        """Sets `model.num_classes` to 150 (ADE20K) if it is 0."""
        self.config.model.num_classes = self.config.model.num_classes or 150

    def build(self, key: Key[Array, '']) -> UPerNet:
        """Builds the network with random parameters.

        Raises:
            UserError: as for `UPerNet`, or the crops are smaller than the total stride of the network.
        """
        config, size, variant = self.config, self.config.data.image_size, self.variant()
        if size < variant.total_stride:
            raise UserError(
                f'data.image_size={size} is below the total stride {variant.total_stride} of {config.model.name}: '
                'raise it'
            )
        return UPerNet(
            variant,
            key=key,
            num_classes=config.model.num_classes,
            channels=config.segmentation.channels,
            auxiliary_channels=config.segmentation.auxiliary_channels,
            dropout_rate=config.segmentation.dropout_rate,
            drop_path_rate=config.model.drop_path_rate,
            execution=self.execution(),
        )

    @property
    def multiply_adds(self) -> int:
        return jax.eval_shape(self.build, jax.random.key(0)).multiply_adds(self.config.data.image_size)

    def initial_weights(
        self, initial: Weights, trained: LoadedWeights, facts: Mapping[str, Any]
    ) -> tuple[Weights, list[str]]:
        """Takes the trunk of a classifier or of an FCMAE encoder, or a whole UPerNet.

        The outputs of a UPerNet are matched by class name, as in classification.
        """
        if any(name.startswith('backbone.') for name in trained.weights):
            return self._from_upernet(initial, trained, facts)
        trunk = split_decoder(trained.weights)[0]
        loaded = {f'backbone.{name}': x for name, x in trunk.items() if name not in AFTER_TRUNK}
        new = {name: x for name, x in initial.items() if name.startswith(('backbone.norms.', *HEADS))}
        return loaded | new, ['newly initialised: the heads, and the norms of the feature maps']

    def _from_upernet(
        self, initial: Weights, trained: LoadedWeights, facts: Mapping[str, Any]
    ) -> tuple[Weights, list[str]]:
        loaded, notes = dict(trained.weights), []
        names, rule = trained.facts.get('class names'), self.config.init.head
        had_auxiliary, has_auxiliary = ('auxiliary_head.classifier.bias' in weights for weights in (loaded, initial))
        if had_auxiliary != has_auxiliary:
            loaded = {name: x for name, x in loaded.items() if not name.startswith('auxiliary_head.')}
            loaded |= {name: x for name, x in initial.items() if name.startswith('auxiliary_head.')}
            notes.append(f'the auxiliary head is {"newly initialised" if has_auxiliary else "dropped"}')
        for prefix in HEADS:
            head = (f'{prefix}classifier.kernel', f'{prefix}classifier.bias')
            if head[1] in initial:
                outputs, note = matched_outputs(head, loaded, initial, names, facts['class names'], rule)
                loaded |= outputs or {name: initial[name] for name in head}
                notes += [note] if note and note not in notes else []
        return loaded, notes

    def pretrained(self, model: UPerNet, facts: Mapping[str, Any]) -> PretrainedUPerNet:
        names = facts['class names']
        unnamed = (f'class {label}' for label in range(len(names), model.num_classes))
        windows = None if self.config.eval.mode == 'squash' else self.windows
        classes = (*names, *unnamed)
        return PretrainedUPerNet(model, 'convnext_jax', classes, self.processor, (), [], windows=windows)

    @property
    def processor(self) -> ImageProcessor:
        """The preprocessing of Hugging Face's UPerNet: it resizes images to a square with the side of the crops."""
        data = self.config.data
        bilinear = int(Image.Resampling.BILINEAR)
        return ImageProcessor(
            data.image_size, resample=bilinear, squash=True, mean=tuple(data.mean), std=tuple(data.std)
        )

    def config_for(self, pretrained: PretrainedModel, where: str) -> ConfigDict:
        """The config for an evaluation of weights of another library, with their number of classes, mean and std.

        The size of the images and windows comes from the config, because the size that is stored in published folders
        does not give the published mIoU.

        Raises:
            UserError: the weights are not a UPerNet.
        """
        if not isinstance(pretrained, PretrainedUPerNet):
            raise UserError(f'{where} is a classifier, but segmentation needs a UPerNet: train one first')
        config = self.config.copy_and_resolve_references()
        config.model.num_classes = pretrained.model.num_classes
        if pretrained.processor:
            mean, std = pretrained.processor.mean_and_std_of_255()
            config.data.update(mean=mean, std=std)
        return config

    def augment(self, batch: Batch, keys: Key[Array, ' n']) -> Batch:
        """Distorts the colours of the images, normalises them, and sets padding to 0."""
        images = distort(batch['image'], keys) if self.config.augment.photometric else batch['image']
        images = normalize(images, self.config.data.mean, self.config.data.std)
        rows, columns = (jnp.arange(side) for side in images.shape[1:3])
        height, width = jnp.unstack(batch['size'][:, :, None, None], axis=1)
        inside = (rows[:, None] < height) & (columns < width)
        return {'image': jnp.where(inside[..., None], images, 0), 'label': batch['label']}

    def loss(self, model: UPerNet, batch: Batch, keys: Key[Array, ' n']) -> Loss:
        """The cross-entropy of the pixels. Each pixel, or each labelled pixel, has weight 1."""
        options = self.config.segmentation
        return segmentation_loss(
            model.head_logits(batch['image'], key=keys),
            batch['label'],
            average=options.average,
            auxiliary_weight=options.auxiliary_weight,
        )

    def figures(self, model: UPerNet, batch: Batch) -> dict[str, UInt8[Array, 'h w 3']]:
        """A row for each of the first images: the image, its labels, the predicted classes. Black means no class."""
        colours = jnp.asarray(class_colours())
        predict, views = self.pixel_classes(may_be_small=True), len(self.config.eval.scales)

        def row(example: Batch) -> UInt8[Array, '_ _ 3']:
            size, label, label_size = (example[name] for name in ('image_size', 'label', 'label_size'))
            classes = predict(model, views_of(example, views), label_size, label.shape)
            cells = (
                _thumbnail(example['image'], size),
                colours[_thumbnail(label, label_size, IGNORED)],
                colours[_thumbnail(classes, label_size, IGNORED)],
            )
            return jnp.concatenate(cells, 1)

        examples = {name: x[:FIGURE_IMAGES] for name, x in batch.items()}
        return {'masks': rearrange(jax.lax.map(row, examples), 'n h w c -> (n h) w c')}


def _thumbnail(
    pixels: UInt8[Array, 'h w *c'], size: Int[Array, '2'], outside: int = 255
) -> UInt8[Array, 'side side *c']:
    """The image, resized by nearest neighbour to fit into a square with the side `FIGURE_SIDE`.

    Args:
        pixels: the image, padded at the bottom and at the right.
        size: (2,) int32, height and width without padding.
        outside: value of the other pixels of the square.
    """
    positions = ((jnp.arange(FIGURE_SIDE) + 0.5) * (size.max() / FIGURE_SIDE)).astype(jnp.int32)
    inside = (positions[:, None] < size[0]) & (positions < size[1])
    sampled = pixels[positions[:, None], positions]
    return jnp.where(inside.reshape(*inside.shape, *(1,) * (pixels.ndim - 2)), sampled, outside).astype(jnp.uint8)
