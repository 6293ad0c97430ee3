"""Data sets of images without labels: a folder, tar shards, or a labelled source whose labels are ignored."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from convnext_jax.data.dataset import Dataset, Example, Features
from convnext_jax.data.image_files import describe_left_out, find_images
from convnext_jax.data.labelled_images import EvalImages, TrainImages
from convnext_jax.data.sources import EncodedImage, Part, Source, WebDatasetSource, open_source
from convnext_jax.errors import UserError
from convnext_jax.paths import local_path

ALL_IMAGES = 'images'
"""Name of the split that contains all images of `data.dir`, for a folder without subfolders for splits."""


def open_images(name: str, directory: str, split: str) -> Source:
    """Opens one split. A folder may contain images at any depth, and tar shards need no KEY.cls files.

    Args:
        name, directory: as for `open_source`.
        split: as for `open_source`. If `name` is 'folder', also 'images' or a part of it, such as 'images[:95%]'.

    Raises:
        UserError: as for `open_source`.
    """
    files: dict[str, Callable[[Path, str], Source]] = {
        'folder': UnlabelledFolder,
        'webdataset': functools.partial(WebDatasetSource, labelled=False),
    }
    if name not in files:
        return open_source(name, directory, split)
    whole, bracket, _ = split.partition('[')
    source = files[name](local_path(directory), whole)
    return Part(source, split) if bracket else source


class UnlabelledFolder:
    """All images in `directory/split` and its subfolders.

    The split 'images' is `directory` itself, unless `directory` has a subfolder with this name. `find_images` decides
    which files are images. A warning counts the other files.
    """

    class_names = ()
    multi_label = False
    eval_classes = None

    def __init__(self, directory: Path, split: str):
        root = directory if split == ALL_IMAGES and not (directory / ALL_IMAGES).is_dir() else directory / split
        if not root.is_dir():
            raise UserError(
                f'{root} is not a folder: data.dir needs a subfolder for each split. If it has none, set '
                f'--config.data.train_split={ALL_IMAGES}[:95%] --config.data.eval_split={ALL_IMAGES}[95%:]'
            )
        found = find_images(root)
        left_out = describe_left_out(found.left_out) if found.left_out else ''
        if not found.paths:
            raise UserError(f'{root} contains no images' + (f'; {left_out}' if left_out else ''))
        if left_out:
            warnings.warn(f'{root}: {left_out}', stacklevel=3)
        self.files = found.paths

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def __getitem__(self, index: int) -> EncodedImage:
        path = self.files[index]
        try:
            return EncodedImage(Path(path).read_bytes(), (), path)
        except OSError as error:
            raise UserError(f'{path} cannot be read: {error.strerror}') from error


class UnlabelledImages(Dataset):
    """The images of a labelled data set, without the labels.

    Args:
        images: the images; their labels are dropped.
        numbered: whether an example also has `index`, () int32, its index in the data set.
    """

    def __init__(self, images: TrainImages | EvalImages, *, numbered: bool = False):
        self._images, self._numbered = images, numbered
        self.features: Features = {'image': images.features['image']}
        if numbered:
            self.features['index'] = jax.ShapeDtypeStruct((), np.int32)
        self.random = images.random

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int, draw: tuple[int, ...] = ()) -> Example:
        example: Example = {'image': self._images.load(index, draw)['image']}
        return example | ({'index': np.int32(index)} if self._numbered else {})

    def name(self, index: int) -> str:
        return self._images.name(index)

    def check(self, index: int) -> None:
        self._images.check(index)
