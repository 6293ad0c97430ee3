"""The folder of a run, here or in a bucket: its lock, its config, and the paths of what it holds."""

import contextlib
import fcntl
import io
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from etils import epath
from ml_collections import ConfigDict

from convnext_jax.config import as_dict, changed_fields, is_fixed, read_config
from convnext_jax.errors import UserError
from convnext_jax.output import to_json
from convnext_jax.paths import local_path, plain_path
from convnext_jax.runtime.processes import all_gather_objects, is_main_process

LOCK = '.lock'
CONFIG = 'config.json'
METRICS = 'metrics.jsonl'
CURVES = 'curves.png'
FIGURES = 'figures'
CHECKPOINTS = 'checkpoints'
TENSORBOARD = 'tensorboard'
SHOWN_WITHIN = 10.0
"""Seconds in which a network file system shows a host what another has written."""


def workdir_path(text: str) -> Path | epath.Path:
    """A local folder as a Path, or one in a bucket (gs://BUCKET/RUN; needs gcsfs) as Orbax takes it, an epath.Path."""
    return epath.Path(text) if '://' in text else local_path(text)


def is_local(path: Path | epath.Path) -> bool:
    """Whether it is a path of this machine, with locks, appending and a disk that can be full."""
    return isinstance(path, Path)


def checkpoints_for_orbax(directory: Path | epath.Path) -> Path | epath.Path:
    """The path of workdir/checkpoints as Orbax takes it; the workdir exists."""
    return plain_path(directory.parent) / directory.name if is_local(directory) else directory


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Makes the workdir and keeps other runs out of it. The lock ends with the process, however that ends.

    A bucket has no locks: there nothing is done.

    Raises:
        UserError: a running process has it, or it cannot be written.
    """
    if not is_local(workdir):
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / LOCK, 'a+', encoding='utf-8')  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f'workdir {workdir} cannot be written: {error.strerror}') from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise UserError(f'workdir {workdir} is in use by process {lock.read().partition(" ")[0]}') from error
        lock.truncate(0)
        lock.write(f'{os.getpid()} {secrets.token_hex(8)}')
        lock.flush()
        os.fsync(lock.fileno())  # for the other hosts of a network file system
        yield


@contextlib.contextmanager
def locked_by_first(workdir: Path) -> Iterator[None]:
    """`locked` by process 0, with the others' word that they see the same folder.

    Raises:
        UserError: as `locked`, or a process sees another folder.
    """
    with locked(workdir) if is_main_process() else contextlib.nullcontext():
        lock = workdir / LOCK
        content = all_gather_objects(
            lock.read_text(encoding='utf-8') if is_main_process() and is_local(workdir) else None
        )[0]
        if is_local(workdir) and not _comes_to_hold(lock, content):
            raise UserError(f'workdir {workdir} is not the one that process 0 has: all hosts must share a file system')
        yield


def _comes_to_hold(path: Path, content: str) -> bool:
    """Whether a file has a content, or has it soon: so a network file system shows what another host wrote."""
    until = time.monotonic() + SHOWN_WITHIN
    while not (path.exists() and path.read_text(encoding='utf-8') == content):
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def settle_config(workdir: Path, config: ConfigDict) -> list[str]:
    """Writes the config into the workdir; where a run has saved a checkpoint, compares it with that run's first.

    Returns:
        A line for each field that changes from here on.

    Raises:
        UserError: a field changed that a run must keep, and every such change is listed; or as `read_config`.
    """
    path = workdir / CONFIG
    changes = {}
    if path.exists() and any((workdir / CHECKPOINTS).glob('[0-9]*')):
        changes = changed_fields(as_dict(read_config(path)), as_dict(config))
    lines = {field: f'{field} was {old}, is {new}' for field, (old, new) in changes.items()}
    refused = [line for field, line in lines.items() if is_fixed(field, config.task)]
    if refused:
        raise UserError(
            f'{workdir} holds another run: {"; ".join(refused)}. Give the old values, or take another workdir'
        )
    for field in lines:
        if field.startswith('init.'):
            lines[field] += ' (without effect: the run goes on from its checkpoint)'
    write_whole(path, (to_json(as_dict(config), indent=2) + '\n').encode())
    return list(lines.values())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or the next process, finds the old content or the new and nothing between."""
    if not is_local(path):
        path.write_bytes(content)  # a bucket's files appear whole
        return
    scratch = path.with_name(f'.{path.name}.new')
    try:
        with open(scratch, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def open_to_append(path: Path) -> TextIO:
    """A text file that lines are added to; what is flushed is there."""
    return open(path, 'a', encoding='utf-8') if is_local(path) else _Rewritten(path)


class _Rewritten(io.StringIO):
    """A text in a bucket, where nothing can be appended: every flush writes it whole."""

    def __init__(self, path: epath.Path):
        super().__init__()
        self.write(path.read_text(encoding='utf-8'))
        self._path = path

    def flush(self) -> None:
        self._path.write_text(self.getvalue(), encoding='utf-8')
