"""Conversion of our parameters to the names and shapes of other libraries' models (`LAYOUTS`), and back.

The layouts differ in three ways. Convolution kernels are (out, in, H, W) there and (H, W, in, out) here. Linear kernels
are (out, in) there and (in, out) here. Blocks are separate tensors there and stacked along a leading axis here.
"""

import collections
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from einops import rearrange

from convnext_jax.errors import UserError
from convnext_jax.interop.files import Tensors, printable
from convnext_jax.interop.timm_models import has_conv_mlp, special_fields
from convnext_jax.models import Parameters, Variant

LAYOUTS = ('huggingface', 'timm', 'original', 'dinov3', 'torchvision')
"""'dinov3' is the layout of `DINOv3ConvNextModel` in transformers, 'huggingface' of its other ConvNeXts."""
TIMM_STRIDE = 32  # timm's default `output_stride`
MAX_LISTED = 50

# Our module name → names in the order of LAYOUTS. S is the index of the stage, and B the index of the block.
# torchvision counts downsampling layers and stages together: D is 2 · S, and E is 2 · S + 1.
TRUNK = {
    'stem.conv': (
        'embeddings.patch_embeddings',
        'stem.0',
        'downsample_layers.0.0',
        'stages.0.downsample_layers.0',
        'features.0.0',
    ),
    'stem.norm': (
        'embeddings.layernorm',
        'stem.1',
        'downsample_layers.0.1',
        'stages.0.downsample_layers.1',
        'features.0.1',
    ),
    'stages.S.downsample.norm': (
        'encoder.stages.S.downsampling_layer.0',
        'stages.S.downsample.0',
        'downsample_layers.S.0',
        'stages.S.downsample_layers.0',
        'features.D.0',
    ),
    'stages.S.downsample.conv': (
        'encoder.stages.S.downsampling_layer.1',
        'stages.S.downsample.1',
        'downsample_layers.S.1',
        'stages.S.downsample_layers.1',
        'features.D.1',
    ),
    'stages.S.blocks': (
        'encoder.stages.S.layers.B',
        'stages.S.blocks.B',
        'stages.S.B',
        'stages.S.layers.B',
        'features.E.B',
    ),
    'norm': ('layernorm', 'head.norm', 'norm', 'layer_norm', 'classifier.0'),
    'head': ('classifier', 'head.fc', 'head', 'classifier', 'classifier.2'),
}
# Our module name → name in timm, for the overlapping stems. In timm, the activation is a module, stem.1.
OVERLAP = {'stem.first_conv': 'stem.0', 'stem.second_conv': 'stem.1', 'stem.norm': 'stem.2'}
OVERLAP_ACT = {'stem.first_conv': 'stem.0', 'stem.second_conv': 'stem.2', 'stem.norm': 'stem.3'}
TIMM_STEMS = {'patch': {}, 'overlap': OVERLAP, 'overlap_tiered': OVERLAP, 'overlap_act': OVERLAP_ACT}
# Layout → prefixes of the names of the head's tensors; then the prefixes for the layers between trunk and head.
HEADS = {
    'huggingface': ('classifier.',),
    'timm': ('head.fc.',),
    'original': ('head.',),
    'dinov3': ('classifier.',),  # transformers has no classifier of DINOv3 yet
    'torchvision': ('classifier.2.',),
}
LAST_NORMS = {
    'huggingface': ('convnext.layernorm.', 'convnextv2.layernorm.'),
    'timm': ('head.norm.', 'norm_pre.', 'head.pre_logits.'),
    'original': ('norm.',),
    'dinov3': ('layer_norm.',),
    'torchvision': ('classifier.0.',),
}
BLOCK = {
    'depthwise.kernel': ('dwconv.weight', 'conv_dw.weight', 'dwconv.weight', 'depthwise_conv.weight', 'block.0.weight'),
    'depthwise.bias': ('dwconv.bias', 'conv_dw.bias', 'dwconv.bias', 'depthwise_conv.bias', 'block.0.bias'),
    'norm.scale': ('layernorm.weight', 'norm.weight', 'norm.weight', 'layer_norm.weight', 'block.2.weight'),
    'norm.bias': ('layernorm.bias', 'norm.bias', 'norm.bias', 'layer_norm.bias', 'block.2.bias'),
    'pointwise1.kernel': (
        'pwconv1.weight',
        'mlp.fc1.weight',
        'pwconv1.weight',
        'pointwise_conv1.weight',
        'block.3.weight',
    ),
    'pointwise1.bias': ('pwconv1.bias', 'mlp.fc1.bias', 'pwconv1.bias', 'pointwise_conv1.bias', 'block.3.bias'),
    'grn.gamma': ('grn.weight', 'mlp.grn.weight', 'grn.gamma'),
    'grn.beta': ('grn.bias', 'mlp.grn.bias', 'grn.beta'),
    'pointwise2.kernel': (
        'pwconv2.weight',
        'mlp.fc2.weight',
        'pwconv2.weight',
        'pointwise_conv2.weight',
        'block.5.weight',
    ),
    'pointwise2.bias': ('pwconv2.bias', 'mlp.fc2.bias', 'pwconv2.bias', 'pointwise_conv2.bias', 'block.5.bias'),
    'layer_scale': ('layer_scale_parameter', 'gamma', 'gamma', 'gamma', 'layer_scale'),
}
"""Our name of a parameter of a block → names in the order of LAYOUTS; the last two layouts have no GRN."""


