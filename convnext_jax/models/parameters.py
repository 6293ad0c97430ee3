"""A model's arrays as flat dicts by name, the form in which optimizers, checkpoints, sharding and converters use them.

A parameter is an `nnx.Param`, which gradients train. A statistic is an `nnx.BatchStat`, such as the running mean of a
`BatchNorm`, which the model itself updates in training. The weights are the parameters and the statistics together.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.tree_util import GetAttrKey, KeyPath, tree_flatten_with_path, tree_map_with_path

AnyArray = jax.Array | np.ndarray
"""An array on a device or on the host: a model may get NumPy images, and `with_parameters` NumPy weights."""

Parameters = dict[str, jax.Array]
Statistics = dict[str, jax.Array]
Weights = dict[str, jax.Array]
Network = TypeVar('Network', bound=nnx.Module)


class Role(NamedTuple):
    """How training treats a parameter. The layer declares it as metadata of the `nnx.Param`.

    Attributes:
        decays: whether weight decay applies to the parameter. It applies to kernels, and not to biases, norms, layer
            scale or GRN.
        fsdp_axis: the axis along which the parameter may be sharded, because its layer all-gathers the shards; None if
            the parameter must stay replicated.
    """

    decays: bool = False
    fsdp_axis: int | None = None


def get_parameters(model: nnx.Module) -> Parameters:
    """Name → array of each parameter, in the order of the model's pytree.

    A name is a path such as 'stages.2.blocks.depthwise.kernel'. The arrays of a stage's blocks are stacked along a
    leading axis.
    """
    return {name: variable.get_value() for name, variable in _variables(model, nnx.Param).items()}


def get_statistics(model: nnx.Module) -> Statistics:
    """Name → array of each statistic, in the order of the model's pytree; {} if it has none, as in a ConvNeXt."""
    return {name: variable.get_value() for name, variable in _variables(model, nnx.BatchStat).items()}


def get_weights(model: nnx.Module) -> Weights:
    """Name → array of the parameters, then of the statistics: all arrays that inference needs."""
    return get_parameters(model) | get_statistics(model)


def parameter_roles(model: nnx.Module) -> dict[str, Role]:
    """Name → role of each parameter, in the order of `get_parameters`."""
    metadata = {name: variable.get_metadata() for name, variable in _variables(model, nnx.Param).items()}
    return {
        name: Role(decays=given.get('decays', False), fsdp_axis=given.get('fsdp_axis'))
        for name, given in metadata.items()
    }


def with_parameters(model: Network, weights: Mapping[str, AnyArray]) -> Network:
    """A copy of the model that has these parameters and statistics.

    Args:
        model: a model, or its shapes as from `jax.eval_shape`.
        weights: name → array of every parameter and statistic of the model.

    Raises:
        KeyError: a parameter or statistic is missing.
    """
    return tree_map_with_path(lambda path, _: weights[_name(path[:-1])], model)  # the last entry is 'value'


def _variables(model: nnx.Module, kind: type[nnx.Variable]) -> dict[str, nnx.Variable]:
    variables = tree_flatten_with_path(model, is_leaf=lambda node: isinstance(node, nnx.Variable))[0]
    return {_name(path): variable for path, variable in variables if isinstance(variable, kind)}


def _name(path: KeyPath) -> str:
    return '.'.join(str(entry.name if isinstance(entry, GetAttrKey) else entry.idx) for entry in path)
