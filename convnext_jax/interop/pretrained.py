"""load_pretrained and save_pretrained: whole models in the folders and files of the other libraries."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from convnext_jax.errors import UserError
from convnext_jax.interop.backbone import backbone_tensors
from convnext_jax.interop.configs import backbone_config, classifier_config
from convnext_jax.interop.files import Tensors, write_folder
from convnext_jax.interop.layouts import HEADS, LAST_NORMS, from_layout, to_layout
from convnext_jax.interop.processor import ImageProcessor, processor_for
from convnext_jax.interop.recognition import Opened, last_epsilon, open_weights
from convnext_jax.models import Backbone, ConvNeXt, create_model, get_parameters, with_parameters

HEAD = ('head.kernel', 'head.bias')


class Pretrained(NamedTuple):
    """A model and what else its folder says.

    Attributes:
        layout: the names its tensors had.
        class_names: of the head's outputs, where the folder gives them.
        processor: how it wants its images, where the folder says it.
        fresh: the parameters that the file does not give.
        notes: lines about these.
    """

    model: ConvNeXt
    layout: str
    class_names: tuple[str, ...] | None
    processor: ImageProcessor | None
    fresh: tuple[str, ...]
    notes: list[str]


def load_pretrained(where: str | Path, **arguments) -> ConvNeXt:
    """A model with the weights of the Hugging Face, timm or original libraries; arguments as `read_pretrained`.

    Warns where a part of the model is fresh. `read_pretrained` also gives class names and preprocessing.
    """
    loaded = read_pretrained(where, **arguments)
    for note in loaded.notes:
        warnings.warn(note, stacklevel=2)
    return loaded.model


def read_pretrained(
    where: str | Path,
    *,
    name: str | None = None,
    entry: str | None = None,
    revision: str | None = None,
    num_classes: int | None = None,
    key: jax.Array | None = None,
    drop_path_rate: float = 0.0,
    head_init_scale: float = 1.0,
    remat: str = 'dots',
    unroll: bool = False,
    pallas: bool = False,
    dtype: jnp.dtype | str = jnp.float32,
) -> Pretrained:
    """A model with the weights of another library, and what its folder says about classes and images.

    Args:
        where: a folder of Hugging Face (`config.json` with safetensors, in one file or several, or
            `pytorch_model.bin`) or of timm; a hub id of either; a timm or original file, `.safetensors`, `.pth`,
            `.pt` or `.bin`. The layout is told by the tensors' names.
        name: the architecture to insist on; by default as the folder's config, or the names and shapes, say.
        entry: which weights of an original file: 'model' or 'model_ema'.
        revision: branch, tag or commit on the hub.
        num_classes: where it is not the file's, the head is fresh.
        key: random key of a fresh head.
        drop_path_rate, head_init_scale, remat, unroll, pallas, dtype: as `create_model`.

    Raises:
        UserError: the file cannot be read, is of another model, or has tensors missing, left over or misshapen; these
            are listed.
    """
    opened = open_weights(str(where), name=name, entry=entry, revision=revision)
    tensors, layout = opened.tensors, opened.layout
    bias = tensors.get(f'{HEADS[layout][0]}bias')
    saved_classes = None if bias is None else math.prod(bias.shape)
    num_classes = saved_classes if num_classes is None else num_classes
    if num_classes is None:
        raise UserError(f'{where} has no head: give num_classes=, and key= for a fresh one')

    def build(key: jax.Array) -> ConvNeXt:
        return create_model(
            opened.variant,
            key=key,
            num_classes=num_classes,
            drop_path_rate=drop_path_rate,
            head_init_scale=head_init_scale,
            layer_norm_eps=last_epsilon(opened.config, layout),
            in_channels=opened.in_channels,
            remat=remat,
            unroll=unroll,
            pallas=pallas,
            dtype=dtype,
        )

    model = jax.eval_shape(build, jax.random.key(0))
    shapes = {name: array.shape for name, array in get_parameters(model).items()}
    notes, fresh = _fresh_parts(tensors, saved_classes, num_classes, layout)
    if saved_classes is not None and HEAD[0] in fresh:
        tensors = {name: x for name, x in tensors.items() if not name.startswith(HEADS[layout])}
    parameters = from_layout(
        tensors, {name: shape for name, shape in shapes.items() if name not in fresh}, opened.variant, layout
    )
    if fresh:
        if key is None:
            raise UserError(f'{"; ".join(notes)}: give key=jax.random.key(…) to draw it')
        drawn = jax.jit(lambda key: {name: get_parameters(build(key))[name] for name in fresh})(key)
        parameters |= drawn
    class_names = _class_names(opened.config, num_classes)
    return Pretrained(with_parameters(model, parameters), layout, class_names, _processor(opened), fresh, notes)


def save_pretrained(
    model: ConvNeXt | Backbone,
    folder: str | Path,
    *,
    layout: str = 'huggingface',
    class_names: Sequence[str] | None = None,
    processor: ImageProcessor | None = None,
) -> None:
    """Writes a folder that the other library loads as it is.

    'huggingface': `AutoModelForImageClassification.from_pretrained(folder)`, or `ConvNextBackbone`, and its processor.
    'timm': `timm.create_model('local-dir:FOLDER')`, or `checkpoint_path=FOLDER/model.safetensors`. 'original':
    `torch.load('FOLDER/model.pth')['model']`; it takes torch to write.

    Args:
        model: to save; a backbone has the Hugging Face layout alone.
        folder: new or empty.
        layout: one of `LAYOUTS`.
        class_names: of the head's outputs.
        processor: how images are prepared; by default the published one at 224 pixels.

    Raises:
        UserError: the folder is not empty or cannot be written, or the other library has no such model.
    """
    processor = processor_for(model.in_channels, processor)
    if isinstance(model, Backbone):
        if layout != 'huggingface' or class_names is not None:
            raise UserError('a backbone has no classes, and only the huggingface layout holds one')
        tensors, files = backbone_tensors(model), {'config.json': backbone_config(model, processor)}
    else:
        tensors = to_layout(jax.device_get(get_parameters(model)), model.variant, layout)
        files = classifier_config(model, layout, class_names, processor)
    if layout == 'huggingface':
        files['preprocessor_config.json'] = processor.to_huggingface()
    write_folder(Path(folder), tensors, files, torch=layout == 'original')


def _fresh_parts(
    tensors: Tensors, saved_classes: int | None, num_classes: int, layout: str
) -> tuple[list[str], tuple[str, ...]]:
    """Lines on what the file does not give, and the names of those parameters."""
    if saved_classes == num_classes:
        return [], ()
    if saved_classes is not None:
        return [f'the head is fresh: {num_classes} classes here, {saved_classes} in the file'], HEAD
    if any(name.startswith(LAST_NORMS[layout]) for name in tensors):
        return ['the head is fresh: the file has none'], HEAD
    return ['the last norm and the head are fresh: the file has none'], ('norm.scale', 'norm.bias', *HEAD)


def _class_names(config: Mapping, num_classes: int) -> tuple[str, ...] | None:
    names = config.get('label_names')  # timm
    if 'id2label' in config and isinstance(config['id2label'], dict):
        names = [config['id2label'].get(str(label)) for label in range(num_classes)]
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def _processor(opened: Opened) -> ImageProcessor | None:
    path = opened.path
    if path.is_dir() and ((path / 'preprocessor_config.json').is_file() or 'pretrained_cfg' in opened.config):
        return ImageProcessor.from_pretrained(str(path))
    return None
