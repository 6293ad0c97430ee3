"""The device mesh, and which axis of it each array lives on."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from convnext_jax.errors import UserError
from convnext_jax.training.state import TrainState


def make_mesh(data: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices along one axis, `data`; the devices are those of this machine unless given.

    Raises:
        UserError: `data` is neither −1 nor the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data not in (-1, len(devices)):
        raise UserError(f'mesh.data={data}, but there are {len(devices)} devices: give −1 for all of them')
    return jax.make_mesh((len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """A batch's rows are spread over the mesh."""
    return NamedSharding(mesh, PartitionSpec('data'))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, state: TrainState) -> TrainState:
    """Where each array of the state lives: all are whole on every device."""
    return jax.tree.map(lambda _: replicated(mesh), state)


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
