"""Where examples come from: random access to encoded images and their labels."""

import contextlib
import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from convnext_jax.data.class_names import match_names, normalize, outputs_of_classes
from convnext_jax.data.image_files import IMAGE_SUFFIXES, describe_left_out, find_images
from convnext_jax.data.shards import find_shards, open_index, read_bytes
from convnext_jax.errors import UserError, first_line
from convnext_jax.paths import local_path, plain_path

BUNDLED = {'fashion_mnist_mini': Path(__file__).parent / 'fashion_mnist_mini' / '1.0.0'}
# ImageNet-A (arXiv:1907.07174) and -R (arXiv:2006.16241) hold 200 of ImageNet's classes, and score among these alone.
SOME_CLASSES = ('imagenet_a', 'imagenet_r')
MOST_CLASSES = 10**6  # a larger label is something else, an image's number say


@dataclasses.dataclass(frozen=True)
class Example:
    """One encoded image.

    Attributes:
        image: the bytes of its file.
        label: its class; or the classes that all count as right, of which there may be none.
        name: tells a person where it is.
    """

    image: bytes
    label: int | tuple[int, ...]
    name: str


class Source(Protocol):
    """One split of a data set.

    Attributes:
        class_names: of all labels.
        many_labels: whether an example's label is a tuple.
        judged: the labels that an evaluation chooses among; None for all.
    """

    @property
    def class_names(self) -> Sequence[str]: ...

    @property
    def many_labels(self) -> bool: ...

    @property
    def judged(self) -> tuple[int, ...] | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def name(self, index: int) -> str:
        """Tells a person where an example is, without reading it."""


def open_source(name: str, directory: str, split: str) -> Source:
    """Opens one split.

    Args:
        name: 'fashion_mnist_mini' (bundled), 'folder', 'webdataset', or the name of a TFDS data set of labelled images.
        directory: the folder of images or of tar shards, or the TFDS data directory; the bundled set needs none.
        split: a folder's or the shards' name, a TFDS split, or a part of either such as 'train[:99%]'.

    Raises:
        UserError: the data set, the split or an image is not there, or the data set is not one of labelled images.
    """
    files: dict[str, Callable[[Path, str], Source]] = {'folder': FolderSource, 'webdataset': WebDatasetSource}
    if name not in files:
        return TfdsSource(name, directory, split)
    whole, bracket, _ = split.partition('[')
    source = files[name](local_path(directory), whole)
    return Part(source, split) if bracket else source


def check_has_classes(source: Source, name: str) -> None:
    """Refuses to learn from a set with one class: the loss is 0 from the first step, and the accuracy 100 %.

    Args:
        source: the training split.
        name: where it is, for the error message.

    Raises:
        UserError: the set has one class.
    """
    if len(source.class_names) == 1:
        only, below = source.class_names[0], _folders_below(source)
        raise UserError(f"{name} has one class, '{only}', and a classifier needs two or more{below}")


def with_classes_of_model(source: Source, class_names: Sequence[str] | None, outputs: int) -> tuple[Source, str]:
    """Gives the examples of a split the labels of a model's outputs, matched by class name.

    Args:
        source: a split.
        class_names: of the model's first outputs; None if unknown.
        outputs: how many outputs the model has.

    Returns:
        The split with the model's labels and class names; and a line for the user, as `outputs_of_classes`.

    Raises:
        UserError: as `outputs_of_classes`.
    """
    with _hint_at_folders_below(source):
        labels, note = outputs_of_classes(source.class_names, class_names, outputs)
    return _relabelled(source, labels, class_names or source.class_names), note


def with_classes_of_split(source: Source, other: Source, split: str) -> Source:
    """Gives the examples of a split the labels that their classes have in another split, called `split`.

    Raises:
        UserError: the other split lacks a class.
    """
    with _hint_at_folders_below(source):
        labels = match_names(source.class_names, other.class_names, f'split {split}')
    return _relabelled(source, labels, other.class_names)


@contextlib.contextmanager
def _hint_at_folders_below(source: Source) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f'{error}{_folders_below(source)}') from error


def _folders_below(source: Source) -> str:
    return source.folders_below() if isinstance(source, FolderSource) else ''