class Entry(NamedTuple):
    """One tensor of another layout.

    Attributes:
        theirs: name in the other layout.
        ours: name of our parameter.
        block: index of the block along the leading axis of our parameter; None if the parameter is not stacked.
    """

    theirs: str
    ours: str
    block: int | None


def entries(shapes: Mapping[str, tuple[int, ...]], variant: Variant, layout: str) -> list[Entry]:
    """The tensors of a model in a layout.

    Args:
        shapes: name → shape of our parameters.
        variant: the architecture.
        layout: one of `LAYOUTS`.

    Raises:
        UserError: the layout is unknown, or its library does not support the architecture.
    """
    if layout not in LAYOUTS:
        raise UserError(f"there is no layout '{layout}': choose one of {', '.join(LAYOUTS)}")
    isotropic = len(variant.depths) == 1
    if isotropic and layout != 'original':
        raise UserError(f'the {layout} library has no isotropic ConvNeXt: use the original layout')
    stored = ('norm_eps',) if layout == 'dinov3' else ()
    if layout != 'timm' and (special := special_fields(variant, stored)):
        raise UserError(f'the {layout} library has no ConvNeXt with {", ".join(special)}: use the timm layout')
    if layout in ('dinov3', 'torchvision') and (
        variant.grn or variant.layer_scale_init == 0 or variant.patch_size != 4
    ):
        raise UserError(f'the {layout} library only has the ConvNeXt V1 with layer scale and patch_size=4')
    if layout == 'dinov3' and any(name.startswith('head.') for name in shapes):
        raise UserError('transformers has no classifier of DINOv3: save the model without its head, or as huggingface')
    if not isotropic and not variant.stem_norm:
        raise UserError(f'the {layout} library has no ConvNeXt with several stages and without a norm in the stem')
    if layout == 'huggingface' and variant.grn and variant.layer_scale_init > 0:
        raise UserError("Hugging Face's ConvNeXt V2 has no layer scale, but this model has one")
    if layout == 'timm' and (variant.patch_size == 2 or variant.strides[-2] >= TIMM_STRIDE):
        raise UserError(
            f'timm builds a different network for patch_size={variant.patch_size}: for 2 it adds a downsampling layer, '
            f'and above a total stride of {TIMM_STRIDE} it uses dilation; use another layout'
        )
    result = []
    for ours, shape in shapes.items():
        if '.blocks.' in ours:
            result += [Entry(_block_name(ours, block, variant, layout), ours, block) for block in range(shape[0])]
        else:
            result.append(Entry(_trunk_name(ours, variant, layout), ours, None))
    return result


def to_layout(parameters: Mapping[str, np.ndarray], variant: Variant, layout: str) -> dict[str, np.ndarray]:
    """Our parameters as float32 tensors of another layout; they are views of ours where possible.

    Args:
        parameters: name → array.
        variant: the architecture.
        layout: one of `LAYOUTS`.

    Raises:
        UserError: as for `entries`.
    """
    shapes = {name: array.shape for name, array in parameters.items()}
    tensors = {}
    for theirs, ours, block in entries(shapes, variant, layout):
        array = np.asarray(parameters[ours])
        tensors[theirs] = np.ascontiguousarray(
            _to_their_shape(array if block is None else array[block], ours, variant, layout)
        )
    return tensors


