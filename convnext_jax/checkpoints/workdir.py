"""The workdir of a run, a local folder or a bucket: its lock, its config, and the names of its files."""

import contextlib
import errno
import fcntl
import importlib.util
import io
import os
import secrets
import time
from collections.abc import Generator
from pathlib import Path
from typing import TextIO, cast

from etils import epath
from ml_collections import ConfigDict

from convnext_jax.config import as_dict, changed_fields, is_fixed, read_config
from convnext_jax.errors import UserError, first_line
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
VISIBLE_TIMEOUT = 10.0
"""Seconds until a file that one host writes is visible on the others (attribute caches of network file systems)."""


def workdir_path(text: str) -> Path:
    """The path of a workdir. For a bucket (gs://BUCKET/RUN) an `epath.Path` with the same methods.

    Raises:
        UserError: the library for buckets is not installed, or the home folder is unknown.
    """
    if '://' not in text:
        return local_path(text)
    if text.startswith('gs://') and importlib.util.find_spec('gcsfs') is None:
        raise UserError(f'{text} needs `pip install gcsfs google-cloud-storage`')
    return cast(Path, epath.Path(text))


def is_local(path: Path) -> bool:
    """Whether a path is local. Only local paths have locks, appending and a known free disk space."""
    return isinstance(path, Path)


def checkpoints_for_orbax(directory: Path) -> epath.Path:
    """The path of workdir/checkpoints without characters that Orbax does not accept. The workdir must exist."""
    return epath.Path(plain_path(directory.parent) / directory.name if is_local(directory) else directory)


@contextlib.contextmanager
def locked(workdir: Path) -> Generator[None]:
    """Creates the workdir and locks it against other runs, until the body or the process ends.

    Buckets have no locks. For a bucket, it only checks that the workdir can be written.

    Raises:
        UserError: a running process holds the lock, or the workdir cannot be written.
    """
    if not is_local(workdir):
        _check_bucket(workdir)
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
            process = lock.read().partition(' ')[0]
            line = f'workdir {workdir} is in use by process {process}: stop it, or use another workdir'
            raise UserError(line) from error
        lock.truncate(0)
        lock.write(f'{os.getpid()} {secrets.token_hex(8)}')
        lock.flush()
        os.fsync(lock.fileno())  # makes it visible to the other hosts of a network file system
        yield


def _check_bucket(workdir: Path) -> None:
    """Writes and deletes a file in a bucket.

    Raises:
        UserError: the bucket cannot be written.
    """
    try:
        (workdir / LOCK).write_text('', encoding='utf-8')
        (workdir / LOCK).unlink()
    except Exception as error:  # the errors of gcsfs and google-auth have no common class
        raise UserError(f'workdir {workdir} cannot be written: {first_line(error)}') from error


@contextlib.contextmanager
def locked_by_main_process(workdir: Path) -> Generator[None]:
    """Locks the workdir on process 0, and verifies that all processes see the same folder.

    Raises:
        UserError: as for `locked`, or a process sees another folder.
    """
    with locked(workdir) if is_main_process() else contextlib.nullcontext():
        lock = workdir / LOCK
        content = all_gather_objects(
            lock.read_text(encoding='utf-8') if is_main_process() and is_local(workdir) else None
        )[0]
        if is_local(workdir) and not _wait_for_content(lock, content):
            raise UserError(f'workdir {workdir} differs from the one of process 0: all hosts must share a file system')
        yield


def _wait_for_content(path: Path, content: str) -> bool:
    """Waits until a file has the content that another host wrote; False after `VISIBLE_TIMEOUT` seconds."""
    until = time.monotonic() + VISIBLE_TIMEOUT
    while not (path.exists() and path.read_text(encoding='utf-8') == content):
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def write_config(workdir: Path, config: ConfigDict) -> list[str]:
    """Writes config.json. If the workdir has a checkpoint, first compares the config with the stored one.

    Returns:
        A message for each field that changed.

    Raises:
        UserError: fields changed that must not change on resume (the message lists them), or as for `read_config`.
    """
    path = workdir / CONFIG
    changes = {}
    if path.exists() and any((workdir / CHECKPOINTS).glob('[0-9]*')):
        changes = changed_fields(as_dict(read_config(path)), as_dict(config))
    lines = {field: f'{field} was {old}, is now {new}' for field, (old, new) in changes.items()}
    refused = [line for field, line in lines.items() if is_fixed(field, config.task)]
    if refused:
        raise UserError(
            f'{workdir} holds another run: {"; ".join(refused)}; give the old values, or use another workdir'
        )
    for field in lines:
        if field.startswith('init.'):
            lines[field] += ' (no effect: the run resumes from its checkpoint)'
    write_atomically(path, (to_json(as_dict(config), indent=2) + '\n').encode())
    return list(lines.values())


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file atomically: a reader sees the old or the new content, even after a crash.

    Raises:
        OSError: the file cannot be written.
    """
    if not is_local(path):
        try:
            path.write_bytes(content)  # writes to a bucket are atomic
        except Exception as error:  # gcsfs has retried; errors of gcsfs and aiohttp have no common class
            raise OSError(errno.EIO, first_line(error), str(path)) from error
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
    """Opens an existing text file for appending. `flush` makes the lines visible to readers."""
    return open(path, 'a', encoding='utf-8') if is_local(path) else _BucketText(path)


class _BucketText(io.StringIO):
    """A text file in a bucket. Buckets cannot append, so every flush rewrites the whole file.

    If a flush fails, the text is kept, and the next flush or `close` writes it.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.write(path.read_text(encoding='utf-8'))
        self._path, self._written = path, self.getvalue()

    def flush(self) -> None:
        content = self.getvalue()
        write_atomically(self._path, content.encode())
        self._written = content

    def close(self) -> None:
        try:
            if not self.closed and self.getvalue() != self._written:
                self.flush()
        finally:
            super().close()
