"""Data sets of labelled images: random crops for training, resized images for evaluation."""

import contextlib
import io
from typing import cast

import jax
import numpy as np
from PIL import Image

from convnext_jax.data.arrays import PILLOW_CHANNELS, pixel_dtype
from convnext_jax.data.dataset import Dataset, Example, Features
from convnext_jax.data.decode import JPEG, decode_channels, eval_resize, eval_sides, resize, train_crop
from convnext_jax.data.sources import Source
from convnext_jax.errors import UserError

MAX_LABELS = 32  # labels of one image; ImageNet-ReaL has up to a dozen


def image_features(size: int, channels: int) -> Features:
    """`image` (size, size, channels) with the dtype of `pixel_dtype`, and `label` () int32."""
    return {
        'image': jax.ShapeDtypeStruct((size, size, channels), pixel_dtype(channels)),
        'label': jax.ShapeDtypeStruct((), np.int32),
    }


class LabelledImages(Dataset):
    """Base class of the data sets: the examples of a source as decoded images with labels.

    Args:
        source: the encoded images and their labels.
        size: side of the decoded images in pixels.
        channels: 1 (greyscale), 3 (RGB), or any other number for .npy and TIFF files.
    """

    def __init__(self, source: Source, size: int, channels: int):
        self.source, self.size, self.channels = source, size, channels
        self.features = image_features(size, channels)
        self.facts = {'class names': list(source.class_names)}
        self.about = f'{len(source.class_names)} classes'

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def check(self, index: int) -> None:
        example = self.source[index]
        decode_channels(example.image, self.channels, example.name)


class TrainImages(LabelledImages):
    """Training examples: random crops, or whole images resized to a square.

    Args:
        source, size, channels: as for `LabelledImages`.
        crop_scale: smallest and largest area of a crop as a fraction of the image's area; () for the whole image.
        exact: decode and resize exactly as Pillow does, see `train_crop`.

    Raises:
        UserError: `crop_scale` is not a valid range.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        channels: int,
        *,
        crop_scale: tuple[float, float] | tuple[()] = (),
        exact: bool = False,
    ):
        super().__init__(source, size, channels)
        if crop_scale and not (len(crop_scale) == 2 and 0 < crop_scale[0] <= crop_scale[1] <= 1):
            raise UserError(f'data.crop_scale must be two fractions of the area, 0 < min ≤ max ≤ 1, not {crop_scale}')
        self.crop_scale, self.exact = crop_scale, exact
        self.random = bool(crop_scale)

    def load(self, index: int, draw: tuple[int, ...] = ()) -> Example:
        example = self.source[index]
        if self.crop_scale:
            pixels = train_crop(
                example.image,
                self.size,
                channels=self.channels,
                scale=self.crop_scale,
                seed=draw,
                exact=self.exact,
                name=example.name,
            )
        else:
            pixels = resize(decode_channels(example.image, self.channels, example.name), self.size)
        return {
            'image': pixels,
            'label': np.int32(cast(int, example.label)),
        }  # the task rejects sources with several labels


class EvalImages(LabelledImages):
    """Evaluation examples: images resized and cropped by `eval_resize`.

    If the images of the source have several labels or none, `label` is (MAX_LABELS,) int32, padded with −1, and
    `weight`, () float32, is 0 for images without a label.

    Args:
        source, size, channels: as for `LabelledImages`.
        crop_pct, squash, resample: as for `eval_resize`.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        channels: int,
        *,
        crop_pct: float,
        squash: bool | None = None,
        resample: int = Image.Resampling.BICUBIC,
    ):
        super().__init__(source, size, channels)
        self.crop_pct, self.squash, self.resample = crop_pct, squash, resample
        if source.multi_label:
            self.features['label'] = jax.ShapeDtypeStruct((MAX_LABELS,), np.int32)
            self.features['weight'] = jax.ShapeDtypeStruct((), np.float32)

    def load(self, index: int, draw: tuple[int, ...] = ()) -> Example:
        del draw
        example = self.source[index]
        image = decode_channels(example.image, self.channels, example.name)
        pixels = eval_resize(
            image, self.size, self.crop_pct, squash=self.squash, resample=self.resample, name=example.name
        )
        label = example.label
        if not isinstance(label, tuple):
            return {'image': pixels, 'label': np.int32(label)}
        padded = np.array((*label, *(-1,) * (MAX_LABELS - len(label))), np.int32)
        return {'image': pixels, 'label': padded, 'weight': np.float32(bool(label))}

    def check(self, index: int) -> None:
        """Raises UserError if the image cannot be decoded; JPEGs are decoded at 1/8 of their size, to save time."""
        example = self.source[index]
        sides = _check(example.image, self.channels, example.name)
        eval_sides(sides, self.size, self.crop_pct, squash=self.squash, name=example.name)


class JoinedImages(Dataset):
    """The images of several splits as one data set, one split after the other.

    Args:
        splits: data sets with equal features.
    """

    def __init__(self, *splits: LabelledImages):
        self.splits = splits
        self.features = splits[0].features

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    def load(self, index: int, draw: tuple[int, ...] = ()) -> Example:
        split, index = self._find(index)
        return split.load(index, draw)

    def name(self, index: int) -> str:
        split, index = self._find(index)
        return split.name(index)

    def check(self, index: int) -> None:
        split, index = self._find(index)
        split.check(index)

    def _find(self, index: int) -> tuple[LabelledImages, int]:
        """The split that contains an example, and the index of the example in it."""
        for split in self.splits:
            if index < len(split):
                return split, index
            index -= len(split)
        raise IndexError(f'there are only {len(self)} examples')


def _check(image: bytes, channels: int, name: str) -> tuple[int, int]:
    """Checks that an image is complete, by decoding it as cheaply as possible; returns its width and height.

    Raises:
        UserError: as for `decode_channels`.
    """
    if image.startswith(JPEG) and channels in PILLOW_CHANNELS:
        with contextlib.suppress(
            OSError, SyntaxError, ValueError, Image.DecompressionBombError
        ):  # `decode` reports the error
            opened = Image.open(io.BytesIO(image))
            sides = opened.size
            opened.draft('L' if channels == 1 else 'RGB', (1, 1))  # decodes all bytes, at 1/8 of each side
            opened.load()
            return sides
    return decode_channels(image, channels, name).size