def _relabelled(source: Source, labels: list[int], class_names: Sequence[str]) -> Source:
    same = labels == list(range(len(class_names)))
    return source if same else Relabelled(source, labels, class_names)


class Relabelled:
    """A source under the class names of a model; `labels` gives the model's output for each class of the source."""

    def __init__(self, source: Source, labels: Sequence[int], class_names: Sequence[str]):
        self._source, self._labels = source, list(labels)
        self.class_names, self.many_labels = list(class_names), source.many_labels
        self.judged = None if source.judged is None else tuple(sorted(self._labels[label] for label in source.judged))

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        label = example.label
        new = tuple(self._labels[each] for each in label) if isinstance(label, tuple) else self._labels[label]
        return dataclasses.replace(example, label=new)


class FolderSource:
    """A folder of images, `directory/split/CLASS/*.jpg`: classes are numbered in the order of their names.

    `find_images` says what counts as an image, at any depth; a warning counts what is left out.
    """

    many_labels = False
    judged = None

    def __init__(self, directory: Path, split: str):
        root = directory / split
        if not root.is_dir():
            raise UserError(
                f'{root} is not a folder: data.dir holds one folder for each split, and in it one for each class. '
                '--config.data.dir=DIR says where'
            )
        everything = sorted(root.iterdir(), key=lambda path: normalize(path.name))
        entries = [path for path in everything if not path.name.startswith('.')]
        lost = [path.name for path in entries if path.is_symlink() and not path.exists()]
        if lost:
            raise UserError(f'{root} has links that lead nowhere: {", ".join(lost)}')
        folders = [path for path in entries if path.is_dir()]
        if not folders:
            raise UserError(f'{root} holds no folders: images are expected in {root}/CLASS/')
        self._split, self._folders = split, folders
        self.class_names = [folder.name for folder in folders]
        self.files: list[tuple[str, int]] = []
        beside = {'files': len(entries) - len(folders), 'hidden entries': len(everything) - len(entries)}
        left_out = Counter({f'{kind} beside the class folders': count for kind, count in beside.items() if count})
        for label, folder in enumerate(folders):
            found = find_images(folder, root)
            if not found.paths:
                left = f'; {describe_left_out(found.left_out)}' if found.left_out else ''
                raise UserError(f'class folder {folder} holds no images{left}')
            left_out += found.left_out
            self.files += [(path, label) for path in found.paths]  # strings: a Path is slow to send to a process
        if left_out:
            warnings.warn(f'{root}: {describe_left_out(left_out)}', stacklevel=3)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index][0]

    def __getitem__(self, index: int) -> Example:
        path, label = self.files[index]
        try:
            return Example(Path(path).read_bytes(), label, path)
        except OSError as error:
            raise UserError(f'{path} cannot be read: {error.strerror}') from error

    def folders_below(self) -> str:
        """A hint, for an error message, that the folders below the only class folder may be the classes; or ''."""
        folder, *others = self._folders
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.'))
        if others or not names:
            return ''
        shown = ', '.join(names[:5]) + (', …' if len(names) > 5 else '')
        split = f'{self._split}/{folder.name}'
        return (
            f'. {folder} holds the folders {shown}: if they are the classes, move them up into {folder.parent}, '
            f'or train with the split {split}'
        )


class WebDatasetSource:
    """Tar shards of KEY.jpg and KEY.cls, the number of its class, as WebDataset writes them, read in any order.

    Classes are named by `directory/classnames.txt`, one a line, or else by their numbers.
    """

    many_labels = False
    judged = None

    def __init__(self, directory: Path, split: str):
        self._shards = find_shards(directory, split)
        self._index = open_index(directory, split, self._shards, IMAGE_SUFFIXES)
        largest = int(self._index['label'].max())
        path = directory / 'classnames.txt'
        if largest >= MOST_CLASSES:
            raise UserError(f'{directory}: {split} has an image of class {largest}, which can be no number of a class')
        self.class_names = _lines(path) if path.is_file() else [str(label) for label in range(largest + 1)]
        if largest >= len(self.class_names):
            raise UserError(f'{path} names {len(self.class_names)} classes; {split} has images of class {largest}')

    def __len__(self) -> int:
        return len(self._index)

    def name(self, index: int) -> str:
        row = self._index[index]
        return f'{self._shards[row["shard"]]}, {row["name"].decode(errors="replace")}'

    def __getitem__(self, index: int) -> Example:
        row = self._index[index]
        image = read_bytes(self._shards[row['shard']], int(row['offset']), int(row['size']))
        return Example(image, int(row['label']), self.name(index))

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
        raise UserError(f'{path} has an empty line {lines.index("") + 1}: a class has a name')
    return lines


