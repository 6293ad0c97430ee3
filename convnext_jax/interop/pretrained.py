"""load_pretrained and save_pretrained: whole models in the folders and files of the other libraries."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from safetensors.numpy import save_file

from convnext_jax.errors import UserError, first_line
from convnext_jax.interop.files import Tensors, locate, read_folder, read_json, read_tensors
from convnext_jax.interop.layouts import dense_encoder, from_layout, to_layout
from convnext_jax.interop.processor import ImageProcessor
from convnext_jax.interop.recognition import (
    has_grn,
    last_epsilon,
    recognize_layout,
    recognize_variant,
    stem_kernel,
)
from convnext_jax.models import VARIANTS, ConvNeXt, Variant, create_model, get_parameters, with_parameters

HEAD = ('head.kernel', 'head.bias')
HEAD_MODULES = {'huggingface': 'classifier.', 'timm': 'head.fc.', 'original': 'head.'}
LAST_NORMS = {
    'huggingface': ('convnext.layernorm.weight', 'convnextv2.layernorm.weight'),
    'timm': ('head.norm.weight',),
    'original': ('norm.weight',),
}
HEAD_BIASES = tuple(f'{module}bias' for module in HEAD_MODULES.values())


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
    remat: bool = False,
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
        drop_path_rate, head_init_scale, remat, dtype: as `create_model`.

    Raises:
        UserError: the file cannot be read, is of another model, or has tensors missing, left over or misshapen; all
            are listed.
    """
    path = locate(str(where), revision)
    if path.is_dir() and entry:
        raise UserError(f"'{entry}' is chosen from one .pth file, and {where} is a folder")
    tensors = read_folder(path) if path.is_dir() else read_tensors(path, entry)
    config = read_json(path / 'config.json') if path.is_dir() and (path / 'config.json').is_file() else {}
    tensors = dense_encoder(tensors)
    layout = recognize_layout(tensors)
    if layout == 'huggingface':
        tensors = _with_prefix(tensors)
    variant = recognize_variant(tensors, config, name, layout)
    saved_classes = next((tensors[bias].size for bias in HEAD_BIASES if bias in tensors), None)
    num_classes = saved_classes if num_classes is None else num_classes
    if num_classes is None:
        raise UserError(f'{where} has no head: give num_classes=, and key= for a fresh one')

    def build(key: jax.Array) -> ConvNeXt:
        return create_model(
            variant,
            key=key,
            num_classes=num_classes,
            drop_path_rate=drop_path_rate,
            head_init_scale=head_init_scale,
            layer_norm_eps=last_epsilon(config, layout),
            in_channels=stem_kernel(tensors, layout).shape[1],
            remat=remat,
            dtype=dtype,
        )

    model = jax.eval_shape(build, jax.random.key(0))
    shapes = {name: array.shape for name, array in get_parameters(model).items()}
    notes, fresh = _fresh_parts(tensors, saved_classes, num_classes, layout)
    if saved_classes is not None and HEAD[0] in fresh:
        tensors = {name: x for name, x in tensors.items() if not name.startswith(HEAD_MODULES[layout])}
    parameters = from_layout(
        tensors, {name: shape for name, shape in shapes.items() if name not in fresh}, variant, layout
    )
    if fresh:
        if key is None:
            raise UserError(f'{"; ".join(notes)}: give key=jax.random.key(…) to draw it')
        drawn = jax.jit(lambda key: {name: get_parameters(build(key))[name] for name in fresh})(key)
        parameters |= drawn
    model = with_parameters(model, {name: jnp.asarray(array) for name, array in parameters.items()})
    return Pretrained(model, layout, _class_names(config, num_classes), _processor(path, config), fresh, notes)


def save_pretrained(
    model: ConvNeXt,
    folder: str | Path,
    *,
    layout: str = 'huggingface',
    class_names: Sequence[str] | None = None,
    processor: ImageProcessor | None = None,
) -> None:
    """Writes a folder that the other library loads as it is.

    'huggingface': `AutoModelForImageClassification.from_pretrained(folder)`, and its processor. 'timm':
    `timm.create_model('local-dir:FOLDER')`, or `checkpoint_path=FOLDER/model.safetensors`. 'original':
    `torch.load('FOLDER/model.pth')['model']`; it takes torch to write.

    Args:
        model: to save.
        folder: new or empty.
        layout: one of `LAYOUTS`.
        class_names: of the head's outputs.
        processor: how images are prepared; by default the published one at 224 pixels.

    Raises:
        UserError: the folder is not empty or cannot be written, or the other library has no such model.
    """
    folder, variant = Path(folder), model.variant
    channels, num_classes = model.stem.conv.kernel.shape[2], model.head.bias.shape[0]
    if processor is None:
        processor = ImageProcessor(mean=(0.5,), std=(0.5,)) if channels == 1 else ImageProcessor()
    if class_names is not None and (len(class_names) != num_classes or len(set(class_names)) != num_classes):
        raise UserError(f'{len(class_names)} class names for {num_classes} classes: give as many, none twice')
    tensors = to_layout(jax.device_get(get_parameters(model)), variant, layout)
    files = {}
    if layout == 'huggingface':
        files['config.json'] = _huggingface_config(model, class_names, processor)
        files['preprocessor_config.json'] = processor.to_huggingface()
    elif layout == 'timm':
        files['config.json'] = _timm_config(variant, channels, num_classes, class_names, processor)
    if layout != 'huggingface' and model.norm.epsilon != 1e-6:
        warnings.warn(f"{layout} has no place for the last norm's epsilon of {model.norm.epsilon}", stacklevel=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f'{folder} is not empty: give a new folder')
        if layout == 'original':
            _save_torch(tensors, folder / 'model.pth')
        else:
            save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + '\n')
    except OSError as error:
        raise UserError(f'{folder} cannot be written: {first_line(error)}') from error


