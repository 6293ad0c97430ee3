"""Writes a TFDS data set in ArrayRecord form, without TensorFlow; the bytes of the images stay as they are.

It grows in DATA/NAME/incomplete.VERSION, one shard after another, and is renamed when it is whole. A call after one
that was interrupted keeps the shards that are there.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from convnext_jax.data.shards import read_bytes
from convnext_jax.errors import UserError, first_line
from convnext_jax.output import say, to_json
from convnext_jax.paths import plain_path

SHARD_BYTES = 2**29  # a reader keeps every shard open, and most systems allow 1,024 files
READERS = 16  # the order on disk is random: many reads at once hide the seeks
PLAN = 'plan.sha256'

Serialize = Callable[[dict], bytes]


class Image(NamedTuple):
    """An image that is to be written: its name in its split, its class, and where its bytes are."""

    name: str
    label: int
    file: Path
    offset: int
    size: int


def write_dataset(
    directory: Path, class_names: Sequence[str], splits: dict[str, list[Image]], encoding_format: str | None
) -> None:
    """Writes a TFDS data set with the features `image`, `label` and `file_name`.

    Args:
        directory: DATA/NAME/VERSION, where it will be.
        class_names: of the labels.
        splits: the images of each split, in any order: they are written in the order of TFDS, by hash of their names.
        encoding_format: 'jpeg' or 'png' if all images are; it is for TFDS's own decoder.

    Raises:
        UserError: an image cannot be read, the data set cannot be written, or another process is at it.
    """
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            'image': tfds.features.Image(encoding_format=encoding_format),
            'label': tfds.features.ClassLabel(names=class_names),
            'file_name': tfds.features.Text(),
        }
    )
    scratch = directory.with_name(f'incomplete.{directory.name}')
    splits = {split: _in_order(split, images) for split, images in splits.items()}
    with _alone(directory.parent):
        _begin(scratch, _plan(class_names, splits))
        try:
            info = [
                _write_split(scratch, f'{directory.parent.name}-{split}', split, images, features.serialize_example)
                for split, images in splits.items()
            ]
            features.save_config(scratch)
            _write_info(scratch / 'dataset_info.json', directory, info)
            scratch.rename(directory)
            (directory / PLAN).unlink()
        except OSError as error:
            raise UserError(f'{scratch} cannot be written: {error.strerror}') from error
    say(describe_dataset(directory))


def describe_dataset(directory: Path) -> str:
    """What a prepared data set holds, for people."""
    try:
        splits = json.loads((directory / 'dataset_info.json').read_text(encoding='utf-8'))['splits']
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f'{directory} holds no whole data set: remove it, and prepare it again') from error
    counts = [f'{split["name"]} {sum(map(int, split["shardLengths"])):,}' for split in splits]
    return f'{directory} holds {", ".join(counts)} images'


def _in_order(split: str, images: list[Image]) -> list[Image]:
    """The order of TFDS: a part such as 'train[:10%]' holds a fair sample of the classes, and the images of TFDS's."""
    return sorted(images, key=lambda image: hashlib.md5(split.encode() + os.fsencode(image.name)).digest())


def _plan(class_names: Sequence[str], splits: dict[str, list[Image]]) -> str:
    digest = hashlib.sha256(repr((SHARD_BYTES, *class_names)).encode())
    for split, images in splits.items():
        for image in images:
            digest.update(repr((split, image.name, image.label, image.size)).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes out of it; the lock ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f'another process is preparing {folder}: wait for its end') from error
    except OSError as error:
        raise UserError(f'{folder} cannot be written: {error.strerror}') from error
    try:
        yield
    finally:
        os.close(lock)


def _begin(scratch: Path, plan: str) -> None:
    """Makes the folder, or keeps what an interrupted call of the same plan has left there."""
    try:
        if (scratch / PLAN).is_file() and (scratch / PLAN).read_text(encoding='utf-8') == plan:
            say(f'{scratch} was interrupted: its whole shards are kept')
            return
        if scratch.exists():
            say(f'{scratch} holds an interrupted set of other images: it is removed')
            shutil.rmtree(scratch)
        scratch.mkdir()
        (scratch / PLAN).write_text(plan, encoding='utf-8')
    except OSError as error:
        raise UserError(f'{scratch} cannot be written: {error.strerror}') from error


def _write_split(scratch: Path, name: str, split: str, images: list[Image], serialize: Serialize) -> dict:
    """Writes the shards of a split that are not there yet; returns its part of dataset_info.json."""
    count = min(max(round(sum(image.size for image in images) / SHARD_BYTES), 1), len(images))
    bounds = itertools.pairwise(len(images) * shard // count for shard in range(count + 1))
    shards = {scratch / f'{name}.array_record-{i:05}-of-{count:05}': images[slice(*b)] for i, b in enumerate(bounds)}
    with tqdm(desc=f'writing {split}', total=len(images), unit='image', disable=not sys.stderr.isatty()) as bar:
        for path, part in shards.items():
            if path.exists():
                bar.update(len(part))
            else:
                _write_shard(path, part, serialize, bar)
    return {
        'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
        'name': split,
        'numBytes': str(sum(path.stat().st_size for path in shards)),
        'shardLengths': [str(len(part)) for part in shards.values()],
    }


def _write_shard(path: Path, images: Sequence[Image], serialize: Serialize, bar: tqdm) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    scratch = path.with_name(f'{path.name}.writing')
    try:
        writer = ArrayRecordWriter(str(plain_path(scratch.parent) / scratch.name), 'group_size:1')
        with ThreadPoolExecutor(READERS) as pool:
            files = pool.map(lambda image: read_bytes(image.file, image.offset, image.size), images)
            for image, data in zip(images, files, strict=True):
                record = {'image': data, 'label': image.label, 'file_name': os.fsencode(image.name)}
                writer.write(serialize(record))
                bar.update()
        writer.close()  # says what failed in writing
    except RuntimeError as error:
        raise UserError(f'{path} cannot be written: {first_line(error)}') from error
    with scratch.open('rb') as file:
        os.fsync(file.fileno())
    scratch.rename(path)


def _write_info(path: Path, directory: Path, splits: list[dict]) -> None:
    feature_keys = [{'featureKey': 'image'}, {'featureKey': 'label'}]
    info = {
        'name': directory.parent.name,
        'version': directory.name,
        'description': 'Prepared by convnext_jax; the bytes of the images are unchanged.',
        'fileFormat': 'array_record',
        'splits': splits,
        'supervisedKeys': {'tuple': {'items': feature_keys}},
    }
    path.write_text(to_json(info, indent=2), encoding='utf-8')
