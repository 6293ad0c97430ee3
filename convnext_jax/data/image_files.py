"""The search for image files in a folder, with one rule for training, evaluation, `prepare` and `predict`."""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from convnext_jax.data.class_names import normalize
from convnext_jax.data.decode import DECODING_ERRORS, FORMATS
from convnext_jax.errors import UserError

IMAGE_SUFFIXES = {
    *('.jpg', '.jpeg', '.jpe', '.jfif', '.mpo', '.png', '.apng', '.webp', '.avif', '.avifs'),
    *('.tif', '.tiff', '.bmp', '.dib', '.gif', '.ppm', '.pgm', '.pbm', '.pnm', '.pfm'),
    *('.jp2', '.j2k', '.jpc', '.jpf', '.jpx', '.j2c'),
}
"""The file name suffixes of the formats that `decode` reads, except .npy."""


class FoundImages(NamedTuple):
    """The result of `find_images`.

    Attributes:
        paths: the image files, sorted by name.
        left_out: description of a kind of files or folders → number of ignored files or folders of this kind.
    """

    paths: list[str]
    left_out: Counter[str]


def find_images(folder: Path, split: Path | None = None) -> FoundImages:
    """Finds all images in a folder and its subfolders.

    A file is an image if it has a suffix in `IMAGE_SUFFIXES`, or if its content is an image. Files with TIFF content
    and an unknown suffix are not images, because they may be camera raw files. Hidden files and folders are ignored.
    Links to folders are followed, but no folder is read twice. A broken link with an image suffix counts as an image,
    so that the attempt to read it reports the problem. Files with the suffix .npy are images only if all other images
    are TIFF files: beside photographs, they may hold features.

    Args:
        folder: the folder to search.
        split: for a class folder, the folder of its split: links to other class folders of the split are ignored,
            because the images there have another class.

    Raises:
        UserError: a folder cannot be read.
    """
    paths: list[str] = []
    arrays: list[str] = []
    left_out: Counter[str] = Counter()
    seen = set()
    folders = [str(folder)]
    links: list[str] = []  # followed after all folders that are reached without links
    while folders or links:
        directory = folders.pop() if folders else links.pop()
        try:
            status = os.stat(directory)
            with os.scandir(directory) as found:
                entries = sorted(found, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise UserError(f'{directory} cannot be read: {error.strerror}') from error
        if (status.st_dev, status.st_ino) in seen:
            left_out['links to folders that were already read'] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith('.'):
                left_out['hidden folders' if _is_folder(entry) else 'hidden files'] += 1
            elif not _is_folder(entry):
                kind = _kind_of_file(entry)
                if kind == 'image':
                    paths.append(entry.path)
                elif kind == '.npy files':
                    arrays.append(entry.path)
                else:
                    left_out[kind] += 1
            elif not entry.is_symlink():
                folders.append(entry.path)
            elif split and _leads_to_other_classes(entry.path, folder, split):
                left_out['links to folders of other classes'] += 1
            else:
                links.append(entry.path)
    if all(path.lower().endswith(('.tif', '.tiff')) for path in paths):
        paths += arrays
    elif arrays:
        left_out['.npy files beside photographs'] = len(arrays)
    return FoundImages(sorted(paths, key=lambda path: normalize(path).split(os.sep)), left_out)


def describe_left_out(left_out: Counter[str]) -> str:
    """The counts as text: 'left out: .txt files (1), hidden files (2)'."""
    return 'left out: ' + ', '.join(f'{kind} ({count})' for kind, count in sorted(left_out.items()))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or a path through a file
        return False


def _kind_of_file(entry: os.DirEntry) -> str:
    """'image', or the key under which `FoundImages.left_out` counts the file."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if os.path.exists(entry.path) and not os.path.isfile(entry.path):
        return 'pipes, sockets and devices'  # reading them might block forever
    if suffix in IMAGE_SUFFIXES:
        return 'image'
    try:
        with Image.open(entry.path, formats=FORMATS) as image:  # reads only the header
            if image.format != 'TIFF' or not suffix:
                return 'image'
    except Image.DecompressionBombError:  # too large: decoding it reports the error
        return 'image'
    except DECODING_ERRORS:
        pass
    return f'{suffix} files' if suffix else 'files without a suffix'


def _leads_to_other_classes(link: str, folder: Path, split: Path) -> bool:
    target, own, whole = (Path(os.path.realpath(path)) for path in (link, folder, split))
    return whole.is_relative_to(target) or (target.is_relative_to(whole) and not target.is_relative_to(own))
