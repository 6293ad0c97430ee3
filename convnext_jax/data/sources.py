"""Data sources: random access to encoded images and their labels in folders, tar shards and TFDS data sets."""

import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from convnext_jax.data.class_names import normalize
from convnext_jax.data.image_files import IMAGE_SUFFIXES, describe_left_out, find_images
from convnext_jax.data.shards import find_shards, open_index, read_bytes
from convnext_jax.errors import UserError, first_line
from convnext_jax.paths import local_path, plain_path

BUNDLED = {'fashion_mnist_mini': Path(__file__).parent / 'fashion_mnist_mini' / '1.0.0'}
# ImageNet-A (arXiv:1907.07174) and ImageNet-R (arXiv:2006.16241) have 200 of ImageNet's classes. Their protocols
# compare only these 200 outputs of a model.
SUBSET_DATASETS = ('imagenet_a', 'imagenet_r')
MAX_CLASSES = 10**6  # a larger label is not a class number; it may be the number of the image


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """One encoded image.

    Attributes:
        image: the bytes of the file.
        label: the class; or a tuple, possibly empty, of classes that are all correct.
        name: location of the image, for messages.
    """

    image: bytes
    label: int | tuple[int, ...]
    name: str


class Source(Protocol):
    """One split of a data set.

    Attributes:
        class_names: the names of the labels, in order.
        multi_label: whether the labels of the examples are tuples.
        eval_classes: the labels whose outputs an evaluation compares; None for all.
    """

    @property
    def class_names(self) -> Sequence[str]: ...

    @property
    def multi_label(self) -> bool: ...

    @property
    def eval_classes(self) -> tuple[int, ...] | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> EncodedImage: ...

    def name(self, index: int) -> str:
        """The location of an example, for messages; the example is not read."""


def open_source(name: str, directory: str, split: str) -> Source:
    """Opens one split of a data set.

    Args:
        name: 'fashion_mnist_mini' (bundled), 'folder', 'webdataset', or the name of a TFDS data set of labelled images.
        directory: the folder of the images or tar shards, or the TFDS data directory; '' for the bundled data set.
        split: name of the split, or a part of a split in TFDS's notation, such as 'train[:99%]'.

    Raises:
        UserError: the data set, the split or its images are missing, or the data set does not have labelled images.
    """
    files: dict[str, Callable[[Path, str], Source]] = {'folder': FolderSource, 'webdataset': WebDatasetSource}
    if name not in files:
        return TfdsSource(name, directory, split)
    whole, bracket, _ = split.partition('[')
    source = files[name](local_path(directory), whole)
    return Part(source, split) if bracket else source


class FolderSource:
    """A folder of images, `directory/split/CLASS/*.jpg`, with classes in alphabetical order.

    `find_images` finds the images of a class, also in subfolders. A warning counts the ignored files.

    Raises:
        UserError: a folder is missing, cannot be read, or contains no images.
    """

    multi_label = False
    eval_classes = None

    def __init__(self, directory: Path, split: str):
        root = directory / split
        if not root.is_dir():
            raise UserError(
                f'{root} is not a folder: set --config.data.dir=DIR to a folder that contains a folder for each split, '
                'with a folder for each class'
            )
        everything = sorted(root.iterdir(), key=lambda path: normalize(path.name))
        entries = [path for path in everything if not path.name.startswith('.')]
        broken = [path.name for path in entries if path.is_symlink() and not path.exists()]
        if broken:
            raise UserError(f'{root} contains broken links: {", ".join(broken)}. Remove or repair them')
        folders = [path for path in entries if path.is_dir()]
        if not folders:
            raise UserError(f'{root} contains no folders: put the images into {root}/CLASS/')
        self._split, self._folders = split, folders
        self.class_names = [folder.name for folder in folders]
        self.files: list[tuple[str, int]] = []
        beside = {'files': len(entries) - len(folders), 'hidden entries': len(everything) - len(entries)}
        left_out = Counter({f'{kind} beside the class folders': count for kind, count in beside.items() if count})
        for label, folder in enumerate(folders):
            found = find_images(folder, root)
            if not found.paths:
                ignored = f' ({describe_left_out(found.left_out)})' if found.left_out else ''
                raise UserError(f'class folder {folder} contains no images{ignored}: add images or remove the folder')
            left_out += found.left_out
            self.files += [(path, label) for path in found.paths]  # strings, because Paths are slow to pickle
        if left_out:
            warnings.warn(f'{root}: {describe_left_out(left_out)}', stacklevel=3)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index][0]

    def __getitem__(self, index: int) -> EncodedImage:
        path, label = self.files[index]
        try:
            return EncodedImage(Path(path).read_bytes(), label, path)
        except OSError as error:
            raise UserError(f'{path} cannot be read: {error.strerror}') from error

    def subfolders_hint(self) -> str:
        """A hint for an error message if the only class folder has subfolders, which may be the classes; else ''."""
        folder, *others = self._folders
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.'))
        if others or not names:
            return ''
        shown = ', '.join(names[:5]) + (', …' if len(names) > 5 else '')
        split = f'{self._split}/{folder.name}'
        return (
            f'. {folder} contains the folders {shown}: if they are the classes, move them to {folder.parent}, '
            f'or train with the split {split}'
        )


