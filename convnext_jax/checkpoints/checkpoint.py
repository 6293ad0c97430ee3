"""One Orbax checkpoint: what it holds, and how it comes back, checked bit for bit.

A checkpoint has an item for the weights, the optimizer, the moving average and the counters of `TrainState`, and a
manifest: place in the data, config, metrics, for each array its shape, type and a fingerprint of its bits, and a
checksum of all this. Orbax alone would restore part of a tree, or flipped bits, in silence.

The item of the weights is called `parameters`, and holds the statistics beside them, as the moving average does.
"""

import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.tree_util import KeyPath, keystr, tree_flatten_with_path

from convnext_jax.checkpoints.state import TrainState
from convnext_jax.checkpoints.workdir import checkpoints_for_orbax, is_local
from convnext_jax.errors import UserError, first_line
from convnext_jax.output import finite
from convnext_jax.runtime.processes import all_gather_objects

Arrays = dict[str, jax.Array]
Like = Mapping[str, jax.Array | jax.ShapeDtypeStruct]


class DamagedCheckpoint(Exception):
    """What is on disk is not what was saved."""


def contents(state: TrainState, about: dict, metrics: dict[str, float] | None) -> tuple[dict[str, Arrays], dict]:
    """The arrays of a checkpoint by item and name, and its manifest; the arguments as of `saving.Checkpoints.save`."""
    items = _items(state)
    described = {item: _describe(arrays) for item, arrays in items.items()}
    manifest = {'about': about, 'metrics': finite(metrics), 'arrays': described}
    return items, manifest | {'checksum': _checksum(manifest)}


def saved_steps(directory: Path) -> list[int]:
    """The steps with a finished checkpoint, oldest first. What is unfinished has another name; in a bucket no mark."""
    paths = [path for path in directory.glob('*') if path.name.isdecimal()]
    if not is_local(directory):
        paths = [path for path in paths if ocp.utils.is_checkpoint_finalized(path)]
    return sorted(int(path.name) for path in paths)


def read_about(directory: Path, step: int) -> dict:
    """The JSON that was saved with a checkpoint.

    Raises:
        DamagedCheckpoint: it is not readable.
    """
    return read_manifest(directory, step)['about']


def restore(directory: Path, step: int, like: TrainState) -> TrainState:
    """The state of one checkpoint.

    Raises:
        UserError: names, shapes or types differ from `like`; the difference is listed.
        DamagedCheckpoint: files are missing, cut short or altered.
    """
    items = {item: _restore_item(directory, step, item, arrays) for item, arrays in _items(like).items()}
    names, treedef = _names(like)
    return jax.tree.unflatten(treedef, [items[item][name] for item, name in names])


def restore_parameters(directory: Path, step: int, field: str, like: Like | None = None) -> Arrays:
    """One set of weights of a checkpoint, without the rest.

    Args:
        directory: workdir/checkpoints.
        step: which checkpoint.
        field: 'parameters' or 'ema'.
        like: shapes, types and shardings to insist on; by default what was saved, on the first device. The statistics
            are among them.

    Raises:
        UserError: as `restore`, or there are no such weights.
        DamagedCheckpoint: as `restore`.
    """
    saved = read_manifest(directory, step)['arrays'][field]
    if not saved:
        raise UserError(f'checkpoint {step} of {directory} has no {field}: the run had none')
    if like is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = {
            name: jax.ShapeDtypeStruct(entry['shape'], entry['dtype'], sharding=here) for name, entry in saved.items()
        }
    return _restore_item(directory, step, field, like)


