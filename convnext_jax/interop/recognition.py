"""Which library's names a file has, and which architecture its tensors and its config say it is."""

import re
from pathlib import Path
from typing import NamedTuple

from convnext_jax.errors import UserError
from convnext_jax.interop.files import Tensors, locate, printable, read_folder, read_json, read_tensors
from convnext_jax.interop.layouts import dense_encoder
from convnext_jax.models import VARIANTS, Variant, get_variant

BLOCK_NAMES = re.compile(r'(?:^|\.)(?:stages\.(\d{1,4})\.(?:layers\.|blocks\.)?|blocks\.)(\d{1,4})\.')
MOST_TENSORS = 2000  # five times the largest model's
STEMS = {
    'huggingface': ('embeddings.patch_embeddings.weight',),
    'timm': ('stem.0.weight',),
    'original': ('downsample_layers.0.0.weight', 'stem.weight'),
}
"""Layout → how the name of the stem's kernel ends: every ConvNeXt has one."""


class Opened(NamedTuple):
    """A file or folder of weights, and what it turned out to be.

    Attributes:
        path: of the file or folder here.
        tensors: under their full names, those of sparse convolutions as dense ones.
        config: content of the `config.json` beside them, or empty.
        layout: one of `layouts.LAYOUTS`.
        variant: the architecture.
        in_channels: of the images.
    """

    path: Path
    tensors: Tensors
    config: dict
    layout: str
    variant: Variant
    in_channels: int


def open_weights(where: str, *, name: str | None, entry: str | None, revision: str | None) -> Opened:
    """Finds and recognizes weights; arguments as `read_pretrained`.

    Raises:
        UserError: the file cannot be read, or is no ConvNeXt of ours.
    """
    path = locate(where, revision)
    if path.is_dir() and entry:
        raise UserError(f"'{entry}' is chosen from one .pth file, and {where} is a folder")
    tensors = read_folder(path) if path.is_dir() else read_tensors(path, entry)
    if len(tensors) > MOST_TENSORS:
        raise UserError(f'{where} holds {len(tensors)} tensors: no ConvNeXt has so many')
    tensors = dense_encoder(tensors)
    config = read_json(path / 'config.json') if path.is_dir() and (path / 'config.json').is_file() else {}
    layout = recognize_layout(tensors)
    if layout == 'huggingface':
        tensors = _with_prefix(tensors)
    variant = recognize_variant(tensors, config, name, layout)
    return Opened(path, tensors, config, layout, variant, _stem_shape(tensors, layout)[1])


def recognize_layout(tensors: Tensors) -> str:
    """One of `layouts.LAYOUTS`, by the tensors' names.

    Raises:
        UserError: it is none.
    """
    for layout, ends in STEMS.items():
        if any(name.endswith(ends) for name in tensors):
            return layout
    raise UserError(
        f'this is no ConvNeXt of a layout known here: the tensors are {sorted(map(printable, tensors))[:3]} …'
    )


def recognize_variant(tensors: Tensors, config: dict, name: str | None, layout: str) -> Variant:
    """The architecture, as the name or the config says, or else the one of `list_models()` that has these blocks.

    Args:
        tensors: of the file.
        config: content of the `config.json` beside it, or empty.
        name: one of `list_models()`, perhaps with a tag of timm's as in 'convnext_tiny.fb_in1k'; None if not given.
        layout: as `recognize_layout`.

    Raises:
        UserError: it is none of ours, or the config asks for what no ConvNeXt here does.
    """
    if layout == 'timm':
        _check_timm_arguments(config)
        name = name or config.get('architecture')
    stem = _stem_shape(tensors, layout)
    if name is not None:
        return get_variant(str(name).split('.')[0]).replace(patch_size=stem[2])
    if layout == 'huggingface' and config:
        return _huggingface_variant(config, len(tensors))
    blocks: dict[int, set[str]] = {}
    for tensor in tensors:
        if match := BLOCK_NAMES.search(tensor):
            blocks.setdefault(int(match[1] or 0), set()).add(match[2])
    depths = tuple(len(blocks[stage]) for stage in sorted(blocks))
    for variant in VARIANTS.values():
        if (variant.depths, variant.widths[0], variant.grn) == (depths, stem[0], _has_grn(tensors)):
            return variant.replace(patch_size=stem[2])
    raise UserError(f'this is none of our models: its stages have {depths} blocks, the first {stem[0]} channels')


