"""The device mesh, and which axis of it each array lives on.

Batches are spread over both axes of the mesh, `data` and `fsdp`. Along `data` the state is repeated; along `fsdp` the
large parameters, their moments and their moving average are cut into pieces, and each is whole only where and while
it is used.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, tree_map_with_path

from convnext_jax.checkpoints.state import TrainState
from convnext_jax.errors import UserError
from convnext_jax.models import Parameters, Role, Statistics
from convnext_jax.models.layers import FSDP_AXIS

Roles = dict[str, Role]
SMALL = 2**15
"""Parameters of fewer elements stay whole: to gather them would take longer than their memory is worth."""


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices along two axes; neighbours along `fsdp` lie close together, within a slice of TPUs.

    Args:
        data, fsdp: lengths of the axes; −1, for one of them, takes the devices that are left.
        devices: all there are unless given.

    Raises:
        UserError: the axes do not make up the devices, or `fsdp` would reach over slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = _lengths(data, fsdp, len(devices))
    slices = len({getattr(device, 'slice_index', 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif shape[0] % slices:
        raise UserError(
            f'mesh.fsdp={shape[1]} would reach over the {slices} slices of {len(devices) // slices} devices: '
            'it must divide the devices of one'
        )
    else:
        within = (shape[0] // slices, shape[1])
        grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1), devices, allow_split_physical_axes=True)
    return Mesh(grid, ('data', FSDP_AXIS), axis_types=(AxisType.Auto,) * 2)


def _lengths(data: int, fsdp: int, devices: int) -> tuple[int, int]:
    said = f'mesh.data={data}, mesh.fsdp={fsdp}'
    if data == fsdp == -1:
        raise UserError(f'{said}: only one of them can be −1, for the devices that are left')
    if min(data, fsdp) < -1 or 0 in (data, fsdp):
        raise UserError(f'{said}: each must be −1 or at least 1')
    known = fsdp if data == -1 else data
    if devices % known or (-1 not in (data, fsdp) and data * fsdp != devices):
        raise UserError(
            f'{said}, but there are {devices} devices: give −1 for one, and a divisor of them for the other'
        )
    return devices // fsdp if data == -1 else data, devices // data if fsdp == -1 else fsdp


def describe_mesh(mesh: Mesh) -> str:
    """The lengths of its axes, as 'data=4 × fsdp=2'."""
    return ' × '.join(f'{name}={length}' for name, length in mesh.shape.items())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """A batch's rows are spread over the whole mesh."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_sharding(mesh: Mesh, role: Role, shape: tuple[int, ...]) -> NamedSharding:
    """Where a parameter lives, and its moments and moving average: sharded if its role allows it and it is large."""
    axis, fsdp = role.fsdp_axis, mesh.shape[FSDP_AXIS]
    if axis is None or fsdp == 1 or np.prod(shape) < SMALL or shape[axis] % fsdp:
        return replicated(mesh)
    axes: list[str | None] = [None] * len(shape)
    axes[axis] = FSDP_AXIS
    return NamedSharding(mesh, PartitionSpec(*axes))


def parameters_sharding(mesh: Mesh, roles: Roles, parameters: Parameters) -> dict[str, NamedSharding]:
    """`parameter_sharding` of each parameter, by name."""
    return {name: parameter_sharding(mesh, roles[name], x.shape) for name, x in parameters.items()}


def share_held(mesh: Mesh, roles: Roles, parameters: Parameters) -> float:
    """The share of all parameters that is on one device."""
    shardings = parameters_sharding(mesh, roles, parameters)
    held = sum(np.prod(shardings[name].shard_shape(x.shape)) for name, x in parameters.items())
    return float(held) / sum(x.size for x in parameters.values())


def state_sharding(mesh: Mesh, roles: Roles, state: TrainState) -> TrainState:
    """Where each array of the state lives: what is kept for a parameter, where the parameter does; the rest, whole.

    Statistics are small and are updated by every device alike, so they are replicated, as is their moving average.
    """

    def sharding(path: tuple, array: jax.Array) -> NamedSharding:
        last = path[-1]
        of_parameter = isinstance(last, DictKey) and last.key in state.parameters
        return parameter_sharding(mesh, roles[last.key], array.shape) if of_parameter else replicated(mesh)

    return tree_map_with_path(sharding, state)


Sums = Any
"""A pytree of arrays that add up over examples."""
SumsAndGradient = Callable[..., tuple[Sums, Parameters, Statistics]]


def sum_over_mesh(function: SumsAndGradient, mesh: Mesh, roles: Roles) -> SumsAndGradient:
    """Computes sums over a batch that is sharded over the mesh, and their gradient, sharded as the parameters are.

    Each device computes the sums of its own examples with its own shards of the parameters. One all-reduce adds up the
    sums and the gradients of whole parameters, and averages the statistics; gradients of shards are added up along
    `data` alone.

    Args:
        function: from parameters, statistics and pytrees of examples to sums over these examples, a gradient and new
            statistics. The gradient of a shard is already the sum over the devices along `fsdp`, as
            `models.layers.matmul` gives it.
        mesh: of the parameters, sharded as `parameter_sharding` says, and of the examples.
        roles: of the parameters.
    """
    if mesh.size == 1:
        return function

    def over_devices(
        parameters: Parameters, statistics: Statistics, *examples: Any
    ) -> tuple[Sums, Parameters, Statistics]:
        specs = {name: sharding.spec for name, sharding in parameters_sharding(mesh, roles, parameters).items()}

        def on_device(
            parameters: Parameters, statistics: Statistics, *examples: Any
        ) -> tuple[Sums, Parameters, Statistics]:
            sums, gradient, statistics = function(parameters, statistics, *examples)
            shards = {name: g for name, g in gradient.items() if FSDP_AXIS in specs[name]}
            whole = {name: g for name, g in gradient.items() if name not in shards}
            sums, whole, statistics = jax.lax.psum((sums, whole, statistics), mesh.axis_names)
            # Statistics of a global batch are the same on all devices, and so is their mean.
            statistics = {name: x / mesh.size for name, x in statistics.items()}
            return sums, whole | jax.lax.psum(shards, 'data'), statistics

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(specs, PartitionSpec(), *(batch_sharding(mesh).spec,) * len(examples)),
            out_specs=(PartitionSpec(), specs, PartitionSpec()),
            check_vma=False,  # the check that results are replicated cannot see through custom derivatives
        )(parameters, statistics, *examples)

    return over_devices


def check_batch_size(batch_size: int, accumulation_steps: int, mesh: Mesh) -> None:
    """Refuses a batch that does not divide evenly.

    Raises:
        UserError: with the numbers, and the nearest sizes that work.
    """
    unit = mesh.size * accumulation_steps
    if batch_size % unit:
        near = sorted({max(batch_size // unit, 1) * unit, (batch_size // unit + 1) * unit})
        raise UserError(
            f'batch_size={batch_size} is no multiple of {mesh.size} devices × {accumulation_steps} accumulation steps: '
            f'try {" or ".join(map(str, near))}'
        )
