"""Recognition of the layout and the architecture of a weights file, from tensor names, shapes and config."""

import dataclasses
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convnext_jax.errors import UserError
from convnext_jax.interop.fcmae import split_original
from convnext_jax.interop.files import Tensors, locate, printable, read_file, read_folder, read_json
from convnext_jax.interop.layouts import BLOCK, dense_from_sparse
from convnext_jax.interop.open_clip import TRUNK, image_tower, tower_config
from convnext_jax.interop.openmmlab import has_openmmlab_names, with_original_names, without_detector
from convnext_jax.interop.upernet import split_heads
from convnext_jax.models import VARIANTS, Variant, get_variant, variants

BLOCK_NAMES = re.compile(
    r'(?:^|\.)(?:(?:stages|features(?=\.[1357]\.))\.(\d{1,4})\.(?:layers\.|blocks\.)?|blocks\.)(\d{1,4})\.'
)
"""Beginning of the name of a block's tensor, up to the name of the parameter. torchvision's stages have odd numbers."""
LAYER_SCALES = tuple(f'.{name}' for name in BLOCK['layer_scale'])
MAX_TENSORS = 2000  # five times as many as the largest model has
STEMS = {
    'huggingface': ('embeddings.patch_embeddings.weight',),
    'timm': ('stem.0.weight',),
    'original': ('downsample_layers.0.0.weight', 'stem.weight'),
    'dinov3': ('stages.0.downsample_layers.0.weight',),
    'torchvision': ('features.0.0.weight',),
}
"""Layout → possible endings of the name of the stem's kernel, which every ConvNeXt has."""


OWN_PREFIXES = {
    'huggingface': ('convnext.', 'convnextv2.'),
    'original': ('encoder.',),  # of a pre-training
    'dinov3': ('model.',),
    'openmmlab': ('backbone.',),
}
"""Layout → prefixes of the stem's name that belong to the layout, and not to a wrapper."""
TIMM_SUPPORTED = {
    'global_pool': ('avg', 'fast', 'fastavg'),
    'output_stride': (32,),
    'stem_type': variants.STEMS,
    'head_norm_first': (False, True),
    'conv_bias': (True,),
    'act_layer': variants.ACTIVATIONS,
    'norm_layer': (*variants.NORMS, *(f'{norm}2d' for norm in variants.NORMS)),
    'features_only': (False,),
    'pruned': (False,),
}
"""Argument of timm's ConvNeXt → the values that our models support. Other values are refused."""
TIMM_FIELDS = {
    'depths': 'depths',
    'dims': 'widths',
    'use_grn': 'grn',
    'stem_type': 'stem',
    'act_layer': 'activation',
    'norm_layer': 'norm',
    'norm_eps': 'norm_eps',
    'kernel_sizes': 'kernel_size',
    'head_norm_first': 'head_norm_first',
    'head_hidden_size': 'head_hidden',
}
"""Argument of timm's ConvNeXt → field of the variant."""
TIMM_IGNORED = {
    *('in_chans', 'patch_size', 'num_classes', 'ls_init_value', 'conv_mlp'),  # determined by the tensors
    *('drop_rate', 'drop_path_rate', 'head_init_scale', 'pretrained_strict'),  # used only in training
}


def _are_sizes(values: object, stages: int) -> bool:
    """Whether `values` is a list of `stages` positive integers. Values of 2¹⁶ and above are taken for damage."""
    return (
        isinstance(values, list) and len(values) == stages and all(isinstance(n, int) and 0 < n < 2**16 for n in values)
    )


def _are_kernel_sizes(value: Any) -> bool:
    sizes: list = value if isinstance(value, list) else [value] * 4
    return _are_sizes(sizes, 4) and all(size % 2 and size < 64 for size in sizes)


