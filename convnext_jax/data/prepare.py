"""The `prepare` command: converts ImageNet's tar files or folders of images to a TFDS data set, without TensorFlow."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from convnext_jax.data.class_names import match_names
from convnext_jax.data.dataset_writer import Image, Mask, describe_dataset, write_dataset
from convnext_jax.data.mask_classes import find_classes
from convnext_jax.data.masks import MaskFolders
from convnext_jax.data.relabelling import check_has_classes
from convnext_jax.data.shards import tar_members
from convnext_jax.data.sources import FolderSource
from convnext_jax.errors import UserError
from convnext_jax.output import say
from convnext_jax.paths import local_path

TARS = {'train': 'ILSVRC2012_img_train.tar', 'validation': 'ILSVRC2012_img_val.tar'}
OFFICIAL_COUNTS = {'train': 1_281_167, 'validation': 50_000}


def prepare_imagenet2012(manual_dir: Path, data_dir: Path) -> None:
    """Writes `imagenet2012` from the official tar files, with the labels, names and order of TFDS's version 5.1.0.

    TFDS re-encodes 22 CMYK images and a PNG among the JPEGs. Here they are unchanged, because the decoder reads them.

    Args:
        manual_dir: folder that contains the tar files.
        data_dir: TFDS data directory in which the data set is created.

    Raises:
        UserError: a tar file is missing or damaged, or has unknown members; or as for `write_dataset`.
    """
    directory = data_dir / 'imagenet2012' / '5.1.0'
    if _is_prepared(directory):
        return
    missing = [str(manual_dir / tar) for tar in TARS.values() if not (manual_dir / tar).is_file()]
    if missing:
        raise UserError(
            f'missing: {" and ".join(missing)}. Download them from image-net.org, and give their folder as --manual_dir'
        )
    class_names = _tfds_lines('labels.txt')
    splits = {
        'train': _imagenet_train(manual_dir / TARS['train'], class_names),
        'validation': _imagenet_validation(manual_dir / TARS['validation'], class_names),
    }
    for split, images in splits.items():
        if not images:
            raise UserError(f'{manual_dir / TARS[split]} contains no images: download it again')
        if len(images) != OFFICIAL_COUNTS[split]:
            found = f'{manual_dir / TARS[split]} contains {len(images):,} images'
            say(f'warning: {found}, but the official file contains {OFFICIAL_COUNTS[split]:,}', error=True)
    write_dataset(directory, class_names, splits, encoding_format='jpeg')


def prepare_folder(manual_dir: Path, data_dir: Path, name: str) -> None:
    """Writes the images `manual_dir/SPLIT/CLASS/*.jpg` as the TFDS data set `name`, version 1.0.0.

    Args:
        manual_dir: folder that contains one folder for each split.
        data_dir: TFDS data directory in which the data set is created.
        name: name of the data set.

    Raises:
        UserError: the name is taken or invalid, a split has a class that is missing in the split with the most classes,
            there is only one class, or a split is not a folder of class folders; or as for `write_dataset`.
    """
    _check_name(name)
    directory = data_dir / name / '1.0.0'
    if _is_prepared(directory):
        return
    if not manual_dir.is_dir():
        raise UserError(f'--manual_dir={manual_dir} is not a folder')
    splits = _subfolders(manual_dir)
    if not splits:
        raise UserError(f'{manual_dir} contains no folders: put the images into {manual_dir}/SPLIT/CLASS/')
    sources = {split: FolderSource(manual_dir, split) for split in splits}
    largest = max(splits, key=lambda split: len(sources[split].class_names))  # other splits may have fewer
    check_has_classes(sources[largest], str(manual_dir / largest))
    class_names = sources[largest].class_names
    for class_name in class_names:  # TFDS stores them as the lines of a file
        if class_name != class_name.strip() or len(class_name.splitlines()) != 1 or not class_name.isprintable():
            raise UserError(f'{class_name!r} is not a valid class name in TFDS: rename its folder')
    for split in sources:
        _check_split(manual_dir / split)
    images = {}
    for split, source in sources.items():
        labels = match_names(source.class_names, class_names, str(manual_dir / largest))
        images[split] = _folder_images(manual_dir / split, source, labels)
    write_dataset(directory, class_names, images, encoding_format=None)


def prepare_masks(
    manual_dir: Path,
    data_dir: Path,
    name: str,
    *,
    image_dir: str = 'images',
    mask_dir: str = 'annotations',
    classes: str = '',
    reduce_zero_label: bool = False,
) -> None:
    """Writes images and masks in folders as the TFDS data set `name`, version 1.0.0.

    Each folder that is both in `image_dir` and in `mask_dir` is a split. The masks are stored unchanged, so training
    needs the same `reduce_zero_label`.

    Args:
        manual_dir: the folder of the data set.
        data_dir: TFDS data directory in which the data set is created.
        name: name of the data set.
        image_dir, mask_dir, classes, reduce_zero_label: as for `open_masks`.

    Raises:
        UserError: the name is taken or invalid, or there are no splits; or as for `find_classes`, `MaskFolders` and
            `write_dataset`.
    """
    _check_name(name)
    directory = data_dir / name / '1.0.0'
    if _is_prepared(directory):
        return
    image_root, mask_root = manual_dir / local_path(image_dir), manual_dir / local_path(mask_dir)
    for root in (image_root, mask_root):
        if not root.is_dir():
            raise UserError(f'{root} is not a folder: set --manual_dir, --image_dir and --mask_dir')
    splits = [split for split in _subfolders(image_root) if (mask_root / split).is_dir()]
    if not splits:
        raise UserError(f'{image_root} and {mask_root} have no folders of equal names: they need one for each split')
    found = find_classes(
        [mask_root, manual_dir], local_path(classes) if classes else None, reduce_zero_label=reduce_zero_label
    )
    images = {}
    for split in splits:
        _check_split(image_root / split)
        images[split] = _masked_images(image_root / split, MaskFolders(image_root, mask_root, split, found))
    write_dataset(directory, found, images, encoding_format=None)


def _check_name(name: str) -> None:
    """Raises UserError if a data set cannot have this name."""
    import tensorflow_datasets as tfds

    if not re.fullmatch('[a-z][a-z0-9_]*', name):
        raise UserError(f"--name={name}: a TFDS name starts with a letter and consists of a-z, 0-9 and '_'")
    if name in ('folder', 'webdataset', 'masks', *tfds.list_builders(with_community_datasets=False)):
        raise UserError(f'--name={name} is the name of another data set: choose another name')


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.'))


def _check_split(folder: Path) -> None:
    """Raises UserError if the name of the folder cannot be the name of a split."""
    if not re.fullmatch(r'\w+', folder.name) or folder.name == 'all':
        raise UserError(f"{folder} is not a valid split name: rename it to letters, digits and '_'")


def _tfds_lines(name: str) -> list[str]:
    import tensorflow_datasets as tfds

    return tfds.core.tfds_path(f'datasets/imagenet2012/{name}').read_text().split()


def _imagenet_train(path: Path, class_names: Sequence[str]) -> list[Image]:
    images = []
    labels = {f'{synset}.tar': label for label, synset in enumerate(class_names)}
    for inner in tqdm(tar_members(path), 'reading the train tar', unit='tar', disable=not sys.stderr.isatty()):
        if inner.name not in labels:
            raise UserError(f'{path} contains {inner.name}, which is not the SYNSET.tar of one of the 1,000 classes')
        label = labels[inner.name]
        images += [Image(name, label, path, offset, size) for name, offset, size in tar_members(path, inner)]
    return images


def _imagenet_validation(path: Path, class_names: Sequence[str]) -> list[Image]:
    images = []
    synsets = _tfds_lines('validation_labels.txt')  # line i is the class of image i, counted from 1
    for name, offset, size in tar_members(path):
        number = re.fullmatch(r'ILSVRC2012_val_(\d{8})\.JPEG', name)
        if not number or not 1 <= int(number[1]) <= len(synsets):
            raise UserError(f'{path} contains {name}, which is not one of ILSVRC2012_val_00000001.JPEG to …50000.JPEG')
        images.append(Image(name, class_names.index(synsets[int(number[1]) - 1]), path, offset, size))
    return images


def _folder_images(root: Path, source: FolderSource, labels: Sequence[int]) -> list[Image]:
    paths = ((Path(path), labels[label]) for path, label in source.files)
    try:
        return [Image(str(path.relative_to(root)), label, path, 0, path.stat().st_size) for path, label in paths]
    except OSError as error:
        raise UserError(f'{error.filename} cannot be read: {error.strerror}') from error


def _masked_images(root: Path, source: MaskFolders) -> list[Image]:
    pairs = ((Path(image), Path(mask)) for image, mask in source.files)
    try:
        return [
            Image(str(image.relative_to(root)), Mask(mask, mask.stat().st_size), image, 0, image.stat().st_size)
            for image, mask in pairs
        ]
    except OSError as error:
        raise UserError(f'{error.filename} cannot be read: {error.strerror}') from error


def _is_prepared(directory: Path) -> bool:
    if directory.is_dir():
        say(f'{describe_dataset(directory)}: already prepared (remove it to prepare it again)')
    return directory.is_dir()
