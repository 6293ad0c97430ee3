"""Random access to images in tar files: the positions of members, and an index of all shards of a split."""

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

BLOCK = 512  # bytes; a tar file consists of such blocks, and a block of zeros marks its end
MAX_PADDING = 2**21  # bytes; more than the zeros at the end of any tar file
CACHE = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'convnext_jax'


class Member(NamedTuple):
    """A file inside a tar file: its name, and the offset and size of its bytes in the tar file."""

    name: str
    offset: int
    size: int


def tar_members(path: Path, within: Member | None = None) -> list[Member]:
    """The regular files in a tar file.

    Args:
        path: the tar file.
        within: a member that is itself a tar file; its members are returned then.

    Raises:
        UserError: the tar file cannot be read, is damaged or truncated, or contains links. (`tarfile` treats a damaged
            header as the end of the file.)
    """
    name = f'{path}, {within.name}' if within else str(path)
    try:
        with path.open('rb') as file:
            file.seek(within.offset if within else 0)
            with tarfile.open(fileobj=file, mode='r:') as tar:
                entries = list(tar)
                end = tar.offset
            file.seek(end)
            remaining = within.offset + within.size - end if within else MAX_PADDING
            rest = file.read(max(min(remaining, MAX_PADDING), 0))
    except tarfile.TarError as error:
        raise UserError(
            f'{name} is not a complete tar file ({first_line(error)}): copy or download it again'
        ) from error
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from error
    if rest[:BLOCK] != bytes(BLOCK):
        raise UserError(f'{name} is damaged or truncated at byte {end}: copy or download it again')
    if rest.strip(b'\0'):
        raise UserError(f'{name} continues after its end at byte {end}: split the concatenated tar files')
    for entry in entries:
        if entry.islnk():
            raise UserError(f'{name}: {entry.name} is a link to {entry.linkname}: create the tar file without links')
    return [Member(entry.name, entry.offset_data, entry.size) for entry in entries if entry.isfile()]


def read_bytes(path: Path, offset: int, size: int) -> bytes:
    """Part of a file, `size` bytes from `offset`; no file stays open, so that any thread or process may call it.

    Raises:
        UserError: the file cannot be read, or ends before these bytes.
    """
    try:
        with path.open('rb', buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from error
    if len(data) < size:
        raise UserError(f'{path} ends before byte {offset + size}: it is truncated, copy it again')
    return data


def find_shards(directory: Path, split: str) -> list[Path]:
    """The tar shards of a split, sorted by name: `directory/split/*.tar`, or else `directory/*split-NUMBER.tar`.

    Examples of the second form are train-0001.tar and imagenet-train-000001.tar.

    Raises:
        UserError: there are no shards.
    """
    name = re.compile(rf'(.*[-_.])?{re.escape(split)}[-_.]\d+\.tar')
    shards = sorted((directory / split).glob('*.tar'))
    shards = shards or sorted(path for path in directory.glob('*.tar') if name.fullmatch(path.name))
    if not shards:
        raise UserError(
            f"{directory} contains no shards of split '{split}' ({split}/*.tar or *{split}-NUMBER.tar): set "
            '--config.data.dir=DIR to their folder'
        )
    return shards


def open_index(directory: Path, split: str, shards: Sequence[Path], suffixes: Set[str]) -> np.memmap:
    """The index of a split: a memory-mapped record array with `shard`, `offset`, `size`, `label`, `name` of each image.

    It is stored in the folder of the shards, or in the user's cache if that folder is not writable. The file name
    contains a hash of the suffixes and of the shards' names, sizes and modification times: a change creates a new
    index.

    Args:
        directory: folder of the shards.
        split: name of the split.
        shards: the tar files.
        suffixes: lower-case suffixes of images, with the dot.

    Raises:
        UserError: as for `index_shard`, or the index cannot be written.
    """
    name = f'{split}.index-{_fingerprint(shards, suffixes)}.npy'
    if (directory / name).is_file() or os.access(directory, os.W_OK):
        path = directory / name
    else:
        path = CACHE / directory.resolve().relative_to('/') / name
    index = _read_index(path)
    if index is None:
        if path.parent != directory:
            warnings.warn(f'{directory} is not writable: the index of its shards is stored as {path}', stacklevel=3)
        bar = tqdm(enumerate(shards), f'indexing {split}', len(shards), unit='tar', disable=not sys.stderr.isatty())
        records = [index_shard(shard, number, suffixes) for number, shard in bar]
        _write_index(path, np.concatenate(records))
        for other in path.parent.glob(f'{glob.escape(split)}.index-*.npy'):
            if other != path:  # outdated
                other.unlink(missing_ok=True)
        return np.load(path, mmap_mode='r', allow_pickle=False)
    return index


def index_shard(path: Path, number: int, suffixes: Set[str]) -> np.ndarray:
    """The index records of one shard. As in WebDataset, a key is a member's path up to the first dot in the file name.

    Hidden members, and members of hidden folders, are ignored with a warning that counts them.

    Args:
        path: the shard.
        number: index of the shard in its split.
        suffixes: lower-case suffixes of images, with the dot.

    Returns:
        (images,) records with the fields that `open_index` describes. The label of an image without KEY.cls is −1.

    Raises:
        UserError: as for `tar_members`; or there is a KEY.cls without an image or without a number, two images or
            labels with one key, a key with a dot, or no image.
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
            raise UserError(f'{path}: {member.name} has a dot in its key, but the key ends at the first dot: rename it')
        kind = labels if suffix == 'cls' else images if f'.{suffix.lower()}' in suffixes else None
        if kind is None:  # other files of the sample, such as .json or .txt
            continue
        key = f'{folder}/{stem}'
        if key in kind:
            raise UserError(f'{path} contains {kind[key].name} and {member.name} with the same key: remove one of them')
        kind[key] = member
    if hidden:
        warnings.warn(f'{path}: left out: hidden files ({hidden})', stacklevel=2)
    if not images:
        raise UserError(f'{path} contains no images: it needs KEY.jpg (or {", ".join(sorted(suffixes))})')
    for key in labels.keys() - images.keys():
        raise UserError(f'{path} contains {labels[key].name}, but no image with this key')
    classes: dict[str, int] = {}
    with path.open('rb') as tar:
        for key, member in labels.items():
            tar.seek(member.offset)
            text = tar.read(member.size).strip()
            if not re.fullmatch(rb'\d{1,9}', text):
                raise UserError(f'{path}: {member.name} contains {text[:20]!r}, not a class number')
            classes[key] = int(text)
    names = [image.name.encode(errors='surrogateescape') for image in images.values()]
    longest = max(map(len, names))
    fields = [('shard', 'i4'), ('offset', 'i8'), ('size', 'i8'), ('label', 'i4'), ('name', f'S{longest}')]
    records = [(number, image.offset, image.size, classes.get(key, -1)) for key, image in images.items()]
    return np.array([(*record, name) for record, name in zip(records, names, strict=True)], fields)


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
    """The index, or None if it is missing or damaged."""
    try:
        return np.load(path, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def _write_index(path: Path, records: np.ndarray) -> None:
    scratch = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')  # several machines may write it at once
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open('wb') as file:
            np.save(file, records, allow_pickle=False)
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise UserError(f'the index {path} cannot be written: {error.strerror}') from error
