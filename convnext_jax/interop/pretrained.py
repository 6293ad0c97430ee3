"""load_pretrained and save_pretrained: read and write models in the folders and files of other libraries."""

import dataclasses
import inspect
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import jax

from convnext_jax.errors import UserError
from convnext_jax.interop.backbone import backbone_tensors
from convnext_jax.interop.channels import with_channels
from convnext_jax.interop.configs import (
    activation,
    backbone_config,
    check_problem_type,
    class_names_in,
    classifier_config,
    encoder_config,
    upernet_config,
)
from convnext_jax.interop.files import Tensors, write_folder
from convnext_jax.interop.layouts import HEADS, LAST_NORMS, from_layout, normed_feature, to_layout
from convnext_jax.interop.licence import CARD, Licence, model_card, read_licence
from convnext_jax.interop.pretrained_upernet import PretrainedUPerNet, read_upernet
from convnext_jax.interop.processor import ImageProcessor, processor_for, segmentation_processor, stored_processor
from convnext_jax.interop.recognition import OpenedWeights, last_epsilon, open_weights
from convnext_jax.interop.upernet import UPERNET_LAYOUTS, tensors_of
from convnext_jax.models import (
    AFTER_TRUNK,
    Backbone,
    ConvNeXt,
    Execution,
    ExecutionOptions,
    UPerNet,
    get_parameters,
    get_weights,
    with_parameters,
)
from convnext_jax.paths import local_path

HEAD = ('head.kernel', 'head.bias')


class Pretrained(NamedTuple):
    """A model, and the other information in its folder.

    Attributes:
        model: the classifier.
        layout: the layout of the file, one of `layouts.LAYOUTS`; 'convnext_jax' for a run.
        class_names: names of the head's outputs; None if unknown.
        processor: the preprocessing of images; None if unknown.
        newly_initialised: names of the parameters that are missing in the file and were newly initialised.
        notes: messages for the user, about newly initialised parameters or about other weights of the file or run.
        problem_type: 'single_label_classification', 'multi_label_classification' or 'regression', from Hugging Face's
            config; None if unknown.
        origin: description of the file, folder or run that contains the weights, for messages.
        licence: licence of the weights; None if their folder does not state one.
        decoder: decoder of the original's FCMAE pre-training, for `fcmae.decoder_parameters`; {} for other files.
        test_processor: the preprocessing with the image size and crop of timm's published accuracy; None if unknown.
        file_notes: the part of `notes` about names and tensors of the file that were changed or dropped.
        is_image_tower: whether the model is an OpenCLIP image tower, whose head is the projection to the embedding.
    """

    model: ConvNeXt
    layout: str
    class_names: tuple[str, ...] | None
    processor: ImageProcessor | None
    newly_initialised: tuple[str, ...]
    notes: list[str]
    problem_type: str | None = None
    origin: str = ''
    licence: Licence | None = None
    decoder: Tensors = {}  # noqa: RUF012 - never modified
    test_processor: ImageProcessor | None = None
    file_notes: tuple[str, ...] = ()
    is_image_tower: bool = False

    @property
    def has_head(self) -> bool:
        """Whether the head was trained."""
        return self.model.head is not None and HEAD[0] not in self.newly_initialised

    @property
    def has_norm(self) -> bool:
        """Whether the last norm was trained; the encoder of a pre-training has none."""
        return 'norm.scale' not in self.newly_initialised

    def check_head(self) -> None:
        """Checks that the head was trained.

        Raises:
            UserError: the head is newly initialised, as for the encoder of a pre-training.
        """
        if not self.has_head:
            raise UserError(f'{self.origin or "the model"} has no classes: fine-tune it first, configs/v2_finetune.py')

    @property
    def activation(self) -> str | None:
        """The function from logits to probabilities: 'softmax', 'sigmoid', or None for a regression."""
        return activation(self.problem_type, self.model.num_classes)

    @property
    def facts(self) -> dict[str, Any]:
        """What is known about the training data, in the form of `data.dataset.Dataset.facts`."""
        return {} if self.class_names is None else {'class names': list(self.class_names)}


PretrainedModel = Pretrained | PretrainedUPerNet
"""A model of any kind with the other information in its folder."""