TIMM_CHECKED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    'depths': ('four numbers above 0', lambda value: _are_sizes(value, 4)),
    'dims': ('four numbers above 0', lambda value: _are_sizes(value, 4)),
    'kernel_sizes': ('an odd number, or four of them', _are_kernel_sizes),
    'head_hidden_size': ('a number', lambda value: isinstance(value, int) and 0 <= value < 2**16),
    'norm_eps': ('a number in (0, 1)', lambda value: isinstance(value, float) and 0 < value < 1),
    'use_grn': ('true or false', lambda value: isinstance(value, bool)),
}
"""Argument of timm's ConvNeXt → description of the valid values, and whether a value is valid."""


class OpenedWeights(NamedTuple):
    """A recognised file or folder of weights.

    Attributes:
        path: the local file or folder.
        tensors: name → tensor, without prefixes of wrappers and with dense convolutions.
        config: content of the folder's `config.json`, or {}. The config of an OpenCLIP model is
            translated to the form of timm's configs.
        layout: one of `layouts.LAYOUTS`.
        file_layout: the layout for messages: 'mmsegmentation' for a UPerNet with OpenMMLab's names, otherwise `layout`.
        class_names: as in `FileContent`.
        variant: the architecture.
        in_channels: channels of the images.
        decoder: name → tensor of the decoder of an FCMAE pre-training, in the original layout; {} for other files.
        heads: name → tensor of the heads of a UPerNet; {} for other files.
        notes: messages for the user about names and tensors that were changed or dropped.
        is_image_tower: whether the weights are an OpenCLIP image tower, whose head is the projection.
    """

    path: Path
    tensors: Tensors
    config: dict
    layout: str
    file_layout: str
    class_names: tuple[str, ...] | None
    variant: Variant
    in_channels: int
    decoder: Tensors
    heads: Tensors
    notes: tuple[str, ...]
    is_image_tower: bool = False


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
    tensors, class_names = read_folder(path) if path.is_dir() else read_file(path, entry)
    if len(tensors) > MAX_TENSORS:
        raise UserError(f'{where} contains {len(tensors)} tensors, which is too many for a ConvNeXt')
    tensors, prefix = without_wrappers(tensors, where)
    tower = image_tower(tensors, where)
    tensors = tower[0] if tower else tensors
    in_openmmlab = has_openmmlab_names(tensors)
    tensors, dropped = without_detector(with_original_names(tensors))
    tensors, heads = split_heads(tensors)
    tensors, decoder = split_original(tensors)
    tensors = dense_from_sparse(tensors)
    file = path / ('open_clip_config.json' if tower else 'config.json')
    config = read_json(file) if path.is_dir() and file.is_file() else {}
    notes = dropped
    if tower:
        config, notes = tower_config(config)
        notes = [*tower[1], *notes]
    layout = recognize_layout(tensors)
    if layout == 'huggingface':
        tensors = _with_prefix(tensors)
    elif layout == 'original':
        tensors = without_distillation(tensors, where)
    backbone_config = config.get('backbone_config') if heads else config
    if heads and config and not isinstance(backbone_config, dict):
        raise UserError(f'config.json: backbone_config must be an object, not {backbone_config}')
    variant = recognize_variant(tensors, backbone_config or {}, name, layout)
    in_channels = _stem_shape(tensors, layout)[1]
    notes += _prefix_notes(prefix, 'openmmlab' if heads or dropped else layout)
    return OpenedWeights(
        path=path,
        tensors=tensors,
        config=config,
        layout=layout,
        file_layout='mmsegmentation' if heads and in_openmmlab else layout,
        class_names=class_names,
        variant=variant,
        in_channels=in_channels,
        decoder=decoder,
        heads=heads,
        notes=tuple(notes),
        is_image_tower=tower is not None,
    )


