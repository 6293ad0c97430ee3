"""Which library's names a file has, and which architecture its tensors and its config say it is."""

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

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


TIMM_SAME = {
    'global_pool': ('avg', 'fast', 'fastavg'),
    'output_stride': (32,),
    'kernel_sizes': (7, [7, 7, 7, 7]),
    'stem_type': ('patch',),
    'head_norm_first': (False,),
    'head_hidden_size': (0,),
    'conv_bias': (True,),
    'act_layer': ('gelu',),
    'norm_layer': ('layernorm', 'layernorm2d'),
    'norm_eps': (1e-6,),
    'features_only': (False,),
    'pruned': (False,),
}
"""Arguments of timm's ConvNeXt → the values with which it computes what ours does."""
TIMM_OTHERS = {
    *('depths', 'dims', 'use_grn'),  # taken over
    *('in_chans', 'patch_size', 'num_classes', 'ls_init_value', 'conv_mlp'),  # seen in the tensors
    *('drop_rate', 'drop_path_rate', 'head_init_scale', 'pretrained_strict'),  # of its training
}


class Opened(NamedTuple):
    """A file or folder of weights, and what it turned out to be.

    Attributes:
        path: of the file or folder here.
        tensors: under the names of their layout, without those of wrappers; sparse convolutions as dense ones.
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
        raise UserError(f"there is no '{entry}' to choose: {where} is a folder, which holds one set of weights")
    tensors = read_folder(path) if path.is_dir() else read_tensors(path, entry)
    if len(tensors) > MOST_TENSORS:
        raise UserError(f'{where} holds {len(tensors)} tensors: no ConvNeXt has so many')
    tensors = dense_encoder(without_wrappers(tensors, where))
    config = read_json(path / 'config.json') if path.is_dir() and (path / 'config.json').is_file() else {}
    layout = recognize_layout(tensors)
    if layout == 'huggingface':
        tensors = _with_prefix(tensors)
    variant = recognize_variant(tensors, config, name, layout)
    return Opened(path, tensors, config, layout, variant, _stem_shape(tensors, layout)[1])


def without_wrappers(tensors: Tensors, where: str) -> Tensors:
    """The names without what wrappers put before them: DataParallel `module.`, Lightning often `model.`.

    The wrappers are what comes before the stem's name. A name that begins with a part of that loses the part: beside
    `model.convnext.embeddings…`, `model.classifier.weight` becomes `classifier.weight`.

    Args:
        tensors: as the file names them.
        where: what an error calls the file.

    Raises:
        UserError: the file holds several models, or two names become one.
    """
    ends = tuple(end for layout_ends in STEMS.values() for end in layout_ends)
    kernels = [
        name for name, x in tensors.items() if len(x.shape) == 4
    ]  # a norm's weight may be called stem.weight too
    wrappers = {name.removesuffix(end) for name in kernels for end in ends if f'.{name}'.endswith(f'.{end}')}
    if len(wrappers) > 1:
        listed = ', '.join(sorted(f"'{printable(wrapper)}'" for wrapper in wrappers))
        raise UserError(f'{where} holds several models, whose names begin with {listed}: save one of them alone')
    parts = wrappers.pop().split('.')[:-1] if wrappers else []
    result = {}
    for name, x in tensors.items():
        for part in parts:
            if not name.startswith(f'{part}.'):
                break
            name = name.removeprefix(f'{part}.')
        if name in result:
            raise UserError(f'{where} holds {printable(name)} twice, once below {".".join(parts)}: save one alone')
        result[name] = x
    return result


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
    timm_changes = _timm_changes(config, len(tensors)) if layout == 'timm' else {}
    stem = _stem_shape(tensors, layout)
    if name is not None:
        variant = get_variant(str(name).split('.')[0])
    elif layout == 'huggingface' and config:
        return _huggingface_variant(config, len(tensors))
    elif layout == 'timm' and 'architecture' in config:
        variant = dataclasses.replace(get_variant(str(config['architecture']).split('.')[0]), **timm_changes)
    else:
        variant = _variant_of_blocks(tensors, stem[0])
    return _with_layer_scale(variant, tensors).replace(patch_size=stem[2])


def _variant_of_blocks(tensors: Tensors, width: int) -> Variant:
    """The one of `list_models()` that has these blocks; `width` is of the first stage."""
    blocks: dict[int, set[str]] = {}
    for tensor in tensors:
        if match := BLOCK_NAMES.search(tensor):
            blocks.setdefault(int(match[1] or 0), set()).add(match[2])
    depths = tuple(len(blocks[stage]) for stage in sorted(blocks))
    for variant in VARIANTS.values():
        if (variant.depths, variant.widths[0], variant.grn) == (depths, width, _has_grn(tensors)):
            return variant
    raise UserError(f'this is none of our models: its stages have {depths} blocks, the first {width} channels')


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


def _with_layer_scale(variant: Variant, tensors: Tensors) -> Variant:
    """With a layer scale if every block has one, without if none has: both versions are trained either way."""
    scales = sum(name.endswith(('.gamma', '.layer_scale_parameter')) and '.grn.' not in name for name in tensors)
    if scales == 0:
        return variant.replace(layer_scale_init=0)
    if scales == sum(variant.depths) and variant.layer_scale_init == 0:
        return variant.replace(layer_scale_init=1e-6)
    return variant


def _timm_changes(config: dict, tensors: int) -> dict[str, Any]:
    """Where the `model_args` of timm's `config.json` make another architecture of the one it names.

    Raises:
        UserError: they change what no model of ours has otherwise, or are not known.
    """
    arguments = config.get('model_args', {})
    if not isinstance(arguments, dict):
        raise UserError(f'config.json of timm: model_args is {arguments}')
    arguments = {key: value for key, value in arguments.items() if value is not None}  # timm leaves null out
    odd = [
        f'{key}={value}'
        for key, value in arguments.items()
        if key not in TIMM_OTHERS and not any(value == same for same in TIMM_SAME.get(key, ()))
    ]
    if odd:
        raise UserError(
            f'config.json of timm: {", ".join(odd)} in model_args changes what the model computes, or is not known here'
        )
    for key in ('depths', 'dims'):
        if key in arguments and not _are_sizes(arguments[key], 4):
            raise UserError(f'config.json of timm: {key} must be four numbers above 0, not {arguments[key]}')
    if sum(arguments.get('depths', ())) > tensors:
        raise UserError(f'config.json of timm: {tensors} tensors are too few for the depths {arguments["depths"]}')
    changes = {
        field: tuple(arguments[key]) for key, field in (('depths', 'depths'), ('dims', 'widths')) if key in arguments
    }
    return changes | ({'grn': bool(arguments['use_grn'])} if 'use_grn' in arguments else {})


def _are_sizes(values: object, stages: int) -> bool:
    """Whether it is a list of as many whole numbers, of which none makes a model that no file can back."""
    return (
        isinstance(values, list) and len(values) == stages and all(isinstance(n, int) and 0 < n < 2**16 for n in values)
    )


def _huggingface_variant(config: dict, tensors: int) -> Variant:
    kind, depths, widths = (config.get(field) for field in ('model_type', 'depths', 'hidden_sizes'))
    if kind not in ('convnext', 'convnextv2'):
        raise UserError(f"config.json: model_type is '{kind}', not convnext or convnextv2")
    if config.get('hidden_act', 'gelu') != 'gelu':
        raise UserError(f"config.json: hidden_act is '{config['hidden_act']}', and ConvNeXt's is gelu")
    patch_size = config.get('patch_size', 4)
    # A depth that no file can back is refused before anything of that size is built.
    sizes = [depths or [3, 3, 9, 3], widths or [96, 192, 384, 768]]
    valid = isinstance(sizes[0], list) and all(_are_sizes(size, len(sizes[0])) for size in sizes)
    valid = valid and isinstance(patch_size, int) and 0 < patch_size < 1024
    if not valid or sum(sizes[0]) > tensors:
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
    prefix = 'convnextv2.' if _has_grn(tensors) else 'convnext.'
    bare = ('embeddings.', 'encoder.', 'layernorm.', 'hidden_states_norms.')
    return {prefix + name if name.startswith(bare) else name: x for name, x in tensors.items()}