def from_layout(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], variant: Variant, layout: str) -> Parameters:
    """The tensors of another layout as our float32 parameters.

    In addition to the result, the conversion needs memory for the largest parameter.

    Args:
        tensors: all tensors of the model, and no others.
        shapes: name → shape of our parameters.
        variant: the architecture.
        layout: one of `LAYOUTS`.

    Raises:
        UserError: as for `check_tensors`.
    """
    check_tensors(tensors, shapes, variant, layout)
    sources = collections.defaultdict(list)
    for theirs, ours, block in entries(shapes, variant, layout):
        sources[ours].append((theirs, block))
    parameters = {}
    # Each parameter is briefly in memory twice. The largest is converted first, while the others do not exist yet.
    for ours in sorted(shapes, key=lambda name: -math.prod(shapes[name])):
        array = np.empty(shapes[ours], np.float32)
        for theirs, block in sources[ours]:
            target = array if block is None else array[block]
            target[...] = _to_our_shape(np.asarray(tensors[theirs]), ours, target.shape)
        parameters[ours] = jax.device_put(array)
    return {ours: parameters[ours] for ours in shapes}


def check_tensors(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], variant: Variant, layout: str) -> None:
    """Checks that tensors have exactly the names and shapes of a model; arguments as for `from_layout`.

    Raises:
        UserError: tensors are missing, unexpected or of another shape; the message lists up to 50 of them.
    """
    wanted = entries(shapes, variant, layout)
    names = {entry.theirs for entry in wanted}
    problems = [f'{name} is missing' for name in names if name not in tensors]
    problems += [f'{printable(name)} is unexpected' for name in tensors if name not in names]
    for theirs, ours, block in wanted:
        shape = shapes[ours] if block is None else shapes[ours][1:]
        expected = _to_their_shape(np.broadcast_to(0, shape), ours, variant, layout).shape  # takes no memory
        allowed = {expected}
        if '.pointwise' in ours and ours.endswith('.kernel'):  # linear layers, or 1×1 convolutions
            allowed = {expected[:2], (*expected[:2], 1, 1)}
        if theirs in tensors and tensors[theirs].shape not in allowed:
            problems.append(f'{theirs} is {tensors[theirs].shape}, not {expected}')
    check_match(problems, layout)


def check_match(problems: list[str], layout: str) -> None:
    """Checks that there are no differences between a file and the model.

    Raises:
        UserError: there are some; the message lists up to 50 of them.
    """
    if problems:
        more = f'; and {len(problems) - MAX_LISTED} more' if len(problems) > MAX_LISTED else ''
        listed = '; '.join(sorted(problems)[:MAX_LISTED])
        raise UserError(f'the {layout} weights do not match the model: {listed}{more}')


def normed_feature(name: str) -> str | None:
    """The feature map, such as 'stage1', that the norm with this tensor normalises; None for any other tensor.

    Args:
        name: name of a tensor of a backbone in the Hugging Face or original layout.
    """
    match = re.fullmatch(r'\w+\.hidden_states_norms\.(\w+)\.\w+|norm(\d)\.\w+', name)
    if match is None:
        return None
    return match[1] or f'stage{int(match[2]) + 1}'


def dense_from_sparse(tensors: Tensors) -> Tensors:
    """The encoder of an FCMAE pre-training with sparse convolutions, converted to the dense original layout.

    Other tensors are returned unchanged. A sparse kernel is (positions, in, out), or (positions, channels) if it is
    depthwise, with positions in column-major order. Some names have an additional level, as in `norm.ln.weight`
    (ConvNeXt-V2, utils.py). The prefix `encoder.` and the decoder must have been removed (`fcmae.split_original`).

    Raises:
        UserError: a sparse kernel does not have a square number of positions.
    """
    if not any(name.endswith('.kernel') for name in tensors):
        return tensors
    dense = {}
    for name, stored in tensors.items():
        x = np.asarray(stored)
        name = name.replace('.ln.', '.').replace('.linear.', '.')
        if name.endswith('.kernel'):
            side = math.isqrt(len(x)) if x.ndim else 0
            if x.ndim not in (2, 3) or side**2 != len(x) or 0 in x.shape:
                raise UserError(f'{printable(name)} is not a square sparse kernel: its shape is {x.shape}')
            x = rearrange(x, '(w h) i o -> o i h w' if x.ndim == 3 else '(w h) c -> c 1 h w', h=side)
            name = name.removesuffix('kernel') + 'weight'
        elif name.endswith('.bias'):
            x = x.reshape(-1)
        elif '.grn.' in name:
            x = x.reshape(1, 1, 1, -1)
        dense[name] = x
    return {name: x.reshape(1, 1, 1, -1) if '.grn.' in name else x for name, x in dense.items()}


