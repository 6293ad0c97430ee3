"""read_upernet: a UPerNet with the weights of another library."""

from pathlib import Path
from typing import Any, NamedTuple, Unpack

import jax

from convnext_jax.errors import UserError
from convnext_jax.interop.configs import class_names_in
from convnext_jax.interop.licence import Licence, read_licence
from convnext_jax.interop.processor import ImageProcessor, stored_processor
from convnext_jax.interop.recognition import OpenedWeights, open_weights
from convnext_jax.interop.upernet import HEADS, head_name, weights_of
from convnext_jax.models import Execution, ExecutionOptions, UPerNet, get_weights, with_parameters
from convnext_jax.models.upernet import POOL_SCALES

CLASSIFIERS = tuple(f'{head}classifier.{parameter}' for head in HEADS for parameter in ('kernel', 'bias'))


class WindowProtocol(NamedTuple):
    """How images are resized, and how windows slide over them, by default as in mmsegmentation for crops of 512 pixels.

    Attributes:
        resize: limits of the longer and the shorter side, to which images are enlarged or reduced first.
        crop: side of the windows in pixels.
        stride: distance between neighbouring windows in pixels.
        whole: whether the network gets whole images instead of windows.
    """

    resize: tuple[int, int] = (2048, 512)
    crop: int = 512
    stride: int = 341
    whole: bool = False


class PretrainedUPerNet(NamedTuple):
    """A UPerNet, and the other information in its folder.

    Attributes:
        model: the network.
        layout: the layout of the file: 'huggingface', 'mmsegmentation', or 'original' for the original repository;
            'convnext_jax' for a run.
        class_names: names of the classes; None if unknown.
        processor: the preprocessing of images; None if unknown.
        newly_initialised: names of the parameters that do not come from the file.
        notes: messages for the user about newly initialised parameters, or about other weights of the run.
        origin: description of the file, folder or run that contains the weights, for messages.
        licence: licence of the weights; None if their folder does not state one.
        file_notes: the part of `notes` about names and tensors of the file that were changed or dropped.
        windows: the windows in the evaluation of a run; None if it squashes images, or if the weights are not of a run.
    """

    model: UPerNet
    layout: str
    class_names: tuple[str, ...] | None
    processor: ImageProcessor | None
    newly_initialised: tuple[str, ...]
    notes: list[str]
    origin: str = ''
    licence: Licence | None = None
    windows: WindowProtocol | None = None
    file_notes: tuple[str, ...] = ()

    @property
    def facts(self) -> dict[str, Any]:
        """What is known about the training data, in the form of `data.dataset.Dataset.facts`."""
        return {} if self.class_names is None else {'class names': list(self.class_names)}


