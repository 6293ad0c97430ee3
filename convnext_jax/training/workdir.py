"""The folder of a run: its lock, its config, and the paths of what it holds."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from convnext_jax.config import as_dict, changed_fields, is_fixed
from convnext_jax.errors import UserError

CONFIG = 'config.json'
METRICS = 'metrics.jsonl'
CURVES = 'curves.png'
CHECKPOINTS = 'checkpoints'
TENSORBOARD = 'tensorboard'


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Makes the workdir and keeps other runs out of it. The lock ends with the process, however that ends.

    Raises:
        UserError: a running process has it, or it cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / '.lock', 'a+')  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f'workdir {workdir} cannot be written: {error.strerror}') from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise UserError(f'workdir {workdir} is in use by process {lock.read().strip()}') from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def settle_config(workdir: Path, config: ConfigDict) -> list[str]:
    """Writes the config into the workdir; where a run has saved a checkpoint, compares it with that run's first.

    Returns:
        A line for each field that changes from here on.

    Raises:
        UserError: a field changed that a run must keep; every such change is listed.
    """
    path = workdir / CONFIG
    changes = {}
    if path.exists() and any((workdir / CHECKPOINTS).glob('[0-9]*')):
        try:
            changes = changed_fields(json.loads(path.read_text()), as_dict(config))
        except json.JSONDecodeError as error:
            raise UserError(f'{path} is damaged: {error}') from error
    lines = {field: f'{field} was {old}, is {new}' for field, (old, new) in changes.items()}
    refused = [line for field, line in lines.items() if is_fixed(field)]
    if refused:
        raise UserError(f'{workdir} holds another run: {"; ".join(refused)}. Take another workdir')
    write_whole(path, json.dumps(as_dict(config), indent=2) + '\n')
    return list(lines.values())


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader, or the next process, finds the old text or the new and nothing between."""
    scratch = path.with_name(f'.{path.name}.new')
    with open(scratch, 'w') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
