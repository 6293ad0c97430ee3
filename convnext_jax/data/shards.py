"""Images inside tars: where each one lies, and an index of shards, made once, so that any image is read directly."""

import glob
import hashlib
import os
import re
import sys
import tarfile
import uuid
import warnings
from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from convnext_jax.errors import UserError, first_line

BLOCK = 512  # a tar is made of such blocks, and one of zeros marks its end
LONGEST_END = 2**21  # more than the zeros with which any tar is filled up
CACHE = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'convnext_jax'


class Member(NamedTuple):
    """A file inside a tar: its name there, and its bytes' place in the tar's file."""

    name: str
    offset: int
    size: int


def tar_members(path: Path, within: Member | None = None) -> list[Member]:
    """The files in a tar, or in the tar that is itself a member of it.

    Raises:
        UserError: it is no tar, or damaged, or cut short: `tarfile` alone takes a damaged header for the end.
    """
    name = f'{path}, {within.name}' if within else str(path)
    try:
        with path.open('rb') as file:
            file.seek(within.offset if within else 0)
            with tarfile.open(fileobj=file, mode='r:') as tar:
                entries = list(tar)
                end = tar.offset
            file.seek(end)
            left = within.offset + within.size - end if within else LONGEST_END
            rest = file.read(max(min(left, LONGEST_END), 0))
    except tarfile.TarError as error:
        raise UserError(f'{name} is no whole tar ({first_line(error)}): copy or download it again') from error
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from error
    if rest[:BLOCK] != bytes(BLOCK):
        raise UserError(f'{name} is damaged or cut short at byte {end}: copy or download it again')
    if rest.strip(b'\0'):
        raise UserError(f'{name} goes on behind its end at byte {end}: it is two tars in one, take them apart')
    for entry in entries:
        if entry.islnk():
            raise UserError(f'{name}: {entry.name} is a link to {entry.linkname}, and no file: pack it without links')
    return [Member(entry.name, entry.offset_data, entry.size) for entry in entries if entry.isfile()]


def read_bytes(path: Path, offset: int, size: int) -> bytes:
    """A part of a file; nothing stays open, so that any thread or process may ask.

    Raises:
        UserError: it cannot be read, or the file ends before.
    """
    try:
        with path.open('rb', buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from error
    if len(data) < size:
        raise UserError(f'{path} ends before byte {offset + size}: it is cut short')
    return data


def find_shards(directory: Path, split: str) -> list[Path]:
    """`directory/split/*.tar`, or else `directory/*split-*.tar`, such as train-0001.tar or imagenet-train-000001.tar.

    Raises:
        UserError: there are none.
    """
    name = re.compile(rf'(.*[-_.])?{re.escape(split)}[-_.]\d+\.tar')
    shards = sorted((directory / split).glob('*.tar'))
    shards = shards or sorted(path for path in directory.glob('*.tar') if name.fullmatch(path.name))
    if not shards:
        raise UserError(
            f"{directory} holds no shards of split '{split}', {split}/*.tar or *{split}-NUMBER.tar: say with "
            '--config.data.dir=DIR where they are'
        )
    return shards


def open_index(directory: Path, split: str, shards: Sequence[Path], suffixes: Set[str]) -> np.memmap:
    """A row for each image: `shard` by number, `offset`, `size`, `label`, `name`; mapped, so it costs no memory.

    It is kept beside the shards, or in the user's cache where they cannot be written. Its name follows from the shards'
    names, sizes and times and from the suffixes, so that a new one is made when they change.

    Raises:
        UserError: as `index_shard`, or it cannot be written.
    """
    name = f'{split}.index-{_fingerprint(shards, suffixes)}.npy'
    if (directory / name).is_file() or os.access(directory, os.W_OK):
        path = directory / name
    else:
        path = CACHE / directory.resolve().relative_to('/') / name
    index = _read_index(path)
    if index is None:
        if path.parent != directory:
            warnings.warn(f'{directory} cannot be written: the index of its shards becomes {path}', stacklevel=3)
        bar = tqdm(enumerate(shards), f'indexing {split}', len(shards), unit='tar', disable=not sys.stderr.isatty())
        rows = [index_shard(shard, number, suffixes) for number, shard in bar]
        _write_index(path, np.concatenate(rows))
        for other in path.parent.glob(f'{glob.escape(split)}.index-*.npy'):
            if other != path:  # outdated
                other.unlink(missing_ok=True)
        index = _read_index(path)
    return index


def index_shard(path: Path, number: int, suffixes: Set[str]) -> np.ndarray:
    """The rows of one shard. As in WebDataset, a key is a name up to the first dot of its last part.

    Members that are hidden, or in a hidden folder, are left out, with a warning that counts them.

    Raises:
        UserError: as `tar_members`; or an image without KEY.cls, a KEY.cls without an image or that is no number, two
            images or labels of one key, a key with a dot, or no images at all.
    """
    images: dict[str, Member] = {}
    labels: dict[str, Member] = {}
    hidden = 0
    for member in tar_members(path):
        if any(part.startswith('.') and part != '.' for part in member.name.split('/')):
            hidden += 1
            continue
        folder, _, file = member.name.rpartition('/')
        stem, _, suffix = file.partition('.')
        if suffix.endswith('.cls'):
            raise UserError(f'{path}: {member.name} has a dot in its key, where WebDataset ends the key')
        kind = labels if suffix == 'cls' else images if f'.{suffix.lower()}' in suffixes else None
        if kind is None:  # what else a sample holds: .json, .txt
            continue
        key = f'{folder}/{stem}'
        if key in kind:
            raise UserError(f'{path} holds {kind[key].name} and {member.name}, of the same key: keep one')
        kind[key] = member
    if hidden:
        warnings.warn(f'{path}: left out: hidden files ({hidden})', stacklevel=2)
    if not images:
        raise UserError(f'{path} holds no images: KEY.jpg (or {", ".join(sorted(suffixes))}) with KEY.cls beside it')
    for key in images.keys() ^ labels.keys():
        alone = (images.get(key) or labels[key]).name
        raise UserError(f'{path}: {alone} has no {"KEY.cls" if key in images else "image"} of the same key')
    classes: dict[str, int] = {}
    with path.open('rb') as tar:
        for key, member in labels.items():
            tar.seek(member.offset)
            text = tar.read(member.size).strip()
            if not re.fullmatch(rb'\d{1,9}', text):
                raise UserError(f'{path}: {member.name} holds {text[:20]!r}, not the number of a class')
            classes[key] = int(text)
    names = [image.name.encode(errors='surrogateescape') for image in images.values()]
    longest = max(map(len, names))
    kinds = [('shard', 'i4'), ('offset', 'i8'), ('size', 'i8'), ('label', 'i4'), ('name', f'S{longest}')]
    rows = [(number, image.offset, image.size, classes[key]) for key, image in images.items()]
    return np.array([(*row, name) for row, name in zip(rows, names, strict=True)], kinds)


def _fingerprint(shards: Sequence[Path], suffixes: Set[str]) -> str:
    digest = hashlib.sha256(' '.join(sorted(suffixes)).encode())
    for path in shards:
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f'{path} cannot be read: {error.strerror}') from error
        digest.update(repr((path.name, stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]


def _read_index(path: Path) -> np.memmap | None:
    """None if it is not there, or damaged."""
    try:
        return np.load(path, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def _write_index(path: Path, rows: np.ndarray) -> None:
    scratch = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')  # several processes on several machines may be at it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open('wb') as file:
            np.save(file, rows, allow_pickle=False)
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise UserError(f'the index {path} cannot be written: {error.strerror}') from error