def read_model(
    where: str | Path,
    *,
    name: str | None = None,
    entry: str | None = None,
    new_classes: int | None = None,
    in_channels: int | None = None,
) -> PretrainedModel:
    """The classifier or UPerNet in a file or folder, for inference or for a new run.

    `read_pretrained` describes the arguments and errors. If the file has no head, a head is newly initialised with a
    fixed random key. `in_channels` applies to classifiers only.
    """
    opened = open_weights(where, name=name, entry=entry, revision=None)
    if opened.heads:
        return read_upernet(opened)
    return read_pretrained(opened, new_classes=new_classes, key=jax.random.key(0), in_channels=in_channels)


def as_classifier(pretrained: PretrainedModel) -> Pretrained:
    """The argument, if it is a classifier or an encoder.

    Raises:
        UserError: it is a UPerNet.
    """
    if isinstance(pretrained, PretrainedUPerNet):
        where = pretrained.origin or 'the file'
        raise UserError(f'{where}: this is a UPerNet for semantic segmentation, but a classifier is needed here')
    return pretrained


def load_pretrained(
    where: str | Path, *, name: str | None = None, entry: str | None = None, revision: str | None = None, **arguments
) -> ConvNeXt | UPerNet:
    """A classifier or a UPerNet, whichever the file has, with the weights of another library.

    A warning lists the parts of the model that are newly initialised. `read_pretrained` (classifiers) and
    `read_upernet` describe the arguments and errors. They also return the class names and the licence of the weights.
    """
    # A misspelt keyword is reported before anything is read or downloaded.
    known = {*inspect.signature(read_pretrained).parameters, *inspect.signature(read_upernet).parameters}
    Execution.from_keywords(read_pretrained, {key: value for key, value in arguments.items() if key not in known})
    opened = open_weights(where, name=name, entry=entry, revision=revision)
    loaded = read_upernet(opened, **arguments) if opened.heads else read_pretrained(opened, **arguments)
    for note in loaded.notes:
        warnings.warn(note, stacklevel=2)
    return loaded.model


