"""Our parameters under the names, and in the shapes, of the Hugging Face, timm and original models, and back.

The three store the same numbers: convolutions as (out, in, H, W) where ours are (H, W, in, out), linear layers as
(out, in) where ours are (in, out), and each block by itself where ours are stacked along a leading axis.
"""

import collections
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from einops import rearrange

from convnext_jax.errors import UserError
from convnext_jax.interop.files import Tensors, printable
from convnext_jax.models import Parameters, Variant

LAYOUTS = ('huggingface', 'timm', 'original')
TIMM_STRIDE = 32  # its `output_stride` by default
MAX_LISTED = 50

# Module names: ours → theirs, in the order of LAYOUTS. S stands for the stage, B for the block.
TRUNK = {
    'stem.conv': ('embeddings.patch_embeddings', 'stem.0', 'downsample_layers.0.0'),
    'stem.norm': ('embeddings.layernorm', 'stem.1', 'downsample_layers.0.1'),
    'stages.S.downsample.norm': (
        'encoder.stages.S.downsampling_layer.0',
        'stages.S.downsample.0',
        'downsample_layers.S.0',
    ),
    'stages.S.downsample.conv': (
        'encoder.stages.S.downsampling_layer.1',
        'stages.S.downsample.1',
        'downsample_layers.S.1',
    ),
    'stages.S.blocks': ('encoder.stages.S.layers.B', 'stages.S.blocks.B', 'stages.S.B'),
    'norm': ('layernorm', 'head.norm', 'norm'),
    'head': ('classifier', 'head.fc', 'head'),
}
# Layout → how the names of the head, and of the last norm before it, begin.
HEADS = {'huggingface': ('classifier.',), 'timm': ('head.fc.',), 'original': ('head.',)}
LAST_NORMS = {
    'huggingface': ('convnext.layernorm.', 'convnextv2.layernorm.'),
    'timm': ('head.norm.',),
    'original': ('norm.',),
}
BLOCK = {
    'depthwise.kernel': ('dwconv.weight', 'conv_dw.weight', 'dwconv.weight'),
    'depthwise.bias': ('dwconv.bias', 'conv_dw.bias', 'dwconv.bias'),
    'norm.scale': ('layernorm.weight', 'norm.weight', 'norm.weight'),
    'norm.bias': ('layernorm.bias', 'norm.bias', 'norm.bias'),
    'pointwise1.kernel': ('pwconv1.weight', 'mlp.fc1.weight', 'pwconv1.weight'),
    'pointwise1.bias': ('pwconv1.bias', 'mlp.fc1.bias', 'pwconv1.bias'),
    'grn.gamma': ('grn.weight', 'mlp.grn.weight', 'grn.gamma'),
    'grn.beta': ('grn.bias', 'mlp.grn.bias', 'grn.beta'),
    'pointwise2.kernel': ('pwconv2.weight', 'mlp.fc2.weight', 'pwconv2.weight'),
    'pointwise2.bias': ('pwconv2.bias', 'mlp.fc2.bias', 'pwconv2.bias'),
    'layer_scale': ('layer_scale_parameter', 'gamma', 'gamma'),
}


class Entry(NamedTuple):
    """One tensor of another layout: which of our parameters it is, and which block of it, if that is stacked."""

    theirs: str
    ours: str
    block: int | None


def entries(shapes: Mapping[str, tuple[int, ...]], variant: Variant, layout: str) -> list[Entry]:
    """All tensors of a layout.

    Args:
        shapes: our parameters' names → shapes.
        variant: their architecture.
        layout: one of `LAYOUTS`.

    Raises:
        UserError: an unknown layout, or one that has no such architecture.
    """
    if layout not in LAYOUTS:
        raise UserError(f"there is no layout '{layout}': {', '.join(LAYOUTS)}")
    isotropic = len(variant.depths) == 1
    if isotropic and layout != 'original':
        raise UserError(f'the {layout} library has no isotropic ConvNeXt: only the original layout holds it')
    if not isotropic and not variant.stem_norm:
        raise UserError(f'the {layout} library has no ConvNeXt of several stages without a norm in the stem')
    if layout == 'huggingface' and variant.grn and variant.layer_scale_init > 0:
        raise UserError("Hugging Face's ConvNeXt V2 has no layer scale, and this model has one")
    if layout == 'timm' and (variant.patch_size == 2 or variant.strides[-2] >= TIMM_STRIDE):
        raise UserError(
            f'timm builds a ConvNeXt of patch_size={variant.patch_size} otherwise: from 2 with one more downsampling, '
            f'beyond a stride of {TIMM_STRIDE} with dilated stages'
        )
    result = []
    for ours, shape in shapes.items():
        if '.blocks.' in ours:
            result += [Entry(_block_name(ours, block, variant, layout), ours, block) for block in range(shape[0])]
        else:
            result.append(Entry(_trunk_name(ours, variant, layout), ours, None))
    return result


def to_layout(parameters: Mapping[str, np.ndarray], variant: Variant, layout: str) -> dict[str, np.ndarray]:
    """Our parameters as another layout's tensors, float32: views of ours where that is possible.

    Raises:
        UserError: as `entries`.
    """
    shapes = {name: array.shape for name, array in parameters.items()}
    tensors = {}
    for theirs, ours, block in entries(shapes, variant, layout):
        array = np.asarray(parameters[ours])
        tensors[theirs] = np.ascontiguousarray(
            _outward(array if block is None else array[block], ours, variant, layout)
        )
    return tensors


