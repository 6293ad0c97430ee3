"""The class of each pixel of image files, and pictures of these masks."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw

from convnext_jax.data.decode import decode
from convnext_jax.data.opencv_resize import resize_bilinear
from convnext_jax.data.segmentation import fit_size, pad
from convnext_jax.errors import UserError
from convnext_jax.interop import ImageProcessor, PretrainedUPerNet
from convnext_jax.tasks.palette import class_colours
from convnext_jax.tasks.sliding_windows import NOT_FINITE, SlidingWindows

CROP = 512
"""Side of the windows for weights without stored preprocessing."""
CANVAS = 256
"""Images are padded to multiples of this size, so that few sizes have to be compiled."""


@dataclasses.dataclass(frozen=True)
class PredictedMask:
    """The prediction for one file.

    Attributes:
        path: the file.
        image: (H, W, 3) uint8, the upright image; None if it could not be read.
        classes: (H, W) uint8, the class of each pixel; None if the image could not be read.
        best: (label, class name, share of the pixels) of the largest classes in descending order; empty if the file
            could not be read or a score is not finite.
        error: the reason why the file could not be read, or ''.
    """

    path: Path
    image: np.ndarray | None = None
    classes: np.ndarray | None = None
    best: tuple[tuple[int, str, float], ...] = ()
    error: str = ''


def predict_masks(
    pretrained: PretrainedUPerNet, photos: Iterable[Path], *, top: int = 5, flip: bool = False
) -> Iterator[PredictedMask]:
    """An iterator over the masks of files, in the order of the files, predicted in sliding windows.

    An image is resized so that its shorter side is that of a window, and its longer side is at most four times as long.

    Args:
        pretrained: model, class names, and preprocessing, which gives the side of the windows, mean and std. The
            defaults are ImageNet's mean and std, 512 pixels, and class names such as 'class 7'.
        photos: the files.
        top: number of classes in `best`.
        flip: whether to average over the image and its mirror image.

    Raises:
        UserError: the preprocessing does not match the model.
    """
    model, processor = pretrained.model, pretrained.processor or ImageProcessor(size=CROP)
    if model.in_channels != 3:
        raise UserError(f'masks are predicted for RGB images, but the model has {model.in_channels} input channels')
    mean, std = processor.mean_and_std_of_255()
    crop = processor.size
    windows = SlidingWindows(mean, std, crop, max(crop * 2 // 3, 1), flip)
    names = pretrained.class_names or [f'class {label}' for label in range(model.num_classes)]
    classes_of = jax.jit(windows.classes, static_argnames='shape')
    for path in photos:
        try:
            image = np.asarray(decode(path.read_bytes(), 3, str(path)))
        except (OSError, UserError) as error:
            yield PredictedMask(path, error=str(error))
            continue
        size, new_size = image.shape[:2], fit_size(image.shape[:2], (4 * crop, crop))
        resized = pad(resize_bilinear(image, new_size), _rounded_up(new_size))
        classes = classes_of(model, resized, np.asarray(new_size), np.asarray(size), shape=_rounded_up(size))
        classes = np.asarray(classes)[: size[0], : size[1]]
        counts = np.bincount(classes.ravel(), minlength=NOT_FINITE + 1)
        largest = () if counts[NOT_FINITE] else np.argsort(-counts, kind='stable')[:top]
        best = tuple(
            (int(label), names[label], float(counts[label] / classes.size)) for label in largest if counts[label]
        )
        yield PredictedMask(path, image, classes, best)


def _rounded_up(size: tuple[int, ...]) -> tuple[int, int]:
    height, width = (-(-side // CANVAS) * CANVAS for side in size)
    return height, width


def save_mask(prediction: PredictedMask, path: Path) -> Path:
    """Writes the mask as a PNG file with a palette, whose values are the classes, and a picture beside it.

    The picture, NAME_overlay.png, shows the image mixed with the colours of the classes, and lists the largest classes.

    Args:
        prediction: the mask of an image that could be read.
        path: the PNG file of the mask. Its folder is created.

    Returns:
        The path of the picture.

    Raises:
        UserError: a file cannot be written.
    """
    assert prediction.classes is not None
    assert prediction.image is not None
    colours = class_colours()
    mask = Image.fromarray(prediction.classes)
    mask.putpalette(colours.tobytes())
    mixed = Image.fromarray((prediction.image // 2 + colours[prediction.classes] // 2).astype(np.uint8))
    _draw_legend(mixed, prediction, colours)
    overlay = path.with_name(f'{path.stem}_overlay.png')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mask.save(path)
        mixed.save(overlay)
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror}') from error
    return overlay


def _draw_legend(picture: Image.Image, prediction: PredictedMask, colours: np.ndarray) -> None:
    """Lists the largest classes in the upper left corner, each beside a square of its colour."""
    draw = ImageDraw.Draw(picture)
    line = max(min(picture.size) // 24, 10)
    for number, (label, name, share) in enumerate(prediction.best):
        top = line // 2 + number * (line + line // 4)
        text = f'{100 * share:.1f} % {name}'
        place = (2 * line, top)
        draw.rectangle(draw.textbbox(place, text, font_size=line), fill='black')
        draw.text(place, text, fill='white', font_size=line)
        draw.rectangle(
            (line // 2, top, line // 2 + line, top + line), fill=tuple(colours[label].tolist()), outline='white'
        )