def read_pretrained(
    where: str | Path | OpenedWeights,
    *,
    name: str | None = None,
    entry: str | None = None,
    revision: str | None = None,
    num_classes: int | None = None,
    new_classes: int | None = None,
    key: jax.Array | None = None,
    drop_path_rate: float = 0.0,
    head_init_scale: float = 1.0,
    in_channels: int | None = None,
    **options: Unpack[ExecutionOptions],
) -> Pretrained:
    """A classifier with the weights of another library, and the class names and preprocessing of its folder.

    Args:
        where: a Hugging Face folder (`config.json` and safetensors, in one or more files, or `pytorch_model.bin`) or a
            timm folder; a hub id of either; or a safetensors or PyTorch file with any name. The names of the tensors
            determine the layout, one of `LAYOUTS`. Prefixes that wrappers have added (`module.`, `model.`) are removed,
            with a note.
        name: name of the architecture; by default it is determined by the folder's config, or by names and shapes.
        entry: name of one of several state dicts in a PyTorch file, or 'ema' for 'model_ema' or 'state_dict_ema'. The
            default is 'model' or 'state_dict', or the only state dict.
        revision: branch, tag or commit on the hub.
        num_classes: outputs of the head; if the file's head has another number, the head is newly initialised. With 0
            the model has no head, and a head in the file is not used.
        new_classes: outputs of the newly initialised head of a file without a head; ignored if the file has one.
        key: random key of a newly initialised head.
        drop_path_rate, head_init_scale: as for `create_model`.
        in_channels: channels of the images, by default those of the file. Weights for RGB are adapted to another
            number, as in timm: with 1 the stem's kernel is summed over RGB, with more it is repeated and rescaled. The
            preprocessing of the file is then not used.
        options: how the model is computed, as for `create_model`: dtype='bfloat16', remat='full', …

    Raises:
        TypeError: an unknown keyword.
        UserError: the file cannot be read or contains another model; or tensors are missing, unexpected or of another
            shape, and the message lists them.
    """
    execution = Execution.from_keywords(read_pretrained, options)
    opened = open_weights(where, name=name, entry=entry, revision=revision)
    if opened.heads:
        raise UserError(f'{opened.path} is a UPerNet, not a classifier: load_pretrained and read_upernet read it')
    if any(map(normed_feature, opened.tensors)):
        raise UserError(f'{opened.path} is a backbone that has a norm for each feature map: create_backbone reads it')
    opened, adaptation = with_channels(opened, in_channels)
    notes = [*opened.notes, *adaptation]
    processor = None if adaptation else stored_processor(opened.path, opened.config)
    tensors, layout = opened.tensors, opened.layout
    bias = tensors.get(f'{HEADS[layout][0]}bias')
    saved_classes = None if bias is None else math.prod(bias.shape)
    sizes = [size for size in (num_classes, saved_classes, new_classes) if size is not None]
    num_classes = sizes[0] if sizes else 1  # without any size, `from_layout` reports other problems first

    def build(key: jax.Array) -> ConvNeXt:
        return ConvNeXt(
            opened.variant,
            key=key,
            num_classes=num_classes,
            drop_path_rate=drop_path_rate,
            head_init_scale=head_init_scale,
            layer_norm_eps=last_epsilon(opened.config, opened.variant, layout),
            in_channels=opened.in_channels,
            execution=execution,
        )

    model = jax.eval_shape(build, jax.random.key(0))
    shapes = {name: array.shape for name, array in get_parameters(model).items()}
    new_parts, missing = _missing_parts(tensors, saved_classes, num_classes, layout)
    notes += new_parts
    newly_initialised = tuple(name for name in missing if name in shapes)
    if saved_classes is not None and (HEAD[0] in newly_initialised or num_classes == 0):
        tensors = {name: x for name, x in tensors.items() if not name.startswith(HEADS[layout])}
    parameters = from_layout(
        tensors,
        {name: shape for name, shape in shapes.items() if name not in newly_initialised},
        opened.variant,
        layout,
    )
    if not sizes:
        raise UserError(
            f'{opened.path} has no head: load_pretrained(…, num_classes=, key=) initialises one, and num_classes=0 '
            'gives a model without a head'
        )
    if newly_initialised:
        if key is None:
            raise UserError(f'{"; ".join(new_parts)}: pass key=jax.random.key(…)')
        drawn = jax.jit(lambda key: {name: get_parameters(build(key))[name] for name in newly_initialised})(key)
        parameters |= drawn
    model = with_parameters(model, parameters)
    licence = read_licence(opened.path, opened.config)
    if newly_initialised or num_classes == 0:  # names and problem type in the config describe another head
        return Pretrained(
            model,
            layout,
            None,
            processor,
            newly_initialised,
            notes,
            licence=licence,
            decoder=opened.decoder,
            file_notes=opened.notes,
        )
    class_names, problem_type = class_names_in(opened.config, num_classes), opened.config.get('problem_type')
    check_problem_type(problem_type)
    return Pretrained(
        model,
        layout,
        class_names,
        processor,
        newly_initialised,
        notes,
        problem_type,
        licence=licence,
        decoder=opened.decoder,
        test_processor=None if adaptation else _test_processor(opened),
        file_notes=opened.notes,
        is_image_tower=opened.is_image_tower,
    )


