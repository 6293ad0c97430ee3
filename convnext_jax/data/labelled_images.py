"""Images with labels as data sets: the random crop of training, and the resize of evaluation."""

import contextlib
import io
from typing import cast

import jax
import numpy as np
from PIL import Image

from convnext_jax.data.dataset import Dataset, Example, Features
from convnext_jax.data.decode import JPEG, decode, eval_resize, eval_sides, resize, train_crop
from convnext_jax.data.sources import Source
from convnext_jax.errors import UserError

MAX_LABELS = 32  # of one image; ReaL's have a dozen


def image_features(size: int, channels: int) -> Features:
    """`image` (size, size, channels) uint8 and `label` () int32."""
    return {
        'image': jax.ShapeDtypeStruct((size, size, channels), np.uint8),
        'label': jax.ShapeDtypeStruct((), np.int32),
    }


class LabelledImages(Dataset):
    """The examples of a source as decoded images with labels.

    Args:
        source: of the encoded images.
        size: side of the images in pixels.
        channels: 1 (grey) or 3 (RGB).
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
        decode(example.image, self.channels, example.name)


class TrainImages(LabelledImages):
    """Random crops, or the whole images squashed to the square.

    Args:
        source, size, channels: as `LabelledImages`.
        crop_scale: least and largest share of the image's area in a crop; () for the whole image.
        exact: decode and resize exactly as Pillow does, as in `train_crop`.

    Raises:
        UserError: `crop_scale` is not a range of shares.
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
            raise UserError(f'data.crop_scale must be two shares of the area, 0 < least ≤ most ≤ 1, not {crop_scale}')
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
            pixels = resize(decode(example.image, self.channels, example.name), self.size)
        return {'image': pixels, 'label': np.int32(cast(int, example.label))}  # open refuses tuples


class EvalImages(LabelledImages):
    """Images as `eval_resize` gives them.

    Where images have several labels or none, `label` is (MAX_LABELS,) int32, filled up with −1, and `weight` is 0 for
    an image without a label.

    Args:
        source, size, channels: as `LabelledImages`.
        crop_pct, squash, resample: as `eval_resize`.
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
        if source.many_labels:
            self.features['label'] = jax.ShapeDtypeStruct((MAX_LABELS,), np.int32)
            self.features['weight'] = jax.ShapeDtypeStruct((), np.float32)

    def load(self, index: int, draw: tuple[int, ...] = ()) -> Example:
        del draw
        example = self.source[index]
        image = decode(example.image, self.channels, example.name)
        pixels = eval_resize(
            image, self.size, self.crop_pct, squash=self.squash, resample=self.resample, name=example.name
        )
        label = example.label
        if not isinstance(label, tuple):
            return {'image': pixels, 'label': np.int32(label)}
        filled = np.array((*label, *(-1,) * (MAX_LABELS - len(label))), np.int32)
        return {'image': pixels, 'label': filled, 'weight': np.float32(bool(label))}

    def check(self, index: int) -> None:
        """Decodes the image at an eighth of its size where that finds out whether all of it is there."""
        example = self.source[index]
        sides = _check(example.image, self.channels, example.name)
        eval_sides(sides, self.size, self.crop_pct, squash=self.squash, name=example.name)


def _check(image: bytes, channels: int, name: str) -> tuple[int, int]:
    """Width and height of an image, decoded as cheaply as finds out whether all of it is there.

    Raises:
        UserError: as `decode`.
    """
    if image.startswith(JPEG):
        with contextlib.suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # `decode` says why
            opened = Image.open(io.BytesIO(image))
            sides = opened.size
            opened.draft('L' if channels == 1 else 'RGB', (1, 1))  # an eighth of each side, and all of the bytes
            opened.load()
            return sides
    return decode(image, channels, name).size
