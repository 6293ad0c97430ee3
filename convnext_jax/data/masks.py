"""Random access to encoded images and their masks, in folders or in prepared data sets, for semantic segmentation."""

import os
import warnings
from pathlib import Path
from typing import NamedTuple, Protocol

from convnext_jax.data.class_names import normalize
from convnext_jax.data.image_files import describe_left_out, find_images
from convnext_jax.data.mask_classes import MaskClasses, find_classes
from convnext_jax.data.sources import part_of_split, tfds_builder
from convnext_jax.data.unlabelled_images import ALL_IMAGES
from convnext_jax.errors import UserError, first_line
from convnext_jax.paths import local_path


class MaskedImage(NamedTuple):
    """An encoded image and its mask.

    Attributes:
        image, mask: the bytes of the files.
        image_name, mask_name: their locations, for messages.
    """

    image: bytes
    mask: bytes
    image_name: str
    mask_name: str


class MaskSource(Protocol):
    """One split of a data set.

    Attributes:
        classes: the classes of the masks.
    """

    @property
    def classes(self) -> MaskClasses: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> MaskedImage: ...

    def name(self, index: int) -> str:
        """The location of an image, for messages; the image is not read."""


def open_masks(
    name: str,
    directory: str,
    split: str,
    *,
    image_dir: str = 'images',
    mask_dir: str = 'annotations',
    classes: str = '',
    reduce_zero_label: bool = False,
) -> MaskSource:
    """Opens one split of a data set.

    Args:
        name: 'masks' for two folders, or the name of a data set that `prepare_masks` wrote.
        directory: the folder of the data set, or the TFDS data directory of a prepared data set.
        split: name of the split, or a part of it, such as 'training[:90%]'; 'images' for folders without splits.
        image_dir, mask_dir: the folders of the images and masks in `directory`, with a folder for each split. A
            prepared data set has none.
        classes: the file with the list of classes. With '', it is looked for in the folder of masks, then in
            `directory`; a prepared data set contains it.
        reduce_zero_label: whether pixels of value 0 have no class; see `find_classes`.

    Raises:
        UserError: a folder, the split or the list of classes is missing, or an image or a mask has no counterpart.
    """
    if name == 'scene_parse150':
        raise UserError(
            "TFDS's scene_parse150 does not have the 150 classes of ADE20K's benchmark: its masks number 100 kinds of "
            'instances. Download ADEChallengeData2016, and set --config.data.name=masks --config.data.dir=DIR'
        )
    path = local_path(classes) if classes else None
    if name != 'masks':
        return PreparedMasks(name, directory, split, path, reduce_zero_label=reduce_zero_label)
    root = local_path(directory)
    images, masks = root / local_path(image_dir), root / local_path(mask_dir)
    for folder in (images, masks):
        _check_folder(folder)
    found = find_classes([masks, root], path, reduce_zero_label=reduce_zero_label)
    return MaskFolders(images, masks, split, found)


class MaskFolders:
    """A folder of images and a folder of masks. An image and its mask have the same path except for the suffix.

    `find_images` finds both, also in subfolders. A warning gives the number of ignored files.

    Args:
        images, masks: the folders, with a folder for each split.
        split: as for `open_masks`.
        classes: the classes of the masks.

    Raises:
        UserError: a folder is missing or contains no images; an image has no mask, a mask has no image, or two files
            differ in their suffix only; the split is invalid.
    """

    def __init__(self, images: Path, masks: Path, split: str, classes: MaskClasses):
        self.classes = classes
        whole, bracket, _ = split.partition('[')
        image_files, mask_files = (_files_of_split(folder, whole) for folder in (images, masks))
        for files, others, what, other, folder in (
            (image_files, mask_files, 'images', 'mask', masks),
            (mask_files, image_files, 'masks', 'image', images),
        ):
            alone = [path for key, path in files.items() if key not in others]
            if alone:
                raise UserError(
                    f'{len(alone)} of the {len(files)} {what} have no {other} in {folder}, such as {alone[0]}: '
                    'each image needs a mask of the same name'
                )
        pairs = [(path, mask_files[key]) for key, path in image_files.items()]
        self.files = [pairs[index] for index in part_of_split(len(pairs), split)] if bracket else pairs

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index][0]

    def __getitem__(self, index: int) -> MaskedImage:
        image, mask = self.files[index]
        return MaskedImage(_read(image), _read(mask), image, mask)


class PreparedMasks:
    """A TFDS data set in ArrayRecord format with the features `image` and `mask`, as `prepare_masks` writes it.

    Args:
        name, directory, split: as for `open_masks`.
        classes: the file with the list of classes; None for the list in the data set.
        reduce_zero_label: as for `open_masks`.

    Raises:
        UserError: the data set or split is missing, damaged, or has no masks; or as for `find_classes`.
    """

    def __init__(self, name: str, directory: str, split: str, classes: Path | None, *, reduce_zero_label: bool):
        import tensorflow_datasets as tfds

        builder = tfds_builder(name, directory)
        if not {'image', 'mask'} <= set(builder.info.features):
            raise UserError(
                f'{name} has no masks: its features are {sorted(builder.info.features)}. Set --config.data.name=masks '
                'for images and masks in folders'
            )
        self.classes = find_classes([Path(builder.data_path)], classes, reduce_zero_label=reduce_zero_label)
        raw = tfds.decode.SkipDecoding()
        try:
            self._records = builder.as_data_source(split, decoders={'image': raw, 'mask': raw})
        except (ValueError, AssertionError, NotImplementedError) as error:
            raise UserError(f"{name} has no split '{split}' in ArrayRecord format: {first_line(error)}") from error
        self._split = f'{name} {split}'

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        return f'{self._split}, example {index}'

    def __getitem__(self, index: int) -> MaskedImage:
        try:
            record = self._records[index]
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f'{self.name(index)} cannot be read: {first_line(error)}') from error
        name = f'{self.name(index)} ({os.fsdecode(record["file_name"])})'
        return MaskedImage(record['image'], record['mask'], name, f'mask of {name}')


def _files_of_split(folder: Path, split: str) -> dict[str, str]:
    """The images of a split: path in the folder of the split, without the suffix → path."""
    root = folder if split == ALL_IMAGES and not (folder / ALL_IMAGES).is_dir() else folder / split
    _check_folder(root)
    found = find_images(root)
    if not found.paths:
        raise UserError(f'{root} contains no images')
    if found.left_out:
        warnings.warn(f'{root}: {describe_left_out(found.left_out)}', stacklevel=4)
    files: dict[str, str] = {}
    for path in found.paths:
        key = normalize(os.path.splitext(os.path.relpath(path, root))[0])
        if key in files:
            raise UserError(f'{files[key]} and {path} differ in their suffix only: remove one of them')
        files[key] = path
    return files


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f'{folder} is not a folder: set --config.data.dir=DIR, and --config.data.image_dir and '
            '--config.data.mask_dir to the folders in it that contain a folder for each split'
        )


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from error