def read_upernet(
    where: str | Path | OpenedWeights,
    *,
    name: str | None = None,
    entry: str | None = None,
    revision: str | None = None,
    num_classes: int | None = None,
    key: jax.Array | None = None,
    drop_path_rate: float = 0.0,
    dropout_rate: float = 0.0,
    output_stride: int | None = None,
    **options: Unpack[ExecutionOptions],
) -> PretrainedUPerNet:
    """A UPerNet with the weights of another library, and the class names of its folder.

    Args:
        where: a folder of Hugging Face's `UperNetForSemanticSegmentation`, its hub id, or a file of mmsegmentation or
            of the original repository. The names of the tensors determine the layout.
        name, entry, revision: as for `read_pretrained`.
        num_classes: number of classes; if the file has another number, the classifiers of both heads are newly
            initialised.
        key: random key of newly initialised classifiers.
        drop_path_rate, dropout_rate, output_stride: as for `models.UPerNet`.
        options: how the network is computed, as for `create_model`: dtype='bfloat16', remat='full', …

    Raises:
        TypeError: an unknown keyword.
        UserError: the file cannot be read or contains another network; or tensors are missing, unexpected or of another
            shape, and the message lists them.
    """
    execution = Execution.from_keywords(read_upernet, options)
    opened = open_weights(where, name=name, entry=entry, revision=revision)
    if not opened.heads:
        raise UserError(f'{opened.path} has no decode_head, so it is not a UPerNet: load_pretrained reads classifiers')
    saved_classes = _channels(opened, 'decode_head.classifier.bias')
    channels = _channels(opened, 'decode_head.bottleneck.norm.scale')
    auxiliary_channels = _channels(opened, 'auxiliary_head.conv.norm.scale')
    has_auxiliary = any(theirs.startswith('auxiliary_head.') for theirs in opened.heads)

    def build(key: jax.Array) -> UPerNet:
        return UPerNet(
            opened.variant,
            key=key,
            num_classes=saved_classes if num_classes is None else num_classes,
            channels=channels,
            pool_scales=_pool_scales(opened.config),
            auxiliary_channels=auxiliary_channels if has_auxiliary else 0,
            dropout_rate=dropout_rate,
            output_stride=output_stride,
            in_channels=opened.in_channels,
            drop_path_rate=drop_path_rate,
            execution=execution,
        )

    model = jax.eval_shape(build, jax.random.key(0))
    shapes = {ours: x.shape for ours, x in get_weights(model).items()}
    new: tuple[str, ...] = ()
    notes = list(opened.notes)
    heads = opened.heads
    if model.num_classes != saved_classes:
        new = tuple(ours for ours in CLASSIFIERS if ours in shapes)
        note = f'the classifiers are newly initialised: {model.num_classes} classes here, {saved_classes} in the file'
        if key is None:
            raise UserError(f'{note}: pass key=jax.random.key(…)')
        notes.append(note)
        dropped = {head_name(ours, opened.layout) for ours in new}
        heads = {theirs: x for theirs, x in heads.items() if theirs not in dropped}
    wanted = {ours: shape for ours, shape in shapes.items() if ours not in new}
    weights = weights_of(opened.tensors, heads, wanted, opened.variant, opened.layout)
    if key is not None and new:
        weights |= jax.jit(lambda key: {ours: get_weights(build(key))[ours] for ours in new})(key)
    try:
        processor = stored_processor(opened.path, opened.config)
    except UserError as error:
        processor = None
        notes.append(f'the stored preprocessing is not used: {error}')
    class_names = opened.class_names or class_names_in(opened.config, model.num_classes)
    if class_names and not new and len(class_names) != model.num_classes:
        notes.append(f'{len(class_names)} class names for {model.num_classes} classes are ignored')
        class_names = None
    return PretrainedUPerNet(
        with_parameters(model, weights),
        opened.file_layout,
        None if new else class_names,
        processor,
        new,
        notes,
        licence=read_licence(opened.path, opened.config),
        file_notes=opened.notes,
    )


def _channels(opened: OpenedWeights, ours: str) -> int:
    """The length of a vector in the file; 1 if it is missing, which `weights_of` reports together with other names."""
    vector = opened.heads.get(head_name(ours, opened.layout))
    return vector.shape[0] if vector is not None and len(vector.shape) == 1 else 1


def _pool_scales(config: dict) -> tuple[int, ...]:
    """The scales of the pyramid pooling in Hugging Face's config; the default for files without a config.

    Raises:
        UserError: the config has a network that `models.UPerNet` does not support.
    """
    supported = {'auxiliary_num_convs': 1, 'auxiliary_concat_input': False}
    odd = [f'{field}={config[field]}' for field, value in supported.items() if config.get(field, value) != value]
    if odd:
        raise UserError(f'config.json: {" and ".join(odd)} is not supported')
    scales = config.get('pool_scales', POOL_SCALES)
    if not isinstance(scales, list | tuple) or not all(isinstance(n, int) and 0 < n < 1024 for n in scales):
        raise UserError(f'config.json: pool_scales must be numbers of at least 1, not {scales}')
    return tuple(scales)
