"""Images with masks, preprocessed as in mmsegmentation: random crops for training, whole images for evaluation."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from convnext_jax.data.dataset import Dataset, Example
from convnext_jax.data.decode import decode_rgb, upright_size
from convnext_jax.data.mask_classes import IGNORED, mask_size
from convnext_jax.data.masks import MaskedImage, MaskSource
from convnext_jax.data.opencv_resize import resize_bilinear, resize_nearest
from convnext_jax.errors import UserError

RETRIES = 10  # number of times that a crop is drawn again if one class is too large
READERS = 16  # threads that read the headers of all images


class MaskedImages(Dataset):
    """Base class of the data sets: the examples of a source as decoded images with labels.

    Args:
        source: the encoded images and masks.
    """

    def __init__(self, source: MaskSource):
        self.source, self.classes = source, source.classes
        self.facts = {'class names': list(self.classes.names)}
        self.about = f'{len(self.classes.names)} classes'

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def check(self, index: int) -> None:
        self.decode(index)

    def decode(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The upright image, (H, W, 3) uint8, and the class of each of its pixels, (H, W) uint8, or `IGNORED`.

        Raises:
            UserError: the image or the mask cannot be decoded, or they differ in size.
        """
        example = self.source[index]
        image = decode_rgb(example.image, example.image_name)
        labels = self.classes.labels(example.mask, example.mask_name)
        _check_sizes(example, image.shape[:2], labels.shape)
        return image, labels


