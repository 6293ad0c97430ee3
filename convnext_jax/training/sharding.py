"""The device mesh and the shardings on it: data parallelism, and fully sharded data parallelism (FSDP).

Batches are sharded over both mesh axes, `data` and `fsdp`. The state is replicated along `data`. Along `fsdp`, large
parameters, their moments and their moving average are sharded, and all-gathered layer by layer when they are used.
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
MIN_SHARDED_SIZE = 2**15
"""Parameters with fewer elements are replicated: sharding saves little memory, and each all-gather has a latency."""


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data` and `fsdp`. Neighbours along `fsdp` are close together, in one slice of a TPU pod.

    Args:
        data, fsdp: lengths of the axes. One of them may be −1: all remaining devices.
        devices: the devices of the mesh; by default all devices.

    Raises:
        UserError: data × fsdp is not the number of devices, or `fsdp` does not fit into a slice.
    """
    devices = jax.devices() if devices is None else devices
    shape = _lengths(data, fsdp, len(devices))
    slices = len({getattr(device, 'slice_index', 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif shape[0] % slices:
        raise UserError(
            f'mesh.fsdp={shape[1]} does not fit into one of the {slices} slices of {len(devices) // slices} devices: '
            f'choose a divisor of {len(devices) // slices}'
        )
    else:
        within = (shape[0] // slices, shape[1])
        grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1), devices, allow_split_physical_axes=True)
    return Mesh(grid, ('data', FSDP_AXIS), axis_types=(AxisType.Auto,) * 2)


def _lengths(data: int, fsdp: int, devices: int) -> tuple[int, int]:
    given = f'mesh.data={data}, mesh.fsdp={fsdp}'
    if data == fsdp == -1:
        raise UserError(f'{given}: only one of them can be −1 (all remaining devices)')
    if min(data, fsdp) < -1 or 0 in (data, fsdp):
        raise UserError(f'{given}: each must be −1 or at least 1')
    known = fsdp if data == -1 else data
    if devices % known or (-1 not in (data, fsdp) and data * fsdp != devices):
        raise UserError(
            f'{given}, but there are {devices} devices: set one to −1, and the other to a divisor of {devices}'
        )
    return devices // fsdp if data == -1 else data, devices // data if fsdp == -1 else fsdp


def describe_mesh(mesh: Mesh) -> str:
    """The axes of a mesh as text, for example 'data=4 × fsdp=2'."""
    return ' × '.join(f'{name}={length}' for name, length in mesh.shape.items())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its leading axis is sharded over all devices of the mesh."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is replicated on all devices."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_sharding(mesh: Mesh, role: Role, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of a parameter, its moments and its moving average.

    The parameter is sharded along `fsdp` if its role has an `fsdp_axis`, it has at least `MIN_SHARDED_SIZE` elements,
    and the axis is divisible. Otherwise it is replicated.
    """
    axis, fsdp = role.fsdp_axis, mesh.shape[FSDP_AXIS]
    if axis is None or fsdp == 1 or np.prod(shape) < MIN_SHARDED_SIZE or shape[axis] % fsdp:
        return replicated(mesh)
    axes: list[str | None] = [None] * len(shape)
    axes[axis] = FSDP_AXIS
    return NamedSharding(mesh, PartitionSpec(*axes))


def parameter_shardings(mesh: Mesh, roles: Roles, parameters: Parameters) -> dict[str, NamedSharding]:
    """`parameter_sharding` of each parameter, by name."""
    return {name: parameter_sharding(mesh, roles[name], x.shape) for name, x in parameters.items()}


def fraction_per_device(mesh: Mesh, roles: Roles, parameters: Parameters) -> float:
    """The fraction of the elements of all parameters that one device stores, in (0, 1]."""
    shardings = parameter_shardings(mesh, roles, parameters)
    held = sum(np.prod(shardings[name].shard_shape(x.shape)) for name, x in parameters.items())
    return float(held) / sum(x.size for x in parameters.values())


def state_sharding(mesh: Mesh, roles: Roles, state: TrainState) -> TrainState:
    """The sharding of each array of the state: `parameter_sharding` for arrays that belong to a parameter.

    All other arrays are replicated, also the statistics and their moving average: they are small, and all devices
    update them identically.
    """

    def sharding(path: tuple, array: jax.Array) -> NamedSharding:
        last = path[-1]
        of_parameter = isinstance(last, DictKey) and last.key in state.parameters
        return parameter_sharding(mesh, roles[last.key], array.shape) if of_parameter else replicated(mesh)

    return tree_map_with_path(sharding, state)


Sums = Any
"""A pytree of arrays that add up over examples."""
SumsAndGradient = Callable[..., tuple[Sums, Parameters, Statistics]]


def map_over_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Makes a per-device function of examples data-parallel over a mesh: each device calls it with its own examples.

    Args:
        function: a function of pytrees of examples that returns a pytree with one value for each example.
        mesh: the device mesh. The examples have `batch_sharding` on it.

    Returns:
        A function with the arguments and results of `function`, on global arrays.
    """
    if mesh.size == 1:
        return function
    examples = batch_sharding(mesh).spec
    return jax.shard_map(function, mesh=mesh, in_specs=examples, out_specs=examples, check_vma=False)


def sum_over_mesh(function: SumsAndGradient, mesh: Mesh, roles: Roles) -> SumsAndGradient:
    """Makes a per-device gradient function data-parallel over a mesh.

    Each device calls `function` with its own examples and its own shards of the parameters. One all-reduce over all
    devices sums the results and the gradients of replicated parameters, and averages the statistics. Gradients of
    sharded parameters are all-reduced along `data` only.

    Args:
        function: a function of parameters, statistics and pytrees of examples. It returns sums over these examples,
            their gradient, and new statistics. It must already sum the gradients of shards over `fsdp`, as
            `models.layers.matmul` does.
        mesh: the device mesh. The parameters have `parameter_sharding` on it, and the examples `batch_sharding`.
        roles: name → role of each parameter.

    Returns:
        A function with the arguments and results of `function`, on global arrays.
    """
    if mesh.size == 1:
        return function

    def over_devices(
        parameters: Parameters, statistics: Statistics, *examples: Any
    ) -> tuple[Sums, Parameters, Statistics]:
        specs = {name: sharding.spec for name, sharding in parameter_shardings(mesh, roles, parameters).items()}

        def on_device(
            parameters: Parameters, statistics: Statistics, *examples: Any
        ) -> tuple[Sums, Parameters, Statistics]:
            sums, gradient, statistics = function(parameters, statistics, *examples)
            shards = {name: g for name, g in gradient.items() if FSDP_AXIS in specs[name]}
            full = {name: g for name, g in gradient.items() if name not in shards}
            sums, full, statistics = jax.lax.psum((sums, full, statistics), mesh.axis_names)
            # Statistics of the global batch are identical on all devices, so the mean does not change them.
            statistics = {name: x / mesh.size for name, x in statistics.items()}
            return sums, full | jax.lax.psum(shards, 'data'), statistics

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(specs, PartitionSpec(), *(batch_sharding(mesh).spec,) * len(examples)),
            out_specs=(PartitionSpec(), specs, PartitionSpec()),
            check_vma=False,  # the replication checker cannot see through custom derivatives
        )(parameters, statistics, *examples)

    return over_devices


def check_batch_size(batch_size: int, accumulation_steps: int, mesh: Mesh) -> None:
    """Checks that a batch divides evenly over devices and accumulation steps.

    Raises:
        UserError: the batch does not divide evenly. The message suggests the nearest valid sizes.
    """
    unit = mesh.size * accumulation_steps
    if batch_size % unit:
        near = sorted({max(batch_size // unit, 1) * unit, (batch_size // unit + 1) * unit})
        raise UserError(
            f'batch_size={batch_size} is not a multiple of {mesh.size} devices × {accumulation_steps} accumulation '
            f'steps: try {" or ".join(map(str, near))}'
        )