def without_wrappers(tensors: Tensors, where: str) -> tuple[Tensors, str]:
    """The tensors without the prefixes of wrappers, such as `module.` (DataParallel) or `model.` (Lightning).

    Also returns the prefix, such as 'module.'; '' if there is none.

    The prefix is the part before the name of the stem's kernel, or before `visual.trunk.` in an OpenCLIP model. Other
    names lose the leading components that they share with it: if the prefix is `model.convnext.`, then
    `model.classifier.weight` becomes `classifier.weight`.

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
    parts = wrappers.pop().removesuffix(TRUNK).split('.')[:-1] if wrappers else []
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
    return result, ''.join(f'{part}.' for part in parts)


def _prefix_notes(prefix: str, layout: str) -> list[str]:
    """A message about a prefix that a wrapper has added; [] if there is none, or if it belongs to the layout."""
    for own in OWN_PREFIXES.get(layout, ()):
        if f'.{prefix}'.endswith(f'.{own}'):
            prefix = prefix.removesuffix(own)
            break
    return [f"the prefix '{printable(prefix)}' of the names in the file is ignored"] if prefix else []


def without_distillation(tensors: Tensors, where: str) -> Tensors:
    """The tensors of a DINOv3 or EUPE file without `norms.3.*`, a copy of the last norm, and without `projectors.*`.

    It warns if it drops projectors.

    Args:
        tensors: name → tensor, in the original layout.
        where: the file, for messages.

    Raises:
        UserError: `norms.3.*` differs from the last norm.
    """
    copies = [name for name in tensors if name.startswith('norms.3.')]
    for name in copies:
        norm = name.replace('norms.3.', 'norm.')
        if norm not in tensors or not np.array_equal(np.asarray(tensors[name]), np.asarray(tensors[norm])):
            raise UserError(f'{where}: {printable(name)} is not a copy of {printable(norm)}, as it is in DINOv3')
    projectors = [name for name in tensors if name.startswith('projectors.')]
    if projectors:
        warnings.warn(
            f'{where}: the projectors of its distillation are dropped ({len(projectors)} tensors, projectors.*)',
            stacklevel=4,
        )
    return {name: x for name, x in tensors.items() if name not in copies and name not in projectors}


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
    elif layout in ('huggingface', 'dinov3') and config:
        return _huggingface_variant(config, len(tensors))
    elif layout == 'timm' and 'architecture' in config:
        variant = dataclasses.replace(get_variant(str(config['architecture']).split('.')[0]), **timm_changes)
    else:
        variant = _variant_of_tensors(tensors, layout)
    variant = _with_layer_scale(variant, tensors)
    return variant.replace(patch_size=stem[2]) if variant.stem == 'patch' else variant


class Traits(NamedTuple):
    """What the names and shapes of tensors tell about an architecture; no two of `VARIANTS` have equal traits."""

    depths: tuple[int, ...]
    width: int  # of the first stage
    grn: bool
    stem: str
    kernel_sizes: tuple[int, ...]
    norm_bias: bool
    head_norm_first: bool
    hidden: bool


def _variant_of_tensors(tensors: Tensors, layout: str) -> Variant:
    """The architecture of `list_models()` with the traits of the tensors.

    Raises:
        UserError: there is none.
    """
    blocks: dict[int, set[str]] = {}
    kernels: dict[int, int] = {}
    norm_bias = False
    for name, x in tensors.items():
        if match := BLOCK_NAMES.search(name):
            stage, parameter = int(match[1] or 0), name[match.end() :]
            blocks.setdefault(stage, set()).add(match[2])
            if parameter in BLOCK['depthwise.kernel'] and len(x.shape) == 4:
                kernels[stage] = x.shape[-1]
            norm_bias |= parameter in BLOCK['norm.bias']
    stem, width = _stem_and_width(tensors, layout)
    found = Traits(
        depths=tuple(len(blocks[stage]) for stage in sorted(blocks)),
        width=width,
        grn=_has_grn(tensors),
        stem=stem,
        kernel_sizes=tuple(kernels.get(stage, 7) for stage in sorted(blocks)),
        norm_bias=norm_bias,
        head_norm_first='norm_pre.weight' in tensors,
        hidden='head.pre_logits.fc.weight' in tensors,
    )
    for variant in VARIANTS.values():
        if _traits_of(variant) == found:
            return variant
    if (found.depths, found.width) in {(variant.depths, variant.widths[0]) for variant in VARIANTS.values()}:
        raise UserError(f'no known architecture has these traits: {found}')
    raise UserError(
        f'no known architecture has stages of {found.depths} blocks and {width} channels in the first stage'
    )


def _traits_of(variant: Variant) -> Traits:
    return Traits(
        variant.depths,
        variant.widths[0],
        variant.grn,
        variant.stem,
        variant.kernel_sizes,
        variant.norm == 'layernorm',
        variant.head_norm_first,
        variant.head_hidden > 0,
    )


def _stem_and_width(tensors: Tensors, layout: str) -> tuple[str, int]:
    """The kind of the stem, as in `Variant.stem`, and its number of channels."""
    first = _stem_shape(tensors, layout)[0]
    others = [tensors[name].shape for name in ('stem.1.weight', 'stem.2.weight') if name in tensors]
    second = next((shape[0] for shape in others if len(shape) == 4), None)
    if layout != 'timm' or second is None:
        return 'patch', first
    if 'stem.3.weight' in tensors:
        return 'overlap_act', second
    return ('overlap' if first == second else 'overlap_tiered'), second


def last_epsilon(config: dict, variant: Variant, layout: str) -> float:
    """The epsilon of the last norm: the variant's, except in Hugging Face's models, where the default is 1e-12.

    Raises:
        UserError: the config has an invalid value.
    """
    if layout != 'huggingface':
        return variant.norm_eps
    return _epsilon_in(config, 1e-12)


def _epsilon_in(config: dict, default: float) -> float:
    epsilon = config.get('layer_norm_eps', default)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise UserError(f'config.json: layer_norm_eps must be a number in (0, 1), not {epsilon}')
    return epsilon


def _with_layer_scale(variant: Variant, tensors: Tensors) -> Variant:
    """The variant with a layer scale if every block in the file has one, and without if no block has one.

    V1 and V2 both exist with and without a layer scale.
    """
    scales = sum(name.endswith(LAYER_SCALES) and '.grn.' not in name for name in tensors)
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
        if key not in TIMM_IGNORED | TIMM_CHECKED.keys()
        and not any(value == supported for supported in TIMM_SUPPORTED.get(key, ()))
    ]
    if odd:
        raise UserError(
            f'config.json of timm: {", ".join(odd)} in model_args changes what the model computes, or is unknown'
        )
    for key, (what, valid) in TIMM_CHECKED.items():
        if key in arguments and not valid(arguments[key]):
            raise UserError(f'config.json of timm: {key} must be {what}, not {arguments[key]}')
    if sum(arguments.get('depths', ())) > tensors:
        raise UserError(f'config.json of timm: {tensors} tensors are too few for the depths {arguments["depths"]}')
    changes = {field: arguments[key] for key, field in TIMM_FIELDS.items() if key in arguments}
    if 'norm' in changes:
        changes['norm'] = changes['norm'].removesuffix('2d')
    sizes = changes.get('kernel_size')
    if isinstance(sizes, list) and len(set(sizes)) == 1:
        changes['kernel_size'] = sizes[0]
    return {field: tuple(value) if isinstance(value, list) else value for field, value in changes.items()}


def _huggingface_variant(config: dict, tensors: int) -> Variant:
    kind, depths, widths = (config.get(field) for field in ('model_type', 'depths', 'hidden_sizes'))
    if kind not in ('convnext', 'convnextv2', 'dinov3_convnext'):
        raise UserError(f"config.json: model_type is '{kind}', not convnext, convnextv2 or dinov3_convnext")
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
    variant = Variant(tuple(sizes[0]), tuple(sizes[1]), patch_size=patch_size, grn=grn, layer_scale_init=scale)
    # In DINOv3's models layer_norm_eps is the epsilon of all norms, in the others of the last norm.
    return variant if kind != 'dinov3_convnext' else variant.replace(norm_eps=_epsilon_in(config, 1e-6))


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
