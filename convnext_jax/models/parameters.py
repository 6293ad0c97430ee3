"""A model's parameters as a flat dict by name: what optimizers, checkpoints, sharding and converters act on."""

from typing import NamedTuple, TypeVar

import jax
from flax import nnx
from jax.tree_util import GetAttrKey, KeyPath, tree_flatten_with_path, tree_map_with_path

Parameters = dict[str, jax.Array]
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
    return {_name(path[:-1]): leaf for path, leaf in tree_flatten_with_path(model)[0]}  # the last part is 'value'


def parameter_roles(model: nnx.Module) -> dict[str, Role]:
    """Name → role of each parameter, in the order of `get_parameters`."""
    variables = tree_flatten_with_path(model, is_leaf=lambda node: isinstance(node, nnx.Variable))[0]
    metadata = {_name(path): variable.get_metadata() for path, variable in variables}
    return {
        name: Role(decays=given.get('decays', False), fsdp_axis=given.get('fsdp_axis'))
        for name, given in metadata.items()
    }


def with_parameters(model: Network, parameters: Parameters) -> Network:
    """A copy of the model with these parameters; `model` may be abstract, as from `jax.eval_shape`."""
    return tree_map_with_path(lambda path, _: parameters[_name(path[:-1])], model)


def _name(path: KeyPath) -> str:
    return '.'.join(str(entry.name if isinstance(entry, GetAttrKey) else entry.idx) for entry in path)