class WebDatasetSource:
    """WebDataset's tar shards with KEY.jpg and KEY.cls (the number of the class), with random access.

    The class names are the lines of `directory/classnames.txt`. Without this file they are the numbers.

    Args:
        directory, split: as for `find_shards`.
        labelled: False ignores the labels; KEY.cls files may then be missing, and there are no class names.

    Raises:
        UserError: as for `find_shards` and `open_index`; or a label is missing or too large.
    """

    multi_label = False
    eval_classes = None

    def __init__(self, directory: Path, split: str, *, labelled: bool = True):
        self._shards = find_shards(directory, split)
        self._index = open_index(directory, split, self._shards, IMAGE_SUFFIXES)
        self.class_names = self._read_class_names(directory, split) if labelled else []

    def _read_class_names(self, directory: Path, split: str) -> list[str]:
        labels = self._index['label']
        missing = np.flatnonzero(labels < 0)
        if len(missing):
            raise UserError(
                f'{len(missing)} of {len(labels)} images of {split} have no .cls file, such as '
                f'{self.name(int(missing[0]))}: a classifier needs the class of each image'
            )
        largest = int(labels.max())
        path = directory / 'classnames.txt'
        if largest >= MAX_CLASSES:
            raise UserError(
                f'{directory}: {split} has an image of class {largest}: .cls files must contain class numbers'
            )
        names = _lines(path) if path.is_file() else [str(label) for label in range(largest + 1)]
        if largest >= len(names):
            raise UserError(f'{path} has {len(names)} class names, but {split} has images of class {largest}')
        return names

    def __len__(self) -> int:
        return len(self._index)

    def name(self, index: int) -> str:
        row = self._index[index]
        return f'{self._shards[row["shard"]]}, {row["name"].decode(errors="replace")}'

    def __getitem__(self, index: int) -> EncodedImage:
        row = self._index[index]
        image = read_bytes(self._shards[row['shard']], int(row['offset']), int(row['size']))
        return EncodedImage(image, int(row['label']), self.name(index))

    def __getstate__(self) -> dict:
        return self.__dict__ | {'_index': self._index.filename}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state | {'_index': np.load(state['_index'], mmap_mode='r', allow_pickle=False)}


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding='utf-8-sig').rstrip('\n').split('\n')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read as UTF-8: {first_line(error)}') from error
    if not all(lines):
        raise UserError(f'{path}: line {lines.index("") + 1} is empty, but each line must be a class name')
    return lines


class Part:
    """A part of a source in TFDS's notation, as for `part_of_split`."""

    def __init__(self, source: Source, split: str):
        self._source = source
        self._indices = part_of_split(len(source), split)
        self.class_names, self.multi_label, self.eval_classes = (
            source.class_names,
            source.multi_label,
            source.eval_classes,
        )

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def __getitem__(self, index: int) -> EncodedImage:
        return self._source[int(self._indices[index])]


