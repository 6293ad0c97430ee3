"""A model's arrays as flat dicts by name: what optimizers, checkpoints, sharding and converters act on.

A parameter is an `nnx.Param`: gradients train it. A statistic is an `nnx.BatchStat`, such as the running mean of a
`BatchNorm`: the model updates it in training, and no gradient does. The weights are both.
"""

from typing import NamedTuple, TypeVar

import jax
from flax import nnx
from jax.tree_util import GetAttrKey, KeyPath, tree_flatten_with_path, tree_map_with_path

Parameters = dict[str, jax.Array]
Statistics = dict[str, jax.Array]
Weights = dict[str, jax.Array]
Network = TypeVar('Network', bound=nnx.Module)


class Role(NamedTuple):
    """How training treats a parameter. The layer that holds it declares this as metadata of the `nnx.Param`.

    Attributes:
        decays: whether weight decay applies to it: to kernels, never to biases, norms, layer scale or GRN.
        fsdp_axis: the axis that may be sharded, because its layer gathers the shards; None if there is none.
    """

    decays: bool = False
    fsdp_axis: int | None = None


def get_parameters(model: nnx.Module) -> Parameters:
    """Name → array, such as 'stages.2.blocks.depthwise.kernel', in the model's order.

    The arrays of a stage's blocks are stacked along a leading axis.
    """
    return {name: variable.get_value() for name, variable in _variables(model, nnx.Param).items()}


def get_statistics(model: nnx.Module) -> Statistics:
    """Name → array of each statistic, in the model's order; {} of a model that has none, such as a ConvNeXt."""
    return {name: variable.get_value() for name, variable in _variables(model, nnx.BatchStat).items()}


def get_weights(model: nnx.Module) -> Weights:
    """The parameters, then the statistics: what an evaluation, an export or a prediction needs."""
    return get_parameters(model) | get_statistics(model)


def parameter_roles(model: nnx.Module) -> dict[str, Role]:
    """Name → role of each parameter, in the order of `get_parameters`."""
    metadata = {name: variable.get_metadata() for name, variable in _variables(model, nnx.Param).items()}
    return {
        name: Role(decays=given.get('decays', False), fsdp_axis=given.get('fsdp_axis'))
        for name, given in metadata.items()
    }


def with_parameters(model: Network, weights: Weights) -> Network:
    """The same architecture with these parameters and, if it has any, statistics.

    Args:
        model: may be abstract, as from `jax.eval_shape`.
        weights: name → array of every parameter and statistic.

    Raises:
        KeyError: one of them is missing.
    """
    return tree_map_with_path(lambda path, _: weights[_name(path[:-1])], model)  # the last part of a path is 'value'


def _variables(model: nnx.Module, kind: type[nnx.Variable]) -> dict[str, nnx.Variable]:
    variables = tree_flatten_with_path(model, is_leaf=lambda node: isinstance(node, nnx.Variable))[0]
    return {_name(path): variable for path, variable in variables if isinstance(variable, kind)}


def _name(path: KeyPath) -> str:
    return '.'.join(str(entry.name if isinstance(entry, GetAttrKey) else entry.idx) for entry in path)
