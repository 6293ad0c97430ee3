"""A writer of TFDS data sets in ArrayRecord format. It needs no TensorFlow and does not re-encode the images.

It writes the shards to DATA/NAME/incomplete.VERSION and renames this folder when the data set is complete. After an
interruption, the next call keeps the complete shards.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from convnext_jax.data.mask_classes import CATEGORIES, MaskClasses
from convnext_jax.data.shards import read_bytes
from convnext_jax.errors import UserError, first_line
from convnext_jax.output import say, to_json
from convnext_jax.paths import plain_path

SHARD_BYTES = 2**29  # large, because a reader keeps all shards open, and most systems allow 1,024 open files
READERS = 16  # threads; the images are read in random order, and parallel reads hide the seeks
DIGEST = 'plan.sha256'  # file in the scratch folder: digest of class names and of the images' names, labels and sizes

Serialize = Callable[[dict], bytes]


class Mask(NamedTuple):
    """The mask of an image: a file and its size in bytes."""

    file: Path
    size: int


class Image(NamedTuple):
    """An image to write: name in its split, class label or mask, and the file, offset and size of its bytes."""

    name: str
    label: int | Mask
    file: Path
    offset: int
    size: int


def write_dataset(
    directory: Path,
    classes: Sequence[str] | MaskClasses,
    splits: dict[str, list[Image]],
    encoding_format: str | None,
) -> None:
    """Writes a TFDS data set with the features `image`, `label` or `mask`, and `file_name`.

    Args:
        directory: the folder DATA/NAME/VERSION that is created.
        classes: names of the labels; or the classes of masks, which are written to the file `CATEGORIES`.
        splits: name of a split → its images in any order; they are written in TFDS's order, by the hash of their names.
        encoding_format: 'jpeg' or 'png' if all images have this format; used by TFDS's own decoder.

    Raises:
        UserError: an image cannot be read, the data set cannot be written, or another process is writing it.
    """
    import tensorflow_datasets as tfds

    if isinstance(classes, MaskClasses):
        target = {'mask': tfds.features.Image(shape=(None, None, 1), encoding_format='png')}
    else:
        target = {'label': tfds.features.ClassLabel(names=classes)}
    features = tfds.features.FeaturesDict(
        {
            'image': tfds.features.Image(encoding_format=encoding_format),
            **target,
            'file_name': tfds.features.Text(),
        }
    )
    scratch = directory.with_name(f'incomplete.{directory.name}')
    splits = {split: _in_order(split, images) for split, images in splits.items()}
    with _locked(directory.parent):
        _begin(scratch, _digest(classes, splits))
        try:
            info = [
                _write_split(scratch, f'{directory.parent.name}-{split}', split, images, features.serialize_example)
                for split, images in splits.items()
            ]
            features.save_config(str(scratch))
            if isinstance(classes, MaskClasses):
                (scratch / CATEGORIES).write_text(classes.to_json(), encoding='utf-8')
            _write_info(scratch / 'dataset_info.json', directory, info, next(iter(target)))
            scratch.rename(directory)
            (directory / DIGEST).unlink()
        except OSError as error:
            raise UserError(f'{scratch} cannot be written: {error.strerror}') from error
    say(describe_dataset(directory))


def describe_dataset(directory: Path) -> str:
    """A message with the number of images in each split of a prepared data set.

    Raises:
        UserError: the data set is incomplete or damaged.
    """
    try:
        splits = json.loads((directory / 'dataset_info.json').read_text(encoding='utf-8'))['splits']
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f'{directory} is not a complete data set: remove it and prepare it again') from error
    counts = [f'{split["name"]} {sum(map(int, split["shardLengths"])):,}' for split in splits]
    return f'{directory} holds {", ".join(counts)} images'


def _in_order(split: str, images: list[Image]) -> list[Image]:
    """The images in TFDS's order, by a hash of their names.

    In this order 'train[:10%]' is a random sample, with the images that it has in the data set prepared by TFDS.
    """
    return sorted(images, key=lambda image: hashlib.md5(split.encode() + os.fsencode(image.name)).digest())


def _digest(classes: Sequence[str] | MaskClasses, splits: dict[str, list[Image]]) -> str:
    about = [classes.to_json()] if isinstance(classes, MaskClasses) else classes
    digest = hashlib.sha256(repr((SHARD_BYTES, *about)).encode())
    for split, images in splits.items():
        for image in images:
            label = image.label.size if isinstance(image.label, Mask) else image.label
            digest.update(repr((split, image.name, label, image.size)).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(folder: Path) -> Generator[None]:
    """Creates the folder and locks it exclusively, until the body or the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f'another process is preparing {folder}: wait until it has finished') from error
    except OSError as error:
        raise UserError(f'{folder} cannot be written: {error.strerror}') from error
    try:
        yield
    finally:
        os.close(lock)


def _begin(scratch: Path, digest: str) -> None:
    """Creates the scratch folder, or keeps the one of an interrupted call if the class names and images are equal."""
    try:
        if (scratch / DIGEST).is_file() and (scratch / DIGEST).read_text(encoding='utf-8') == digest:
            say(f'{scratch} is from an interrupted command: its complete shards are kept')
            return
        if scratch.exists():
            say(f'{scratch} is from an interrupted command with other images: it is removed')
            shutil.rmtree(scratch)
        scratch.mkdir()
        (scratch / DIGEST).write_text(digest, encoding='utf-8')
    except OSError as error:
        raise UserError(f'{scratch} cannot be written: {error.strerror}') from error


def _write_split(scratch: Path, name: str, split: str, images: list[Image], serialize: Serialize) -> dict:
    """Writes the missing shards of a split; returns the entry of the split in dataset_info.json."""
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
            for record in pool.map(_record, images):
                writer.write(serialize(record))
                bar.update()
        writer.close()  # raises if a write has failed
    except RuntimeError as error:
        raise UserError(f'{path} cannot be written: {first_line(error)}') from error
    with scratch.open('rb') as file:
        os.fsync(file.fileno())
    scratch.rename(path)


def _record(image: Image) -> dict:
    record = {'image': read_bytes(image.file, image.offset, image.size), 'file_name': os.fsencode(image.name)}
    if isinstance(image.label, Mask):
        return record | {'mask': read_bytes(image.label.file, 0, image.label.size)}
    return record | {'label': image.label}


def _write_info(path: Path, directory: Path, splits: list[dict], target: str) -> None:
    feature_keys = [{'featureKey': 'image'}, {'featureKey': target}]
    info = {
        'name': directory.parent.name,
        'version': directory.name,
        'description': 'Prepared by convnext_jax; the bytes of the images are unchanged.',
        'fileFormat': 'array_record',
        'splits': splits,
        'supervisedKeys': {'tuple': {'items': feature_keys}},
    }
    path.write_text(to_json(info, indent=2), encoding='utf-8')