def _with_prefix(tensors: Tensors) -> Tensors:
    """The names of a bare ConvNextModel or ConvNextV2Model as in the model with a head."""
    if not any(name.startswith('embeddings.') for name in tensors):
        return tensors
    prefix = 'convnextv2.' if has_grn(tensors) else 'convnext.'
    return {prefix + name: x for name, x in tensors.items()}


def _fresh_parts(
    tensors: Tensors, saved_classes: int | None, num_classes: int, layout: str
) -> tuple[list[str], tuple[str, ...]]:
    """Lines on what the file does not give, and the names of those parameters."""
    if saved_classes == num_classes:
        return [], ()
    if saved_classes is not None:
        return [f'the head is fresh: {num_classes} classes here, {saved_classes} in the file'], HEAD
    if any(name in tensors for name in LAST_NORMS[layout]):
        return ['the head is fresh: the file has none'], HEAD
    return ['the last norm and the head are fresh: the file has none'], ('norm.scale', 'norm.bias', *HEAD)


def _class_names(config: Mapping, num_classes: int) -> tuple[str, ...] | None:
    names = config.get('label_names')  # timm
    if 'id2label' in config and isinstance(config['id2label'], dict):
        names = [config['id2label'].get(str(label)) for label in range(num_classes)]
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def _processor(path: Path, config: dict) -> ImageProcessor | None:
    if path.is_dir() and ((path / 'preprocessor_config.json').is_file() or 'pretrained_cfg' in config):
        return ImageProcessor.from_pretrained(str(path))
    return None


def _huggingface_config(model: ConvNeXt, class_names: Sequence[str] | None, processor: ImageProcessor) -> dict:
    variant = model.variant
    kind = 'ConvNextV2' if variant.grn else 'ConvNext'
    names = class_names or [f'LABEL_{label}' for label in range(model.head.bias.shape[0])]
    config = {
        'architectures': [f'{kind}ForImageClassification'],
        'model_type': kind.lower(),
        'depths': list(variant.depths),
        'hidden_sizes': list(variant.widths),
        'num_stages': len(variant.depths),
        'patch_size': variant.patch_size,
        'num_channels': model.stem.conv.kernel.shape[2],
        'image_size': processor.size,
        'hidden_act': 'gelu',
        'layer_norm_eps': model.norm.epsilon,
        'drop_path_rate': 0.0,
        'initializer_range': 0.02,
        'id2label': {str(label): name for label, name in enumerate(names)},
        'label2id': {name: label for label, name in enumerate(names)},
        'torch_dtype': 'float32',
    }
    return config if variant.grn else config | {'layer_scale_init_value': variant.layer_scale_init}


def _timm_config(
    variant: Variant,
    channels: int,
    num_classes: int,
    class_names: Sequence[str] | None,
    processor: ImageProcessor,
) -> dict:
    same = (variant.depths, variant.widths, variant.grn, variant.layer_scale_init > 0)
    names = [name for name, v in VARIANTS.items() if (v.depths, v.widths, v.grn, v.layer_scale_init > 0) == same]
    if variant.patch_size == 2:
        raise UserError('timm gives a ConvNeXt of patch_size=2 one more downsampling: it has no such model')
    if not names:
        raise UserError(f'timm has no ConvNeXt of depths {variant.depths} and widths {variant.widths}')
    images = processor.to_timm()
    config = {
        'architecture': names[0],
        'num_classes': num_classes,
        'num_features': variant.widths[-1],
        'model_args': {'in_chans': channels, 'patch_size': variant.patch_size},
        'pretrained_cfg': images | {'num_classes': num_classes, 'first_conv': 'stem.0', 'classifier': 'head.fc'},
    }
    return config | ({'label_names': list(class_names)} if class_names else {})


def _save_torch(tensors: Tensors, path: Path) -> None:
    try:
        import torch
    except ImportError as error:
        raise UserError('the original layout is a PyTorch file: pip install torch to write it') from error
    torch.save({'model': {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}}, path)
