"""The classes of segmentation masks: their names, and the pixel value of each class."""

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convnext_jax.data.decode import DECODING_ERRORS
from convnext_jax.errors import UserError, first_line

IGNORED = 255
"""Pixel value, and label, of pixels that have no class."""
CATEGORIES = 'categories.json'
FILES = ('objectInfo150.txt', 'classes.txt', CATEGORIES)
"""File names of a list of classes, in the order in which they are looked for."""
PNG = b'\x89PNG\r\n\x1a\n'
GREY, PALETTE = 0, 3  # colour types of a PNG


@dataclasses.dataclass(frozen=True)
class MaskClasses:
    """The classes of a data set of masks.

    Attributes:
        names: the name of each class.
        values: the pixel value of each class in the masks, from 0 to 254.
        reduce_zero_label: whether pixels of value 0 are ignored, in addition to 255.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    reduce_zero_label: bool

    def labels(self, mask: bytes, name: str) -> np.ndarray:
        """The class of each pixel: (H, W) uint8, with `IGNORED` for pixels that have none.

        Args:
            mask: the bytes of a PNG file.
            name: the file, for error messages.

        Raises:
            UserError: the file is not a complete 8-bit greyscale or palette PNG, or has a value that is not a class.
        """
        mask_size(mask, name)
        try:
            with Image.open(io.BytesIO(mask), formats=('PNG',)) as file:
                counts = file.histogram()
                labels = np.asarray(file.point(self._table()))
        except (*DECODING_ERRORS, Image.DecompressionBombError) as error:
            raise UserError(f'{name} cannot be decoded as an image: {first_line(error)}') from error
        allowed = {*self.values, *self._ignored()}
        unknown = [value for value, count in enumerate(counts) if count and value not in allowed]
        if unknown:
            remedies = ['add its name to the list of classes'] if unknown[0] > self.values[-1] else []
            if not self.reduce_zero_label and unknown[0] in (0, self.values[-1] + 1):
                remedies.append('if 0 means no class, set --config.data.reduce_zero_label=True')
            raise UserError(
                f'{name} has pixels of value {unknown[0]}, which is none of the {len(self.names)} classes '
                f'({self.values[0]} to {self.values[-1]}) and not the ignored value {IGNORED}: '
                f'{", or ".join(remedies) or "correct the mask"}'
            )
        return labels

    def to_json(self) -> str:
        """The content of a `CATEGORIES` file from which `find_classes` reads these classes."""
        categories = [{'id': value, 'name': name} for value, name in zip(self.values, self.names, strict=True)]
        return json.dumps({'reduce_zero_label': self.reduce_zero_label, 'categories': categories}, indent=1)

    def _ignored(self) -> tuple[int, ...]:
        return (0, IGNORED) if self.reduce_zero_label else (IGNORED,)

    def _table(self) -> list[int]:
        """Pixel value → label."""
        labels = {value: label for label, value in enumerate(self.values)}
        return [labels.get(value, IGNORED) for value in range(256)]


def mask_size(mask: bytes, name: str) -> tuple[int, int]:
    """Width and height of a mask, from the header of the PNG file.

    Raises:
        UserError: the file is not an 8-bit greyscale PNG or a palette PNG.
    """
    wanted = 'masks must be 8-bit greyscale or palette PNG files, whose values are the classes'
    if not mask.startswith(PNG) or len(mask) < 26:
        raise UserError(f'{name} is not a PNG file: {wanted}')
    bits, color = mask[24], mask[25]
    if color == GREY and bits != 8:
        raise UserError(f'{name} is a greyscale PNG file of {bits} bits: {wanted}')
    if color not in (GREY, PALETTE):
        raise UserError(f'{name} is a colour or transparent PNG file: {wanted}')
    return int.from_bytes(mask[16:20]), int.from_bytes(mask[20:24])


def find_classes(folders: Sequence[Path], path: Path | None, *, reduce_zero_label: bool) -> MaskClasses:
    """Reads the list of classes.

    Args:
        folders: where to look for one of `FILES`.
        path: the file of the list; None to look for it.
        reduce_zero_label: whether 0 means no class. The classes of a list without ids then have the values 1, 2, …,
            otherwise 0, 1, ….

    Raises:
        UserError: there is no list, it cannot be read, an id is invalid, or an id or a name is repeated.
    """
    if path is None:
        found = (folder / name for folder in folders for name in FILES if (folder / name).is_file())
        path = next(found, None)
    if path is None:
        raise UserError(
            f'{" and ".join(map(str, dict.fromkeys(folders)))} contain no list of classes ({", ".join(FILES)}): write '
            'classes.txt with one name on each line, or set --config.data.classes=FILE'
        )
    try:
        text = path.read_text(encoding='utf-8-sig')
        content = json.loads(text) if path.suffix == '.json' else None
        categories = _categories(content) if path.suffix == '.json' else None
    except (OSError, ValueError) as error:
        raise UserError(f'{path} cannot be read as a list of classes: {first_line(error)}') from error
    stored = content.get('reduce_zero_label') if isinstance(content, dict) else None
    if stored not in (None, reduce_zero_label):
        raise UserError(f'{path} is for masks with reduce_zero_label={stored}: set data.reduce_zero_label={stored}')
    start = int(reduce_zero_label)
    if categories is None:
        categories = {start + number: name for number, name in enumerate(_names(text, path))}
    repeated = [name for name, count in Counter(categories.values()).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: several classes are called '{repeated[0]}': give each class its own name")
    values = sorted(categories)
    if values[0] < start or values[-1] >= IGNORED:
        raise UserError(
            f'{path}: the {len(values)} classes must have ids from {start} to {IGNORED - 1}'
            + (', because data.reduce_zero_label is set' if reduce_zero_label else '')
        )
    return MaskClasses(tuple(categories[value] for value in values), tuple(values), reduce_zero_label)


def _categories(content: Any) -> dict[int, str]:
    """Id → name, from a list of {id, name} as in COCO's JSON files, or an object whose `categories` is this list."""
    try:
        rows = content['categories'] if isinstance(content, dict) else content
        ids, names = [row['id'] for row in rows], [str(row['name']) for row in rows]
    except (KeyError, TypeError) as error:
        raise ValueError('it must be a list of {"id": 1, "name": "person"}') from error
    for value in ids:
        if not str(value).removesuffix('.0').isdecimal():
            raise ValueError(f'the id of a class must be a whole number, not {value!r}')
    categories = {int(float(value)): name for value, name in zip(ids, names, strict=True)}
    if not categories:
        raise ValueError('it has no classes')
    if len(categories) < len(rows):
        raise ValueError('two classes have the same id')
    return categories


def _names(text: str, path: Path) -> list[str]:
    """The class names: the lines of a text, or the first synonym in each row of ADE20K's `objectInfo150.txt`."""
    lines = text.rstrip('\n').split('\n')
    if lines[0].split() == ['Idx', 'Ratio', 'Train', 'Val', 'Name']:
        lines = [line.split('\t')[-1].split(',')[0] for line in lines[1:]]
    names = [line.strip() for line in lines]
    if not all(names):
        raise UserError(f'{path}: line {names.index("") + 1} is empty, but each line must be a class name')
    return names
