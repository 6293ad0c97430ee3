"""The format of a single Orbax checkpoint: what is saved, and how it is restored and verified.

A checkpoint has four items with the arrays of `TrainState`: `parameters`, `optimizer`, `ema` and `counters`. The items
`parameters` and `ema` also contain the statistics. A fifth item, the JSON manifest, contains the position in the data,
the config, the metrics, the shape, dtype and bit fingerprint of each array, and a checksum of the manifest itself.
Without the manifest, Orbax would silently restore a part of a tree, or arrays with flipped bits.
"""

import contextlib
import json
import zlib
from collections.abc import Generator, Mapping
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
    """The files of a checkpoint are missing, truncated or altered."""


def contents(state: TrainState, about: dict, metrics: dict[str, float] | None) -> tuple[dict[str, Arrays], dict]:
    """The contents of a new checkpoint.

    Args:
        state, about, metrics: as for `manager.Checkpoints.save`.

    Returns:
        Item → name → array, and the manifest.
    """
    items = _items(state)
    described = {item: _describe(arrays) for item, arrays in items.items()}
    manifest = {'about': about, 'metrics': finite(metrics), 'arrays': described}
    return items, manifest | {'checksum': _checksum(manifest)}


def saved_steps(directory: Path) -> list[int]:
    """The steps with a finished checkpoint, in ascending order.

    An unfinished checkpoint has another name on a local file system. In a bucket, it has no commit marker.

    Args:
        directory: workdir/checkpoints.
    """
    paths = [path for path in directory.glob('*') if path.name.isdecimal()]
    if not is_local(directory):
        paths = [path for path in paths if ocp.utils.is_checkpoint_finalized(path)]
    return sorted(int(path.name) for path in paths)


def read_about(directory: Path, step: int) -> dict:
    """The `about` dict that was saved with a checkpoint.

    Raises:
        DamagedCheckpoint: the manifest is missing or altered.
    """
    return read_manifest(directory, step)['about']


def restore(directory: Path, step: int, like: TrainState) -> TrainState:
    """Restores the training state of one checkpoint.

    Args:
        directory: workdir/checkpoints.
        step: the step of the checkpoint.
        like: a state with the expected shapes, dtypes and shardings.

    Raises:
        UserError: names, shapes or dtypes differ from `like`. The message lists the differences.
        DamagedCheckpoint: files are missing, truncated or altered.
    """
    items = {item: _restore_item(directory, step, item, arrays) for item, arrays in _items(like).items()}
    names, treedef = _names(like)
    return jax.tree.unflatten(treedef, [items[item][name] for item, name in names])


def restore_parameters(directory: Path, step: int, field: str, like: Like | None = None) -> Arrays:
    """Restores only the weights of a checkpoint: parameters and statistics.

    Args:
        directory: workdir/checkpoints.
        step: the step of the checkpoint.
        field: 'parameters' or 'ema'.
        like: name → array with the expected shape, dtype and sharding. By default all saved arrays are restored to the
            first local device.

    Raises:
        UserError: as for `restore`, or the checkpoint has no moving average.
        DamagedCheckpoint: as for `restore`.
    """
    saved = read_manifest(directory, step)['arrays'][field]
    if not saved:
        raise UserError(f'checkpoint {step} of {directory} has no moving average (ema.decay=0): use the raw weights')
    if like is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = {
            name: jax.ShapeDtypeStruct(entry['shape'], entry['dtype'], sharding=here) for name, entry in saved.items()
        }
    return _restore_item(directory, step, field, like)


def _restore_item(directory: Path, step: int, item: str, like: Like) -> Arrays:
    with _raise_on_all_processes():
        saved = read_manifest(directory, step)['arrays'].get(item, {})
    _check_same(directory, step, item, saved, like)
    if not like:
        return {}
    target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in like.items()}
    with _raise_on_all_processes():
        try:
            # Not a Checkpointer: it waits at a barrier, so an error of one process would only appear as a timeout.
            handler = ocp.StandardCheckpointHandler()
            path = checkpoints_for_orbax(directory) / str(step) / item
            arrays = handler.restore(path, args=ocp.args.StandardRestore(target))
        except Exception as error:  # Orbax and TensorStore have no common error class for missing or truncated files
            raise DamagedCheckpoint(f'{item}: {first_line(error)}') from error
    with _raise_on_all_processes():
        found = jax.device_get(_fingerprints(arrays))
        altered = [name for name in like if int(found[name]) != saved[name]['fingerprint']]
        if altered:
            raise DamagedCheckpoint(f'{item}: altered bits in {", ".join(altered[:3])}')
    return arrays


@contextlib.contextmanager
def _raise_on_all_processes() -> Generator[None]:
    """Raises DamagedCheckpoint on all processes if one of them does, so that all restore the same step."""
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
        raise UserError(
            f'checkpoint {step} of {directory} does not fit this run, {item}: {"; ".join(lines)}; use the config that '
            'wrote it, or another workdir'
        )


def read_manifest(directory: Path, step: int) -> dict:
    """The manifest of a checkpoint: `about`, `metrics`, and `arrays` with item → name → shape, dtype and fingerprint.

    Raises:
        DamagedCheckpoint: the manifest is missing or altered.
    """
    try:
        manifest = json.loads((directory / str(step) / 'manifest' / 'metadata').read_text(encoding='utf-8'))
        intact = manifest.pop('checksum') == _checksum(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f'manifest: {first_line(error)}') from error
    if not intact:
        raise DamagedCheckpoint('manifest: altered')
    return manifest


def _checksum(manifest: dict) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _names(state: TrainState) -> tuple[list[tuple[str, str]], jax.tree_util.PyTreeDef]:
    """The item and the name under which each array of a state is saved, and the tree structure of the state."""
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
    """A uint32 hash of each array that depends on every bit and on the order of elements, but not on the sharding."""

    def fingerprint(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        positions = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
        # Addition modulo 2³² is associative, so the reduction order does not matter. Multiplication by an odd factor is
        # a bijection modulo 2³².
        return ((bits ^ (bits >> 16)) * (positions * 2 + jnp.uint32(2654435761))).sum(dtype=jnp.uint32)

    return jax.tree.map(fingerprint, arrays)
