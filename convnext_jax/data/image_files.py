"""Which files below a folder are images: one rule for training, evaluation, prepare and predict."""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from convnext_jax.data.decode import FORMATS

IMAGE_SUFFIXES = {
    *('.jpg', '.jpeg', '.jpe', '.jfif', '.mpo', '.png', '.apng', '.webp', '.avif', '.avifs'),
    *('.tif', '.tiff', '.bmp', '.dib', '.gif', '.ppm', '.pgm', '.pbm', '.pnm', '.pfm'),
    *('.jp2', '.j2k', '.jpc', '.jpf', '.jpx', '.j2c'),
}
"""The suffixes of the formats that `decode` reads."""


class FoundImages(NamedTuple):
    """What `find_images` found.

    Attributes:
        paths: the images, in the order of their names.
        left_out: kind → how many of it were left out.
    """

    paths: list[str]
    left_out: Counter[str]


def find_images(folder: Path) -> FoundImages:
    """Finds all images below a folder.

    An image is a file with a suffix of `IMAGE_SUFFIXES`, or with another suffix or none and the content of an image.
    (TIFF is the container of camera raw formats too, so there a foreign suffix is believed.) Hidden files, and all
    that is below a hidden folder, are left out. A link to a folder is followed, but no folder is read twice. A link
    that leads nowhere but has an image's suffix counts as an image, so that reading it tells that it is lost.
    """
    paths: list[str] = []
    left_out: Counter[str] = Counter()
    seen = set()
    folders = [str(folder)]
    links = []  # followed after all that is reached without links
    while folders or links:
        directory = folders.pop() if folders else links.pop()
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in seen:
            left_out['linked folders that were read already'] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                if entry.name.startswith('.'):
                    left_out['hidden folders' if entry.is_dir() else 'hidden files'] += 1
                elif entry.is_dir():
                    (links if entry.is_symlink() else folders).append(entry.path)
                elif _is_image(entry.path):
                    paths.append(entry.path)
                else:
                    suffix = os.path.splitext(entry.name)[1].lower()
                    left_out[f'{suffix} files' if suffix else 'files without a suffix'] += 1
    return FoundImages(sorted(paths, key=lambda path: path.split(os.sep)), left_out)


def describe_left_out(left_out: Counter[str]) -> str:
    """The counts in words: 'left out: .txt files (1), hidden files (2)'."""
    return 'left out: ' + ', '.join(f'{kind} ({count})' for kind, count in sorted(left_out.items()))


def _is_image(path: str) -> bool:
    suffix = os.path.splitext(path)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return True
    try:
        with Image.open(path, formats=FORMATS) as image:  # reads the header alone
            return image.format != 'TIFF' or not suffix
    except Image.DecompressionBombError:  # too large, which decoding it will say
        return True
    except (OSError, SyntaxError, ValueError):
        return False