class TrainMasks(MaskedImages):
    """Training examples: the images at a random scale, random crops of them, and random flips.

    An image is enlarged or reduced to fit into `resize` times a factor that is uniform in `scale`. A crop is drawn
    again, at most ten times, while it has fewer than two classes, or one class has at least `max_class_share` of the
    labelled pixels. An image smaller than the crop is padded at the right and at the bottom.

    An example has `image`, (crop, crop, 3) uint8, `label`, (crop, crop) uint8, and `size`, (2,) int32: the height and
    width of the part that is not padding.

    Args:
        source: the encoded images and masks.
        crop: side of the crops in pixels.
        resize: limits of the longer and the shorter side for the scale 1.
        scale: smallest and largest factor of `resize`.
        max_class_share: limit of the share of the most frequent class; 1 accepts every crop.
        flip: whether half of the crops are mirrored.

    Raises:
        UserError: `scale` or `resize` is not valid.
    """

    random = True

    def __init__(
        self,
        source: MaskSource,
        crop: int,
        *,
        resize: tuple[int, int] = (2048, 512),
        scale: tuple[float, float] = (0.5, 2.0),
        max_class_share: float = 0.75,
        flip: bool = True,
    ):
        super().__init__(source)
        if not (len(scale) == 2 and 0 < scale[0] <= scale[1]):
            raise UserError(f'data.scale must be two factors, 0 < min ≤ max, not {scale}')
        _check_limits(resize)
        self.crop, self.resize, self.scale = crop, resize, scale
        self.max_class_share, self.flip = max_class_share, flip
        self.features = {
            'image': jax.ShapeDtypeStruct((crop, crop, 3), np.uint8),
            'label': jax.ShapeDtypeStruct((crop, crop), np.uint8),
            'size': jax.ShapeDtypeStruct((2,), np.int32),
        }

    def load(self, index: int, draw: tuple[int, ...] = ()) -> Example:
        image, labels = self.decode(index)
        rng = np.random.default_rng(draw)
        factor = rng.uniform(*self.scale)
        size = fit_size(labels.shape, (int(self.resize[0] * factor), int(self.resize[1] * factor)))
        rows, columns, label = self._draw_crop(labels, size, rng)
        pixels = resize_bilinear(image, size, rows=rows, columns=columns)
        if self.flip and rng.random() < 0.5:
            pixels, label = pixels[:, ::-1], label[:, ::-1]
        canvas = (self.crop, self.crop)
        return {
            'image': pad(pixels, canvas),
            'label': pad(label, canvas, IGNORED),
            'size': np.array(label.shape, np.int32),
        }

    def _draw_crop(
        self, labels: np.ndarray, size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[slice, slice, np.ndarray]:
        """The rows and columns of a random crop of the resized image, and its labels."""
        for _ in range(1 + RETRIES):
            top, left = (int(rng.integers(max(side - self.crop, 0) + 1)) for side in size)
            rows, columns = slice(top, top + self.crop), slice(left, left + self.crop)
            label = resize_nearest(labels, size, rows=rows, columns=columns)
            if self.max_class_share >= 1 or _largest_share(label) < self.max_class_share:
                break
        return rows, columns, label


class EvalMasks(MaskedImages):
    """Evaluation examples: whole images, resized and padded to one size, and their masks, padded but not resized.

    An example has `image`, (H, W, 3) uint8, and `label`, (h, w) uint8, of the largest height and width in the split.
    Padding is at the right and at the bottom; it is 0 in images and `IGNORED` in labels. `image_size` and `label_size`,
    (2,) int32, are the height and width without padding. With several scales, an example has an image for each of them,
    under the names that `view_features` gives. The constructor reads the sizes from the headers of all files.

    Args:
        source: the encoded images and masks.
        resize: limits of the longer and the shorter side, to which OpenCV's bilinear filter fits the images.
        scales: factors by which `resize` is multiplied; an example has the image at each of them.
        squash: 0, or the side of a square. Then Pillow's bilinear filter resizes the images to this square, without
            keeping their aspect ratio, as in Hugging Face's `SegformerImageProcessor`.

    Attributes:
        smallest_side: the smallest height or width of all resized images.
        shapes: for each scale, (height, width) of the smallest shape that contains all images in landscape format, and
            of the smallest shape that contains all others. A shape without images is left out.

    Raises:
        UserError: `resize` or `scales` is not valid, an image or a mask cannot be read, or they differ in size.
    """

    def __init__(
        self,
        source: MaskSource,
        *,
        resize: tuple[int, int] = (2048, 512),
        scales: tuple[float, ...] = (1.0,),
        squash: int = 0,
    ):
        super().__init__(source)
        _check_limits(resize)
        if not scales or min(scales) <= 0:
            raise UserError(f'eval.scales must be one or more factors above 0, not {scales}')
        self.resize, self.scales, self.squash = resize, scales, squash
        with ThreadPoolExecutor(READERS) as pool:
            sizes = list(pool.map(self._size, range(len(source))))
        self.label_canvas = _largest_sides(sizes)
        resized = [[self._resized(size, scale) for size in sizes] for scale in scales]
        self.image_canvases = [_largest_sides(at_scale) for at_scale in resized]
        self.shapes = [[_largest_sides(group) for group in _by_format(at_scale) if group] for at_scale in resized]
        self.smallest_side = min(side for at_scale in resized for size in at_scale for side in size)
        self.features = {
            'label': jax.ShapeDtypeStruct(self.label_canvas, np.uint8),
            'label_size': jax.ShapeDtypeStruct((2,), np.int32),
        }
        for view, canvas in enumerate(self.image_canvases):
            image, image_size = view_features(view)
            self.features[image] = jax.ShapeDtypeStruct((*canvas, 3), np.uint8)
            self.features[image_size] = jax.ShapeDtypeStruct((2,), np.int32)

    def load(self, index: int, draw: tuple[int, ...] = ()) -> Example:
        del draw
        image, label = self.decode(index)
        example = {
            'label': pad(label, self.label_canvas, IGNORED),
            'label_size': np.array(label.shape, np.int32),
        }
        for view, (scale, canvas) in enumerate(zip(self.scales, self.image_canvases, strict=True)):
            size = self._resized(label.shape, scale)
            if self.squash:
                pixels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
            else:
                pixels = resize_bilinear(image, size)
            names = view_features(view)
            example |= {names.image: pad(pixels, canvas), names.size: np.array(size, np.int32)}
        return example

    def _size(self, index: int) -> tuple[int, int]:
        """Height and width of an image, from the headers of the image and of its mask."""
        example = self.source[index]
        size = upright_size(example.image, example.image_name)[::-1]
        _check_sizes(example, size, mask_size(example.mask, example.mask_name)[::-1])
        return size

    def _resized(self, size: tuple[int, ...], scale: float) -> tuple[int, int]:
        if self.squash:
            return self.squash, self.squash
        return fit_size(size, (int(self.resize[0] * scale), int(self.resize[1] * scale)))


class ViewFeatures(NamedTuple):
    """The names under which an evaluation example holds the image at one scale, and its size without padding."""

    image: str
    size: str


def view_features(view: int) -> ViewFeatures:
    """'image' and 'image_size' for the first scale, then 'image_1' and 'image_size_1', and so on."""
    suffix = f'_{view}' if view else ''
    return ViewFeatures(f'image{suffix}', f'image_size{suffix}')


def fit_size(size: tuple[int, ...], limits: tuple[int, int]) -> tuple[int, int]:
    """Height and width after a resize that fits an image into limits and keeps its aspect ratio, as in mmcv.

    Args:
        size: height and width in pixels.
        limits: limits of the longer and the shorter side, in any order.
    """
    factor = min(max(limits) / max(size), min(limits) / min(size))
    height, width = (max(int(side * factor + 0.5), 1) for side in size)
    return height, width


def pad(array: np.ndarray, size: tuple[int, int], value: int = 0) -> np.ndarray:
    """An array, (H, W, …), padded at the bottom and at the right to a height and width."""
    padded = np.full((*size, *array.shape[2:]), value, array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


def _largest_share(label: np.ndarray) -> float:
    """The share of the most frequent class in the labelled pixels; 1 if there are fewer than two classes."""
    counts = [count for count in Image.fromarray(label).histogram()[:IGNORED] if count]  # faster than NumPy
    return max(counts) / sum(counts) if len(counts) > 1 else 1.0


def _by_format(sizes: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The sizes of images in landscape format, and the others."""
    return [size for size in sizes if size[0] < size[1]], [size for size in sizes if size[0] >= size[1]]


def _largest_sides(sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The largest height and the largest width."""
    heights, widths = zip(*sizes, strict=True)
    return max(heights), max(widths)


def _check_limits(resize: tuple[int, int]) -> None:
    if not (len(resize) == 2 and min(resize) > 0):
        raise UserError(f'data.resize must be the limits of the longer and the shorter side in pixels, not {resize}')


def _check_sizes(example: MaskedImage, image: tuple[int, ...], mask: tuple[int, ...]) -> None:
    """Raises UserError if the image, rotated as its EXIF orientation says, and the mask differ in width or height."""
    if image != mask:
        raise UserError(
            f'{example.mask_name} has {mask[1]}×{mask[0]} pixels, but the upright image {example.image_name} has '
            f'{image[1]}×{image[0]}: the sizes must be equal'
        )