def save_pretrained(
    model: ConvNeXt | Backbone | UPerNet,
    folder: str | Path,
    *,
    layout: str = 'huggingface',
    class_names: Sequence[str] | None = None,
    processor: ImageProcessor | None = None,
    problem_type: str | None = None,
    licence: Licence | None = None,
    head: bool = True,
) -> None:
    """Writes a folder that another library can load.

    - 'huggingface': `AutoModelForImageClassification.from_pretrained(folder)`, or `ConvNextBackbone`, with processor.
    - 'timm': `timm.create_model('local-dir:FOLDER')`, or `checkpoint_path=FOLDER/model.safetensors`.
    - 'original': `torch.load('FOLDER/model.pth')['model']`; torch must be installed to write it.
    - 'dinov3': `AutoModel.from_pretrained(folder)`, a `DINOv3ConvNextModel`; only for a model saved without its head.
    - 'torchvision': `torchvision.models.convnext_tiny().load_state_dict(torch.load('FOLDER/model.pth'))`.
    - A `UPerNet` can be saved as 'huggingface' (`UperNetForSemanticSegmentation.from_pretrained(folder)`), or as
      'mmsegmentation' or 'original' (`torch.load('FOLDER/model.pth')['state_dict']`).

    Args:
        model: the model; a backbone can only be saved in the Hugging Face layout.
        folder: a new or empty folder.
        layout: one of `LAYOUTS`, or of `UPERNET_LAYOUTS` for a UPerNet.
        class_names: names of the head's outputs.
        processor: preprocessing of images; by default the preprocessing of the published models at 224 pixels, or at
            512 for a UPerNet.
        problem_type: as in `Pretrained`. Only the Hugging Face layout stores it. With another layout there is a warning
            if users would interpret the logits differently without it.
        licence: licence of the weights, such as `Pretrained.licence`; it is written into a model card, `README.md`.
        head: False omits the head: Hugging Face loads the folder as `AutoModel`, timm with num_classes=0. A model
            without a head is always saved like this.

    Raises:
        UserError: the folder is not empty or not writable, a value is invalid, or the other library does not support
            the architecture.
    """
    if layout == 'dinov3' and processor is None:
        processor = dataclasses.replace(processor_for(model.in_channels, None), resample=2, squash=True)
    default = segmentation_processor if isinstance(model, UPerNet) else processor_for
    processor = default(model.in_channels, processor)
    files: dict[str, dict | bytes] = {}
    entry = 'model' if layout == 'original' else None
    if isinstance(model, UPerNet):
        if layout not in UPERNET_LAYOUTS or problem_type is not None or not head:
            raise UserError(
                f'a UPerNet has no problem_type and can only be saved as a whole, as {", ".join(UPERNET_LAYOUTS)}'
            )
        config = upernet_config(model, class_names, processor)  # also checks the arguments for the other layouts
        tensors = tensors_of(jax.device_get(get_weights(model)), model.variant, layout)
        if layout == 'huggingface':
            files['config.json'] = config
        else:
            entry = 'state_dict'
    elif isinstance(model, Backbone):
        if layout != 'huggingface' or class_names is not None or problem_type is not None:
            raise UserError('a backbone has no classes and can only be saved in the huggingface layout')
        tensors, files['config.json'] = backbone_tensors(model), backbone_config(model, processor)
    else:
        head = head and model.head is not None
        parameters = {name: x for name, x in get_parameters(model).items() if head or name not in HEAD}
        tensors = to_layout(jax.device_get(parameters), model.variant, layout)
        if head:
            files |= classifier_config(model, layout, class_names, processor, problem_type)
        else:
            files |= encoder_config(model, layout, processor)
    if layout == 'huggingface':
        dense = isinstance(model, UPerNet)
        files['preprocessor_config.json'] = processor.to_segformer() if dense else processor.to_huggingface()
    elif layout == 'dinov3':
        files['preprocessor_config.json'] = processor.to_dinov3()
    if licence:
        files[CARD] = model_card(licence)
    pytorch = layout not in ('huggingface', 'timm', 'dinov3')
    write_folder(local_path(folder), tensors, files, pytorch=pytorch, entry=entry)


def _missing_parts(
    tensors: Tensors, saved_classes: int | None, num_classes: int, layout: str
) -> tuple[list[str], tuple[str, ...]]:
    """Messages about the parts that are missing in the file, and the names that their parameters may have."""
    if saved_classes == num_classes or (saved_classes is not None and num_classes == 0):
        return [], ()
    if saved_classes is not None:
        return [f'the head is newly initialised: {num_classes} classes here, {saved_classes} in the file'], HEAD
    has_norm = any(name.startswith(LAST_NORMS[layout]) for name in tensors)
    if num_classes == 0:
        return ([], ()) if has_norm else (['the last norm is newly initialised: the file has none'], AFTER_TRUNK)
    if has_norm:
        return ['the head is newly initialised: the file has none'], HEAD
    return ['the last norm and the head are newly initialised: the file has none'], AFTER_TRUNK


def _test_processor(opened: OpenedWeights) -> ImageProcessor | None:
    images = opened.config.get('pretrained_cfg')
    if not isinstance(images, dict) or not (images.get('test_input_size') or images.get('test_crop_pct')):
        return None
    return ImageProcessor.from_timm(images, test=True)
