"""A model's parameters as a flat dict by name: what optimizers, checkpoints, sharding and converters act on."""

from typing import TypeVar

import jax
from jax.tree_util import GetAttrKey, KeyPath, tree_flatten_with_path, tree_map_with_path

from convnext_jax.models.trunk import Trunk

Parameters = dict[str, jax.Array]
Network = TypeVar('Network', bound=Trunk)


def get_parameters(model: Trunk) -> Parameters:
    """Name → array, in the model's order, as in 'stages.2.blocks.depthwise.kernel'; blocks lead with a stacked axis."""
    return {_name(path): leaf for path, leaf in tree_flatten_with_path(model)[0]}


def with_parameters(model: Network, parameters: Parameters) -> Network:
    """The same architecture with these parameters; `model` may be abstract, as from `jax.eval_shape`."""
    return tree_map_with_path(lambda path, _: parameters[_name(path)], model)


def _name(path: KeyPath) -> str:
    parts = [str(entry.name if isinstance(entry, GetAttrKey) else entry.idx) for entry in path]
    return '.'.join(parts[:-1])  # the last part is the nnx.Param's own 'value'