def _block_name(ours: str, block: int, variant: Variant, layout: str) -> str:
    stage, parameter = ours.removeprefix('stages.').split('.blocks.')
    column = LAYOUTS.index(layout)
    if len(variant.depths) == 1:
        return f'blocks.{block}.{BLOCK[parameter][column]}'
    module = _with_stage(TRUNK['stages.S.blocks'][column], stage).replace('B', str(block))
    return _prefix('', variant, layout) + f'{module}.{BLOCK[parameter][column]}'


def _trunk_name(ours: str, variant: Variant, layout: str) -> str:
    module, parameter = ours.rsplit('.', 1)
    parameter = 'bias' if parameter == 'bias' else 'weight'
    if module.startswith('norms.stage') and layout == 'original':
        return f'norm{int(module.removeprefix("norms.stage")) - 1}.{parameter}'
    if module.startswith('norms.'):
        return _prefix(module, variant, layout) + f'hidden_states_{module}.{parameter}'
    if len(variant.depths) == 1 and module == 'stem.conv':
        return f'stem.{parameter}'
    stage = module.split('.')[1] if module.startswith('stages.') else ''
    if layout == 'timm' and (theirs := _timm_module(module, variant)):
        return f'{theirs}.{parameter}'
    theirs = TRUNK[module.replace(f'stages.{stage}.', 'stages.S.') if stage else module][LAYOUTS.index(layout)]
    return _prefix(module, variant, layout) + f'{_with_stage(theirs, stage)}.{parameter}'


def _with_stage(theirs: str, stage: str) -> str:
    """A name of `TRUNK` with the index of the stage; '' for a name without one."""
    if not stage:
        return theirs
    return theirs.replace('S', stage).replace('D', str(2 * int(stage))).replace('E', str(2 * int(stage) + 1))


def _timm_module(module: str, variant: Variant) -> str | None:
    """The name in timm of a module whose name is not in `TRUNK`, or is another one there; None for other modules."""
    if module == 'norm' and variant.head_norm_first:
        return 'norm_pre'
    return 'head.pre_logits.fc' if module == 'hidden' else TIMM_STEMS[variant.stem].get(module)


def _prefix(module: str, variant: Variant, layout: str) -> str:
    if layout != 'huggingface' or module == 'head':
        return ''
    return 'convnextv2.' if variant.grn else 'convnext.'


def _to_their_shape(array: np.ndarray, ours: str, variant: Variant, layout: str) -> np.ndarray:
    """One of our parameters, or one block of a stacked parameter, in the shape of the layout."""
    if ours.endswith('depthwise.kernel'):
        return rearrange(array, 'h w c -> c 1 h w')
    if ours.endswith('conv.kernel'):
        return rearrange(array, 'h w i o -> o i h w')
    if ours.endswith('.kernel'):
        as_convolution = layout == 'timm' and 'pointwise' in ours and has_conv_mlp(variant)
        return rearrange(array, 'i o -> o i 1 1' if as_convolution else 'i o -> o i')
    if ours.endswith('.layer_scale') and layout == 'torchvision':
        return rearrange(array, 'c -> c 1 1')
    if '.grn.' in ours and layout != 'timm':
        return rearrange(array, 'c -> 1 1 1 c')
    return array


def _to_our_shape(tensor: np.ndarray, ours: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of another layout in the shape of our parameter."""
    if ours.endswith('depthwise.kernel'):
        return rearrange(tensor, 'c 1 h w -> h w c')
    if ours.endswith('conv.kernel'):
        return rearrange(tensor, 'o i h w -> h w i o')
    if ours.endswith('.kernel'):
        return rearrange(tensor, 'o i ... -> i (o ...)')
    return tensor.reshape(shape)