class Part:
    """A part of a source, 'train[:99%]' in TFDS's notation, cut out of an order in which the classes are mixed."""

    def __init__(self, source: Source, split: str):
        import tensorflow_datasets as tfds

        whole = tfds.core.SplitInfo(name=split.partition('[')[0], shard_lengths=[len(source)], num_bytes=0)
        try:
            part, *more = tfds.core.ReadInstruction.from_spec(split).to_absolute({whole.name: whole})
        except (ValueError, AssertionError) as error:
            raise UserError(f"split '{split}' is not as train[:99%] or train[1000:]: {first_line(error)}") from error
        if more:
            raise UserError(f"split '{split}': of a folder or of shards one part is taken, as train[:99%]")
        self._source = source
        self._indices = np.random.default_rng(0).permutation(len(source))[part.from_ : part.to]
        if not len(self._indices):
            raise UserError(f"split '{split}' holds none of the {len(source)} images")
        self.class_names, self.many_labels, self.judged = source.class_names, source.many_labels, source.judged

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._indices[index])]


class TfdsSource:
    """A TFDS data set in ArrayRecord form, read without TensorFlow: features `image`, and `label` or `real_label`."""

    def __init__(self, name: str, directory: str, split: str):
        import tensorflow_datasets as tfds  # takes half a second: only where it is needed

        builder = _tfds_builder(name, directory)
        features = builder.info.features
        self.many_labels = 'real_label' in features
        self._field = 'real_label' if self.many_labels else 'label'
        label: Any = features[self._field] if self._field in features else None  # noqa: SIM401 - no dict
        label = getattr(label, 'feature', label)  # of a sequence
        if 'image' not in features or not hasattr(label, 'names'):
            raise UserError(f'{name} is no image classification: its features are {sorted(features)}')

        def records(split: str) -> Sequence:
            return builder.as_data_source(split, decoders={'image': tfds.decode.SkipDecoding()})

        try:
            self._records = records(split)
        except (ValueError, AssertionError, NotImplementedError) as error:
            raise UserError(f"{name} has no split '{split}' in ArrayRecord form: {first_line(error)}") from error
        self.class_names = list(label.names)
        self._split = f'{name} {split}'
        self.judged = None
        if builder.name in SOME_CLASSES:
            self.judged = tuple(sorted({int(record['label']) for record in records(split.split('[')[0])}))

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        return f'{self._split}, example {index}'

    def __getitem__(self, index: int) -> Example:
        try:
            record = self._records[index]
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f'{self.name(index)} cannot be read: {first_line(error)}') from error
        label, name = record[self._field], self.name(index)
        if record.get('file_name'):  # as `prepare` stores it
            name += f' ({os.fsdecode(record["file_name"])})'
        return Example(record['image'], tuple(map(int, label)) if self.many_labels else int(label), name)


def _tfds_builder(name: str, directory: str):
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    if name in BUNDLED and not directory:
        return tfds.builder_from_directory(BUNDLED[name])
    if not directory:
        raise UserError(f'data.dir is not set: say with --config.data.dir=DIR where {name} is on this machine')
    folder = local_path(directory)
    if not folder.is_dir():
        raise UserError(
            f'data.dir={directory} is not a folder: say with --config.data.dir=DIR where {name} is on this machine'
        )
    try:
        builder = tfds.builder(name, data_dir=str(plain_path(folder)))
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"TFDS knows no data set '{name}', and there is none of that name in {directory}") from error
    except ParseError as error:
        raise UserError(f'the dataset_info.json of {name} in {directory} is damaged: {first_line(error)}') from error
    except (ValueError, AssertionError) as error:
        raise UserError(f"'{name}' is no TFDS name, config or version: {first_line(error)}") from error
    if not builder.info.splits:
        raise UserError(f'{directory} holds no prepared {name}: prepare it with TFDS, file_format=array_record')
    return builder
