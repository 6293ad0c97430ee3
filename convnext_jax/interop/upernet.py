"""The names and shapes of UPerNet's weights in Hugging Face, mmsegmentation and the original repository."""

import re
from collections.abc import Mapping

import jax
import numpy as np
from einops import rearrange

from convnext_jax.interop.files import Tensors, printable
from convnext_jax.interop.layouts import check_match, from_layout, to_layout
from convnext_jax.interop.openmmlab import BLOCK
from convnext_jax.models import Variant, Weights

UPERNET_LAYOUTS = ('huggingface', 'mmsegmentation', 'original')
"""Layouts of UPerNet's weights. mmsegmentation and the original repository differ only in the names of the blocks."""

HEADS = ('decode_head.', 'auxiliary_head.')
BACKBONE = 'backbone.'
PARAMETERS = {
    'kernel': 'weight',
    'scale': 'weight',
    'bias': 'bias',
    'mean': 'running_mean',
    'variance': 'running_var',
}
"""Our name of a parameter or statistic of the heads → its name in PyTorch."""


def split_heads(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Splits the tensors of a file into those of the backbone and of the heads; {} if there are no heads.

    Args:
        tensors: name → tensor; the names of the backbone's tensors have no prefix.

    Returns:
        The backbone, and the heads.
    """
    heads = {name: x for name, x in tensors.items() if name.startswith(HEADS)}
    return {name: x for name, x in tensors.items() if name not in heads}, heads


def head_name(ours: str, layout: str) -> str:
    """The name in a layout of one of our parameters or statistics of the heads."""
    norm, classifier = ('batch_norm', 'classifier') if layout == 'huggingface' else ('bn', 'conv_seg')
    module, parameter = ours.rsplit('.', 1)
    module = re.sub(r'pooling\.(\d+)', r'psp_modules.\1.1', module)
    module = re.sub(r'^auxiliary_head\.conv\b', 'auxiliary_head.convs.0', module)
    if module.endswith('.classifier'):
        module = module.removesuffix('classifier') + classifier
    elif module.endswith('.norm'):
        module = module.removesuffix('norm') + norm
    else:
        module += '.conv'
    return f'{module}.{PARAMETERS[parameter]}'


def weights_of(
    backbone: Tensors, heads: Tensors, shapes: Mapping[str, tuple[int, ...]], variant: Variant, layout: str
) -> Weights:
    """Converts the tensors of a UPerNet to our parameters and statistics, in float32.

    Args:
        backbone, heads: from `split_heads`.
        shapes: name → shape of our parameters and statistics that the file must have.
        variant: the architecture of the backbone.
        layout: 'huggingface' or 'original'.

    Raises:
        UserError: tensors are missing, unexpected or of another shape; the message lists them.
    """
    ours_to_theirs = {name: head_name(name, layout) for name in shapes if name.startswith(HEADS)}
    problems = [f'{theirs} is missing' for theirs in ours_to_theirs.values() if theirs not in heads]
    problems += [f'{printable(name)} is unexpected' for name in heads if name not in ours_to_theirs.values()]
    for ours, theirs in ours_to_theirs.items():
        expected = _to_their_shape(np.broadcast_to(0, shapes[ours]), ours).shape
        if theirs in heads and heads[theirs].shape != expected:
            problems.append(f'{theirs} is {heads[theirs].shape}, not {expected}')
    check_match(problems, layout)
    trunk = {name.removeprefix(BACKBONE): shape for name, shape in shapes.items() if name.startswith(BACKBONE)}
    weights = {BACKBONE + name: x for name, x in from_layout(backbone, trunk, variant, layout).items()}
    for ours, theirs in ours_to_theirs.items():
        x = np.asarray(heads[theirs], np.float32)
        weights[ours] = jax.device_put(rearrange(x, 'o i h w -> h w i o').reshape(shapes[ours]) if x.ndim == 4 else x)
    return {name: weights[name] for name in shapes}


def tensors_of(weights: Mapping[str, np.ndarray], variant: Variant, layout: str) -> dict[str, np.ndarray]:
    """Our parameters and statistics as tensors of a layout.

    Args:
        weights: name → array of all parameters and statistics.
        variant: the architecture of the backbone.
        layout: one of `UPERNET_LAYOUTS`.

    Raises:
        UserError: the other library does not support the architecture.
    """
    backbone = {name.removeprefix(BACKBONE): x for name, x in weights.items() if name.startswith(BACKBONE)}
    if layout == 'huggingface':
        trunk = {name.split('.', 1)[1]: x for name, x in to_layout(backbone, variant, layout).items()}
    else:
        trunk = to_layout(backbone, variant, 'original')
    if layout == 'mmsegmentation':
        table = {original: theirs for theirs, original in BLOCK.items()}
        trunk = {_renamed(name, table): x.reshape(-1) if '.grn.' in name else x for name, x in trunk.items()}
    tensors = {BACKBONE + name: x for name, x in trunk.items()}
    for ours, x in weights.items():
        if ours.startswith(HEADS):
            theirs = head_name(ours, layout)
            tensors[theirs] = np.ascontiguousarray(_to_their_shape(np.asarray(x), ours))
            if ours.endswith('.norm.variance'):  # PyTorch counts the batches, but only uses the count without momentum
                tensors[theirs.replace('running_var', 'num_batches_tracked')] = np.zeros((), np.int64)
    return tensors


def _to_their_shape(array: np.ndarray, ours: str) -> np.ndarray:
    if ours.endswith('.classifier.kernel'):
        return rearrange(array, 'i o -> o i 1 1')
    return rearrange(array, 'h w i o -> o i h w') if ours.endswith('.kernel') else array


def _renamed(name: str, table: Mapping[str, str]) -> str:
    return '.'.join(table.get(part, part) for part in name.split('.'))
