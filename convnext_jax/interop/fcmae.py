"""The encoder and the decoder in FCMAE checkpoints of the original repository."""

from collections.abc import Mapping

import jax
import numpy as np
from einops import rearrange

from convnext_jax.errors import UserError
from convnext_jax.interop.files import Tensors, printable
from convnext_jax.models import Parameters

PARTS = {
    'decoder.project.kernel': 'proj.weight',
    'decoder.project.bias': 'proj.bias',
    'decoder.mask_token': 'mask_token',
    'decoder.block.depthwise.kernel': 'decoder.0.dwconv.weight',
    'decoder.block.depthwise.bias': 'decoder.0.dwconv.bias',
    'decoder.block.norm.scale': 'decoder.0.norm.weight',
    'decoder.block.norm.bias': 'decoder.0.norm.bias',
    'decoder.block.pointwise1.kernel': 'decoder.0.pwconv1.weight',
    'decoder.block.pointwise1.bias': 'decoder.0.pwconv1.bias',
    'decoder.block.grn.gamma': 'decoder.0.grn.gamma',
    'decoder.block.grn.beta': 'decoder.0.grn.beta',
    'decoder.block.pointwise2.kernel': 'decoder.0.pwconv2.weight',
    'decoder.block.pointwise2.bias': 'decoder.0.pwconv2.bias',
    'decoder.predict.kernel': 'pred.weight',
    'decoder.predict.bias': 'pred.bias',
}
"""Name of a parameter of our decoder → its name in the original repository (ConvNeXt-V2, models/fcmae.py)."""


def split_original(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Splits the tensors of a file into encoder and decoder. The second dict is empty if the file has no decoder.

    Args:
        tensors: name → tensor, without the prefix `encoder.`.
    """
    if 'mask_token' not in tensors and not any(name.endswith('.kernel') for name in tensors):
        return tensors, {}
    decoder = {name: x for name, x in tensors.items() if name.startswith(('decoder.', 'proj.', 'pred.', 'mask_token'))}
    return {name: x for name, x in tensors.items() if name not in decoder}, decoder


def decoder_parameters(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> Parameters:
    """Converts the decoder of the original repository to our parameters, in float32.

    Args:
        tensors: the decoder from `split_original`.
        shapes: name of a parameter of our decoder → shape.

    Raises:
        UserError: tensors are missing, unexpected or have another shape. The message lists them.
    """
    problems = [f'{name} is missing' for name in PARTS.values() if name not in tensors]
    problems += [f'{printable(name)} is unexpected' for name in tensors if name not in PARTS.values()]
    parameters = {}
    for ours, theirs in PARTS.items():
        if theirs not in tensors:
            continue
        x = np.asarray(tensors[theirs], np.float32)
        if ours.endswith('depthwise.kernel') and x.ndim == 4:
            x = rearrange(x, 'c i h w -> h w (i c)')
        elif ours.endswith('.kernel'):  # linear layers, or convolutions of 1×1
            x = x.reshape(x.shape[:2]).T if x.shape[2:] in ((), (1, 1)) else x
        elif x.shape[-1:] == shapes[ours] or x.shape[1:2] == shapes[ours]:  # the token and GRN have axes of length 1
            x = x.reshape(-1)
        if x.shape != shapes[ours]:
            problems.append(f'{theirs} is {tensors[theirs].shape}, which does not fit {shapes[ours]}')
        parameters[ours] = jax.device_put(x)
    if problems:
        raise UserError(f'the decoder does not match the original decoder with one block: {"; ".join(problems)}')
    return parameters