def part_of_split(length: int, split: str) -> np.ndarray:
    """The indices of a part of a split in TFDS's notation, such as 'train[:99%]': (n,) int.

    The part is taken from a fixed random order of the examples.

    Args:
        length: number of examples in the whole split.
        split: name of the split and the part.

    Raises:
        UserError: the notation is invalid, or the part is empty.
    """
    import tensorflow_datasets as tfds

    whole = tfds.core.SplitInfo(name=split.partition('[')[0], shard_lengths=[length], num_bytes=0)
    try:
        part, *more = tfds.core.ReadInstruction.from_spec(split).to_absolute({whole.name: whole})
    except (ValueError, AssertionError) as error:
        raise UserError(f"split '{split}' must be like train[:99%] or train[1000:]: {first_line(error)}") from error
    if more:
        raise UserError(f"split '{split}': for a folder or tar shards, give one part only, such as train[:99%]")
    indices = np.random.default_rng(0).permutation(length)[part.from_ : part.to]
    if not len(indices):
        raise UserError(f"split '{split}' contains none of the {length} images")
    return indices


class TfdsSource:
    """A TFDS data set in ArrayRecord format with features `image` and `label` or `real_label`, read without TensorFlow.

    Raises:
        UserError: the data set or split is missing, damaged, or does not have labelled images.
    """

    def __init__(self, name: str, directory: str, split: str):
        import tensorflow_datasets as tfds  # imported here because the import takes half a second

        builder = tfds_builder(name, directory)
        features = builder.info.features
        self.multi_label = 'real_label' in features
        self._field = 'real_label' if self.multi_label else 'label'
        label: Any = features[self._field] if self._field in features else None  # noqa: SIM401 - not a dict
        label = getattr(label, 'feature', label)  # the label in a sequence of labels
        if 'image' not in features or not hasattr(label, 'names'):
            raise UserError(f'{name} has no labelled images: its features are {sorted(features)}')

        def records(split: str) -> Sequence:
            return builder.as_data_source(split, decoders={'image': tfds.decode.SkipDecoding()})

        try:
            self._records = records(split)
        except (ValueError, AssertionError, NotImplementedError) as error:
            raise UserError(f"{name} has no split '{split}' in ArrayRecord format: {first_line(error)}") from error
        self.class_names = list(label.names)
        self._split = f'{name} {split}'
        self.eval_classes = None
        if builder.name in SUBSET_DATASETS:
            self.eval_classes = tuple(sorted({int(record['label']) for record in records(split.split('[')[0])}))

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        return f'{self._split}, example {index}'

    def __getitem__(self, index: int) -> EncodedImage:
        try:
            record = self._records[index]
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f'{self.name(index)} cannot be read: {first_line(error)}') from error
        label, name = record[self._field], self.name(index)
        if record.get('file_name'):  # stored by `prepare`
            name += f' ({os.fsdecode(record["file_name"])})'
        return EncodedImage(record['image'], tuple(map(int, label)) if self.multi_label else int(label), name)


def tfds_builder(name: str, directory: str):
    """TFDS's builder of a data set that is in `directory`, or that is bundled.

    Raises:
        UserError: the data set is missing or damaged.
    """
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    if name in BUNDLED and not directory:
        return tfds.builder_from_directory(BUNDLED[name])
    if not directory:
        raise UserError(f'data.dir is not set: set --config.data.dir=DIR to the folder of {name}')
    folder = local_path(directory)
    if not folder.is_dir():
        raise UserError(f'data.dir={directory} is not a folder: set --config.data.dir=DIR to the folder of {name}')
    try:
        builder = tfds.builder(name, data_dir=str(plain_path(folder)))
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"there is no data set '{name}' in {directory}, and TFDS does not know this name") from error
    except ParseError as error:
        raise UserError(f'the dataset_info.json of {name} in {directory} is damaged: {first_line(error)}') from error
    except (ValueError, AssertionError) as error:
        raise UserError(f"'{name}' is not a TFDS name, config or version: {first_line(error)}") from error
    if not builder.info.splits:
        raise UserError(f'{directory} does not contain {name}: prepare it with TFDS and file_format=array_record')
    return builder