def from_layout(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], variant: Variant, layout: str) -> Parameters:
    """Another layout's tensors as our parameters, float32; beyond them it takes the memory of one.

    Args:
        tensors: all of the model and nothing else.
        shapes: our parameters' names → shapes, which the result has.
        variant: the architecture.
        layout: one of `LAYOUTS`.

    Raises:
        UserError: tensors are missing, unexpected or of another shape; they are listed, up to 50.
    """
    wanted = entries(shapes, variant, layout)
    names = {entry.theirs for entry in wanted}
    problems = [f'{name} is missing' for name in names if name not in tensors]
    problems += [f'{printable(name)} is unexpected' for name in tensors if name not in names]
    for theirs, ours, block in wanted:
        shape = shapes[ours] if block is None else shapes[ours][1:]
        expected = _outward(np.broadcast_to(0, shape), ours, variant, layout).shape  # takes no memory
        allowed = {expected}
        if layout == 'timm' and '.pointwise' in ours and ours.endswith('.kernel'):  # its conv_mlp
            allowed = {expected[:2], (*expected[:2], 1, 1)}
        if theirs in tensors and tensors[theirs].shape not in allowed:
            problems.append(f'{theirs} is {tensors[theirs].shape}, not {expected}')
    if problems:
        more = f'; and {len(problems) - MAX_LISTED} more' if len(problems) > MAX_LISTED else ''
        listed = '; '.join(sorted(problems)[:MAX_LISTED])
        raise UserError(f'the {layout} weights do not fit the model: {listed}{more}')
    sources = collections.defaultdict(list)
    for theirs, ours, block in wanted:
        sources[ours].append((theirs, block))
    parameters = {}
    # The largest first: each is there twice for a moment, and the others are not yet there.
    for ours in sorted(shapes, key=lambda name: -math.prod(shapes[name])):
        array = np.empty(shapes[ours], np.float32)
        for theirs, block in sources[ours]:
            target = array if block is None else array[block]
            target[...] = _inward(np.asarray(tensors[theirs]), ours, target.shape)
        parameters[ours] = jax.device_put(array)
    return {ours: parameters[ours] for ours in shapes}


def dense_encoder(tensors: Tensors) -> Tensors:
    """The encoder of an FCMAE pre-training, kept as sparse convolutions, as the dense original; others as they are.

    A sparse kernel is (places, in, out), or (places, channels) where each channel is by itself, and counts its places
    column by column. Names have a level more, as in `norm.ln.weight` (ConvNeXt-V2, utils.py); `encoder.`, with which
    they begin, is already taken off.
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
                raise UserError(f'{printable(name)} has shape {x.shape}: no sparse kernel of a square')
            x = rearrange(x, '(w h) i o -> o i h w' if x.ndim == 3 else '(w h) c -> c 1 h w', h=side)
            name = name.removesuffix('kernel') + 'weight'
        elif name.endswith('.bias'):
            x = x.reshape(-1)
        elif '.grn.' in name:
            x = x.reshape(1, 1, 1, -1)
        dense[name] = x
    return {
        name: x.reshape(1, 1, 1, -1) if '.grn.' in name else x
        for name, x in dense.items()
        if not name.startswith(('decoder.', 'proj.', 'pred.', 'mask_token'))
    }


def _block_name(ours: str, block: int, variant: Variant, layout: str) -> str:
    stage, parameter = ours.removeprefix('stages.').split('.blocks.')
    column = LAYOUTS.index(layout)
    if len(variant.depths) == 1:
        return f'blocks.{block}.{BLOCK[parameter][column]}'
    module = TRUNK['stages.S.blocks'][column].replace('S', stage).replace('B', str(block))
    return _prefix('', variant, layout) + f'{module}.{BLOCK[parameter][column]}'


def _trunk_name(ours: str, variant: Variant, layout: str) -> str:
    module, parameter = ours.rsplit('.', 1)
    parameter = 'bias' if parameter == 'bias' else 'weight'
    if module.startswith('norms.'):
        return _prefix(module, variant, layout) + f'hidden_states_{module}.{parameter}'
    if len(variant.depths) == 1 and module == 'stem.conv':
        return f'stem.{parameter}'
    stage = module.split('.')[1] if module.startswith('stages.') else ''
    theirs = TRUNK[module.replace(f'stages.{stage}.', 'stages.S.') if stage else module][LAYOUTS.index(layout)]
    return _prefix(module, variant, layout) + f'{theirs.replace("S", stage)}.{parameter}'


def _prefix(module: str, variant: Variant, layout: str) -> str:
    if layout != 'huggingface' or module == 'head':
        return ''
    return 'convnextv2.' if variant.grn else 'convnext.'


def _outward(array: np.ndarray, ours: str, variant: Variant, layout: str) -> np.ndarray:
    """One of our parameters, a block of it if it is stacked, in their shape."""
    if ours.endswith('depthwise.kernel'):
        return rearrange(array, 'h w c -> c 1 h w')
    if ours.endswith('conv.kernel'):
        return rearrange(array, 'h w i o -> o i h w')
    if ours.endswith('.kernel'):
        # timm's sizes below tiny run their linear layers as 1×1 convolutions.
        as_convolution = layout == 'timm' and 'pointwise' in ours and variant.widths[0] < 96
        return rearrange(array, 'i o -> o i 1 1' if as_convolution else 'i o -> o i')
    if '.grn.' in ours and layout != 'timm':
        return rearrange(array, 'c -> 1 1 1 c')
    return array


def _inward(tensor: np.ndarray, ours: str, shape: tuple[int, ...]) -> np.ndarray:
    """One of their tensors in our shape."""
    if ours.endswith('depthwise.kernel'):
        return rearrange(tensor, 'c 1 h w -> h w c')
    if ours.endswith('conv.kernel'):
        return rearrange(tensor, 'o i h w -> h w i o')
    if ours.endswith('.kernel'):
        return rearrange(tensor, 'o i ... -> i (o ...)')
    return tensor.reshape(shape)
