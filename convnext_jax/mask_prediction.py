"""The class of each pixel of image files."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from convnext_jax.data.opencv_resize import resize_bilinear
from convnext_jax.data.segmentation import fit_size, pad
from convnext_jax.errors import UserError
from convnext_jax.interop import PretrainedUPerNet
from convnext_jax.interop.pretrained_upernet import WindowProtocol
from convnext_jax.interop.processor import open_image, processor_for, segmentation_processor
from convnext_jax.models import UPerNet
from convnext_jax.tasks.pixel_classes import NOT_FINITE, PixelClasses, View

MODES = ('slide', 'whole', 'squash')
MAX_CLASSES = NOT_FINITE
"""Maximum number of classes: a mask has 8 bits, and one value is for pixels without a class."""


@dataclasses.dataclass(frozen=True)
class PredictedMask:
    """The prediction for one file.

    Attributes:
        path: the file.
        photo: the upright image; None if the file could not be read.
        classes: (H, W) uint8, the class of each pixel of the upright image; None if the file could not be read.
        areas: (label, class name, share of the pixels) of the classes that occur, in descending order of the share;
            empty if the file could not be read or a score is not finite.
        error: the reason why the file could not be read, or ''.
    """

    path: Path
    photo: Image.Image | None = None
    classes: np.ndarray | None = None
    areas: tuple[tuple[int, str, float], ...] = ()
    error: str = ''


def predict_masks(
    pretrained: PretrainedUPerNet, photos: Iterable[Path], *, mode: str | None = None, resolution: int | None = None
) -> Iterator[PredictedMask]:
    """An iterator over the masks of files, in the order of the files, at the original size of each image.

    The prediction for an unreadable file contains the error.

    Args:
        pretrained: the network, its preprocessing and class names. Without names, classes are called 'class 7', etc.
        photos: the files, which are read one by one.
        mode: 'slide' resizes images as mmsegmentation does, with their aspect ratio, and averages the logits of
            overlapping windows, as for the published results. 'whole' resizes images as 'slide' does, and the network
            gets the whole image. 'squash' resizes images to a square, as transformers does. The default of a run is the
            mode of its evaluation. The default of other weights is 'squash' if they are stored with a preprocessing,
            otherwise 'slide'.
        resolution: side of the windows or of the square in pixels. If it is given with 'slide' or 'whole', images are
            resized to fit into (4 · resolution, resolution). The default is the size in the run or in the stored
            preprocessing, otherwise 512.

    Raises:
        UserError: the network has more than 255 classes, `resolution` is below its total stride, or the preprocessing
            does not match the model.
    """
    model = pretrained.model
    if model.num_classes > MAX_CLASSES:
        raise UserError(
            f'masks are written as indexed PNG files of at most {MAX_CLASSES} classes, but the network has '
            f'{model.num_classes}'
        )
    smallest = model.backbone.output_stride
    if resolution is not None and resolution < smallest:
        raise UserError(
            f'--resolution={resolution} is below the total stride of the network: give at least {smallest} pixels'
        )
    names = pretrained.class_names or [f'class {label}' for label in range(model.num_classes)]
    protocol = choose_windows(pretrained, mode, resolution)
    if protocol is None:
        processor = segmentation_processor(model.in_channels, pretrained.processor)
        processor = dataclasses.replace(processor, size=resolution or processor.size)
        crop = stride = processor.size
    else:
        processor = processor_for(model.in_channels, pretrained.processor)
        crop, stride = (0, 0) if protocol.whole else (protocol.crop, protocol.stride)
    mean, std = processor.mean_and_std_of_255()

    @functools.partial(jax.jit, static_argnames=('may_be_small', 'shape'))
    def predict(
        model: UPerNet, view: View, original: jax.Array, *, may_be_small: bool, shape: tuple[int, int]
    ) -> jax.Array:
        return PixelClasses(mean, std, crop, stride, may_be_small=may_be_small)(model, [view], original, shape)

    for path in photos:
        try:
            photo = open_image(path, model.in_channels)
        except UserError as error:
            yield PredictedMask(path, error=str(error))
            continue
        pixels = processor.resize(photo) if protocol is None else _resized(photo, protocol.resize)
        size, original = np.array(pixels.shape[:2]), np.array((photo.height, photo.width))
        view = View(jnp.asarray(pad(pixels, _rounded_up(size))), jnp.asarray(size))
        small = bool(size.min() < crop)
        classes = predict(model, view, jnp.asarray(original), may_be_small=small, shape=_rounded_up(original))
        classes = np.asarray(classes)[: photo.height, : photo.width]
        finite = (classes != NOT_FINITE).all()
        yield PredictedMask(path, photo, classes, _areas(classes, names) if finite else ())


class MaskFiles(NamedTuple):
    """The files that are written for a photograph.

    Attributes:
        mask: FOLDER/NAME.png.
        overlay: FOLDER/NAME.overlay.jpg.
    """

    mask: Path
    overlay: Path


def mask_files(photos: Sequence[Path], folder: Path) -> list[MaskFiles]:
    """The files that are written for each photograph.

    Raises:
        UserError: two photographs have the same name, or a photograph would be replaced.
    """
    files: dict[MaskFiles, Path] = {}
    originals = {photo.resolve() for photo in photos}
    for photo in photos:
        written = MaskFiles(folder / f'{photo.stem}.png', folder / f'{photo.stem}.overlay.jpg')
        if written in files:
            raise UserError(
                f'{files[written]} and {photo} would have the same mask, {written.mask}: predict them separately, with '
                'another --output'
            )
        if replaced := [path for path in written if path.resolve() in originals]:
            raise UserError(f'the mask of {photo} would replace the photograph {replaced[0]}: choose another --output')
        files[written] = photo
    return list(files)


def choose_windows(pretrained: PretrainedUPerNet, mode: str | None, resolution: int | None) -> WindowProtocol | None:
    """How images are resized and windows slide over them, None if they are squashed; arguments of `predict_masks`."""
    if mode == 'squash' or (mode is None and pretrained.windows is None and pretrained.processor is not None):
        return None
    protocol = pretrained.windows or WindowProtocol()
    if resolution is not None:
        resize, stride = (4 * resolution, resolution), max(resolution * 2 // 3, 1)
        protocol = WindowProtocol(resize, resolution, stride, protocol.whole)
    return protocol if mode is None else protocol._replace(whole=mode == 'whole')


def _resized(photo: Image.Image, limits: tuple[int, int]) -> np.ndarray:
    pixels = np.asarray(photo).reshape(photo.height, photo.width, -1)
    return resize_bilinear(pixels, fit_size(pixels.shape[:2], limits))


def _rounded_up(size: np.ndarray) -> tuple[int, int]:
    """Height and width rounded up to powers of two, so that few programs are compiled for images of many sizes."""
    height, width = (1 << int(side - 1).bit_length() for side in size)
    return height, width


def _areas(classes: np.ndarray, names: Sequence[str]) -> tuple[tuple[int, str, float], ...]:
    counts = np.bincount(classes.ravel())
    order = np.argsort(-counts, kind='stable')[: np.count_nonzero(counts)]
    return tuple((int(label), names[label], float(counts[label] / classes.size)) for label in order)