def _restore_item(directory: Path, step: int, item: str, like: Like) -> Arrays:
    with _damage_to_any():
        saved = read_manifest(directory, step)['arrays'].get(item, {})
    _check_same(directory, step, item, saved, like)
    if not like:
        return {}
    target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in like.items()}
    with _damage_to_any():
        try:
            # A Checkpointer would wait for the other processes before an error of theirs could be told.
            handler = ocp.StandardCheckpointHandler()
            path = checkpoints_for_orbax(directory) / str(step) / item
            arrays = handler.restore(path, args=ocp.args.StandardRestore(target))
        except Exception as error:  # Orbax and TensorStore have no common error for a file that is missing or cut short
            raise DamagedCheckpoint(f'{item}: {first_line(error)}') from error
    with _damage_to_any():
        found = jax.device_get(_fingerprints(arrays))
        altered = [name for name in like if int(found[name]) != saved[name]['fingerprint']]
        if altered:
            raise DamagedCheckpoint(f'{item}: altered bits in {", ".join(altered[:3])}')
    return arrays


@contextlib.contextmanager
def _damage_to_any() -> Iterator[None]:
    """What one process cannot read is damaged for all: they restore the same step."""
    damage = None
    try:
        yield
    except DamagedCheckpoint as error:
        damage = error
    for text in all_gather_objects(damage and str(damage)):
        if text:
            raise DamagedCheckpoint(text) from damage


def _check_same(directory: Path, step: int, item: str, saved: dict, like: Like) -> None:
    wanted = {name: {'shape': list(x.shape), 'dtype': str(x.dtype)} for name, x in like.items()}
    lines = [f'{name} is missing' for name in sorted(wanted.keys() - saved.keys())]
    lines += [f'{name} is unexpected' for name in sorted(saved.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & saved.keys()):
        here, there = wanted[name], {key: saved[name][key] for key in ('shape', 'dtype')}
        if here != there:
            lines.append(f'{name} is {there["dtype"]}{there["shape"]}, not {here["dtype"]}{here["shape"]}')
    if lines:
        raise UserError(f'checkpoint {step} of {directory} does not fit, {item}: {"; ".join(lines)}')


def read_manifest(directory: Path, step: int) -> dict:
    """What was saved beside the arrays.

    Raises:
        DamagedCheckpoint: it is missing or altered.
    """
    try:
        manifest = json.loads((directory / str(step) / 'manifest' / 'metadata').read_text(encoding='utf-8'))
        whole = manifest.pop('checksum') == _checksum(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f'manifest: {first_line(error)}') from error
    if not whole:
        raise DamagedCheckpoint('manifest: altered')
    return manifest


def _checksum(manifest: dict) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _names(state: TrainState) -> tuple[list[tuple[str, str]], jax.tree_util.PyTreeDef]:
    """For each array of the state the item and the name it is saved under, in the state's order."""
    paths, treedef = tree_flatten_with_path(state)
    return [_name(path[0].name, path[1:]) for path, _ in paths], treedef


def _name(field: str, path: KeyPath) -> tuple[str, str]:
    if not path:
        return 'counters', field
    return 'parameters' if field == 'statistics' else field, keystr(path, simple=True, separator='/')


def _items(state: TrainState) -> dict[str, Arrays]:
    items: dict[str, Arrays] = {item: {} for item in ('counters', 'parameters', 'optimizer', 'ema')}
    for (item, name), array in zip(_names(state)[0], jax.tree.leaves(state), strict=True):
        items[item][name] = array
    return items


def _describe(arrays: Arrays) -> dict:
    fingerprints = jax.device_get(_fingerprints(arrays))
    return {
        name: {'shape': list(x.shape), 'dtype': str(x.dtype), 'fingerprint': int(fingerprints[name])}
        for name, x in arrays.items()
    }


@jax.jit
def _fingerprints(arrays: Arrays) -> Arrays:
    """A number for each array that changes with any bit and any order, and does not depend on the sharding."""

    def fingerprint(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        places = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
        # Integer sums wrap around and so do not depend on their order; odd factors lose no bit.
        return ((bits ^ (bits >> 16)) * (places * 2 + jnp.uint32(2654435761))).sum(dtype=jnp.uint32)

    return jax.tree.map(fingerprint, arrays)