def last_epsilon(config: dict, layout: str) -> float:
    """Of the last norm: in Hugging Face's models 1e-12 by default, in the others 1e-6.

    Raises:
        UserError: the config says something that is none.
    """
    if layout != 'huggingface':
        return 1e-6
    epsilon = config.get('layer_norm_eps', 1e-12)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise UserError(f'config.json: layer_norm_eps is {epsilon}')
    return epsilon


def _check_timm_arguments(config: dict) -> None:
    """Refuses a timm model whose arguments change what it computes."""
    arguments = config.get('model_args', {})
    same = {'norm_eps': 1e-6, 'act_layer': 'gelu', 'kernel_sizes': 7}
    free = ('in_chans', 'patch_size', 'num_classes', 'drop_rate', 'drop_path_rate', 'depths', 'dims', 'ls_init_value')
    if not isinstance(arguments, dict):
        raise UserError(f'config.json of timm: model_args is {arguments}')
    odd = [f'{key}={value}' for key, value in arguments.items() if key not in free and same.get(key) != value]
    if odd:
        raise UserError(f'config.json of timm: no ConvNeXt of ours has {", ".join(odd)}')


def _huggingface_variant(config: dict, tensors: int) -> Variant:
    kind, depths, widths = (config.get(field) for field in ('model_type', 'depths', 'hidden_sizes'))
    if kind not in ('convnext', 'convnextv2'):
        raise UserError(f"config.json: model_type is '{kind}', not convnext or convnextv2")
    if config.get('hidden_act', 'gelu') != 'gelu':
        raise UserError(f"config.json: hidden_act is '{config['hidden_act']}', and ConvNeXt's is gelu")
    patch_size = config.get('patch_size', 4)
    # A depth that no file can back is refused before anything of that size is built.
    sizes = [depths or [3, 3, 9, 3], widths or [96, 192, 384, 768]]
    valid = all(isinstance(size, list) and all(isinstance(n, int) and 0 < n < 2**16 for n in size) for size in sizes)
    valid = valid and isinstance(patch_size, int) and 0 < patch_size < 1024
    if not valid or len(sizes[0]) != len(sizes[1]) or sum(sizes[0]) > tensors:
        raise UserError(f'config.json: depths {depths}, hidden_sizes {widths} and patch_size {patch_size} do not fit')
    grn = kind == 'convnextv2'
    scale = 0 if grn else config.get('layer_scale_init_value', 1e-6)
    if not isinstance(scale, int | float) or not 0 <= scale < 1e9:
        raise UserError(f'config.json: layer_scale_init_value is {scale}')
    return Variant(tuple(sizes[0]), tuple(sizes[1]), patch_size=patch_size, grn=grn, layer_scale_init=scale)


def _stem_shape(tensors: Tensors, layout: str) -> tuple[int, int, int, int]:
    """Of the stem's kernel: (out, in, height, width)."""
    shape = next(x.shape for name, x in tensors.items() if name.endswith(STEMS[layout]))
    if len(shape) != 4 or 0 in shape:
        raise UserError(f"the stem's convolution has shape {shape}, not (out, in, height, width)")
    return shape


def _has_grn(tensors: Tensors) -> bool:
    """Whether it is a V2."""
    return any('.grn.' in name for name in tensors)


def _with_prefix(tensors: Tensors) -> Tensors:
    """The names of a bare ConvNextModel, ConvNextV2Model or backbone as in the model with a head."""
    if not any(name.startswith('embeddings.') for name in tensors):
        return tensors
    prefix = 'convnextv2.' if _has_grn(tensors) else 'convnext.'
    return {prefix + name: x for name, x in tensors.items()}
