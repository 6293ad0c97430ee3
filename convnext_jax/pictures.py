"""Pictures of masks, and the files in which pictures are written."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from convnext_jax.errors import UserError, first_line
from convnext_jax.tasks.palette import class_colours


def indexed_mask(classes: np.ndarray) -> Image.Image:
    """A mask as an image of mode 'P': its pixel values are the classes, its palette is `class_colours`.

    Args:
        classes: (H, W) uint8.
    """
    mask = Image.fromarray(classes)
    mask.putpalette(class_colours().tobytes())  # with fewer than 256 colours, Pillow may write fewer than 8 bits
    return mask


def overlay(photo: Image.Image, classes: np.ndarray, areas: Sequence[tuple[int, str, float]]) -> Image.Image:
    """A photograph with the colours of its classes, and a legend to the right of it.

    Args:
        photo: an image of any mode.
        classes: (H, W) uint8, the class of each pixel.
        areas: label, class name and share of the pixels for each row of the legend.
    """
    colours = class_colours()
    blended = Image.blend(photo.convert('RGB'), Image.fromarray(colours[classes]), 0.5)
    text = max(12, photo.height // 32)  # height of the text in pixels
    row, font = text * 3 // 2, ImageFont.load_default(text)
    width = 3 * row + max(int(font.getlength(name)) for _, name, _ in areas)
    canvas = Image.new('RGB', (photo.width + width, max(photo.height, row * (len(areas) + 1))), 'white')
    canvas.paste(blended)
    draw = ImageDraw.Draw(canvas)
    for number, (label, name, _) in enumerate(areas):
        left, top = photo.width + row // 2, row // 2 + number * row
        draw.rectangle((left, top, left + text, top + text), fill=tuple(map(int, colours[label])))
        draw.text((left + row, top + text // 2), name, fill='black', font=font, anchor='lm')
    return canvas


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG or JPEG file, and creates its folder.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=90)  # PNG ignores the quality
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror or first_line(error)}') from error
