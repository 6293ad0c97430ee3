"""Recognition of the layout and the architecture of a weights file, from tensor names, shapes and config."""

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

from convnext_jax.errors import UserError
from convnext_jax.interop.fcmae import split_original
from convnext_jax.interop.files import Tensors, locate, printable, read_folder, read_json, read_tensors
from convnext_jax.interop.layouts import dense_from_sparse
from convnext_jax.interop.upernet import split_heads
from convnext_jax.models import VARIANTS, Variant, get_variant

BLOCK_NAMES = re.compile(r'(?:^|\.)(?:stages\.(\d{1,4})\.(?:layers\.|blocks\.)?|blocks\.)(\d{1,4})\.')
MAX_TENSORS = 2000  # five times as many as the largest model has
STEMS = {
    'huggingface': ('embeddings.patch_embeddings.weight',),
    'timm': ('stem.0.weight',),
    'original': ('downsample_layers.0.0.weight', 'stem.weight'),
}
"""Layout → possible endings of the name of the stem's kernel, which every ConvNeXt has."""


TIMM_SUPPORTED = {
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
"""Argument of timm's ConvNeXt → the values with which timm's model equals ours. Other values are refused."""
TIMM_IGNORED = {
    *('depths', 'dims', 'use_grn'),  # applied to the variant
    *('in_chans', 'patch_size', 'num_classes', 'ls_init_value', 'conv_mlp'),  # determined by the tensors
    *('drop_rate', 'drop_path_rate', 'head_init_scale', 'pretrained_strict'),  # used only in training
}


class OpenedWeights(NamedTuple):
    """A recognised file or folder of weights.

    Attributes:
        path: the local file or folder.
        tensors: name → tensor, without prefixes of wrappers and with dense convolutions.
        config: content of the folder's `config.json`, or {}.
        layout: one of `layouts.LAYOUTS`.
        variant: the architecture.
        in_channels: channels of the images.
        decoder: name → tensor of the decoder of an FCMAE pre-training, in the original layout; {} for other files.
        heads: name → tensor of the heads of a UPerNet; {} for other files.
    """

    path: Path
    tensors: Tensors
    config: dict
    layout: str
    variant: Variant
    in_channels: int
    decoder: Tensors
    heads: Tensors


def open_weights(
    where: str | Path | OpenedWeights, *, name: str | None, entry: str | None, revision: str | None
) -> OpenedWeights:
    """Finds and recognises weights; arguments as for `read_pretrained`. Opened weights are returned unchanged.

    Raises:
        UserError: the file cannot be read, or is not a supported ConvNeXt.
    """
    if isinstance(where, OpenedWeights):
        return where
    where = str(where)
    path = locate(where, revision)
    if path.is_dir() and entry:
        raise UserError(f"there is no entry '{entry}': {where} is a folder, which contains only one set of weights")
    tensors = read_folder(path) if path.is_dir() else read_tensors(path, entry)
    if len(tensors) > MAX_TENSORS:
        raise UserError(f'{where} contains {len(tensors)} tensors, which is too many for a ConvNeXt')
    tensors, heads = split_heads(without_wrappers(tensors, where))
    tensors, decoder = split_original(tensors)
    tensors = dense_from_sparse(tensors)
    config = read_json(path / 'config.json') if path.is_dir() and (path / 'config.json').is_file() else {}
    layout = recognize_layout(tensors)
    if layout == 'huggingface':
        tensors = _with_prefix(tensors)
    backbone_config = config.get('backbone_config') if heads else config
    if heads and config and not isinstance(backbone_config, dict):
        raise UserError(f'config.json: backbone_config must be an object, not {backbone_config}')
    variant = recognize_variant(tensors, backbone_config or {}, name, layout)
    return OpenedWeights(path, tensors, config, layout, variant, _stem_shape(tensors, layout)[1], decoder, heads)


def without_wrappers(tensors: Tensors, where: str) -> Tensors:
    """The tensors without the prefixes of wrappers, such as `module.` (DataParallel) or `model.` (Lightning).

    The prefix is the part before the name of the stem's kernel. Other names lose the leading components that they share
    with it: if the prefix is `model.convnext.`, then `model.classifier.weight` becomes `classifier.weight`.

    Args:
        tensors: name in the file → tensor.
        where: the file, for error messages.

    Raises:
        UserError: the file contains several models, or two tensors get one name.
    """
    ends = tuple(end for layout_ends in STEMS.values() for end in layout_ends)
    kernels = [name for name, x in tensors.items() if len(x.shape) == 4]  # a norm may also be called stem.weight
    wrappers = {name.removesuffix(end) for name in kernels for end in ends if f'.{name}'.endswith(f'.{end}')}
    if len(wrappers) > 1:
        listed = ', '.join(sorted(f"'{printable(wrapper)}'" for wrapper in wrappers))
        raise UserError(f'{where} contains several models with the prefixes {listed}: save only one of them')
    parts = wrappers.pop().split('.')[:-1] if wrappers else []
    result = {}
    for name, x in tensors.items():
        for part in parts:
            if not name.startswith(f'{part}.'):
                break
            name = name.removeprefix(f'{part}.')
        if name in result:
            raise UserError(
                f'{where} contains {printable(name)} twice, once with the prefix {".".join(parts)}: save only one'
            )
        result[name] = x
    return result


def recognize_layout(tensors: Tensors) -> str:
    """The layout, one of `layouts.LAYOUTS`, of tensors with these names.

    Raises:
        UserError: the layout is unknown.
    """
    for layout, ends in STEMS.items():
        if any(name.endswith(ends) for name in tensors):
            return layout
    raise UserError(
        f'this is not a ConvNeXt in a known layout: the tensors are {sorted(map(printable, tensors))[:3]} …'
    )


def recognize_variant(tensors: Tensors, config: dict, name: str | None, layout: str) -> Variant:
    """The architecture, from the name or the config, or else by comparison with all known architectures.

    Args:
        tensors: name → tensor.
        config: content of the folder's `config.json`, or {}.
        name: one of `list_models()`, optionally with a tag of timm, as in 'convnext_tiny.fb_in1k'; None if not given.
        layout: one of `layouts.LAYOUTS`.

    Raises:
        UserError: the architecture is unknown, or the config has unsupported options.
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
    """The architecture of `list_models()` with these blocks; `width` is the number of channels of the first stage."""
    blocks: dict[int, set[str]] = {}
    for tensor in tensors:
        if match := BLOCK_NAMES.search(tensor):
            blocks.setdefault(int(match[1] or 0), set()).add(match[2])
    depths = tuple(len(blocks[stage]) for stage in sorted(blocks))
    for variant in VARIANTS.values():
        if (variant.depths, variant.widths[0], variant.grn) == (depths, width, _has_grn(tensors)):
            return variant
    raise UserError(f'no known architecture has stages of {depths} blocks and {width} channels in the first stage')


def last_epsilon(config: dict, layout: str) -> float:
    """The epsilon of the last norm: by default 1e-12 in Hugging Face's models, else 1e-6.

    Raises:
        UserError: the config has an invalid value.
    """
    if layout != 'huggingface':
        return 1e-6
    epsilon = config.get('layer_norm_eps', 1e-12)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise UserError(f'config.json: layer_norm_eps must be a number in (0, 1), not {epsilon}')
    return epsilon


def _with_layer_scale(variant: Variant, tensors: Tensors) -> Variant:
    """The variant with a layer scale if every block in the file has one, and without if no block has one.

    V1 and V2 both exist with and without a layer scale.
    """
    scales = sum(name.endswith(('.gamma', '.layer_scale_parameter')) and '.grn.' not in name for name in tensors)
    if scales == 0:
        return variant.replace(layer_scale_init=0)
    if scales == sum(variant.depths) and variant.layer_scale_init == 0:
        return variant.replace(layer_scale_init=1e-6)
    return variant


def _timm_changes(config: dict, tensors: int) -> dict[str, Any]:
    """The fields of the variant that `model_args` in timm's `config.json` changes.

    Raises:
        UserError: an argument is unknown, invalid or not supported.
    """
    arguments = config.get('model_args', {})
    if not isinstance(arguments, dict):
        raise UserError(f'config.json of timm: model_args must be an object, not {arguments}')
    arguments = {key: value for key, value in arguments.items() if value is not None}  # timm ignores null
    odd = [
        f'{key}={value}'
        for key, value in arguments.items()
        if key not in TIMM_IGNORED and not any(value == supported for supported in TIMM_SUPPORTED.get(key, ()))
    ]
    if odd:
        raise UserError(
            f'config.json of timm: {", ".join(odd)} in model_args changes what the model computes, or is unknown'
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
    """Whether `values` is a list of `stages` positive integers. Values of 2¹⁶ and above are taken for damage."""
    return (
        isinstance(values, list) and len(values) == stages and all(isinstance(n, int) and 0 < n < 2**16 for n in values)
    )


def _huggingface_variant(config: dict, tensors: int) -> Variant:
    kind, depths, widths = (config.get(field) for field in ('model_type', 'depths', 'hidden_sizes'))
    if kind not in ('convnext', 'convnextv2'):
        raise UserError(f"config.json: model_type is '{kind}', not convnext or convnextv2")
    if config.get('hidden_act', 'gelu') != 'gelu':
        raise UserError(f"config.json: hidden_act is '{config['hidden_act']}', but ConvNeXt has gelu")
    patch_size = config.get('patch_size', 4)
    # A config with more blocks than the file has tensors is refused before a model of that size is built.
    sizes = [depths or [3, 3, 9, 3], widths or [96, 192, 384, 768]]
    valid = isinstance(sizes[0], list) and all(_are_sizes(size, len(sizes[0])) for size in sizes)
    valid = valid and isinstance(patch_size, int) and 0 < patch_size < 1024
    if not valid or sum(sizes[0]) > tensors:
        raise UserError(f'config.json: depths {depths}, hidden_sizes {widths} and patch_size {patch_size} are invalid')
    grn = kind == 'convnextv2'
    scale = 0 if grn else config.get('layer_scale_init_value', 1e-6)
    if not isinstance(scale, int | float) or not 0 <= scale < 1e9:
        raise UserError(f'config.json: layer_scale_init_value must be a number ≥ 0, not {scale}')
    return Variant(tuple(sizes[0]), tuple(sizes[1]), patch_size=patch_size, grn=grn, layer_scale_init=scale)


def _stem_shape(tensors: Tensors, layout: str) -> tuple[int, int, int, int]:
    """The shape of the stem's kernel: (out, in, height, width)."""
    shape = next(x.shape for name, x in tensors.items() if name.endswith(STEMS[layout]))
    if len(shape) != 4 or 0 in shape:
        raise UserError(f"the stem's convolution has shape {shape}, not (out, in, height, width)")
    return shape


def _has_grn(tensors: Tensors) -> bool:
    """Whether the tensors belong to a ConvNeXt V2."""
    return any('.grn.' in name for name in tensors)


def _with_prefix(tensors: Tensors) -> Tensors:
    """The tensors of a ConvNextModel, ConvNextV2Model or backbone, with the prefix of a classifier's trunk."""
    prefix = 'convnextv2.' if _has_grn(tensors) else 'convnext.'
    bare = ('embeddings.', 'encoder.', 'layernorm.', 'hidden_states_norms.')
    return {prefix + name if name.startswith(bare) else name: x for name, x in tensors.items()}
