"""Encoded bytes → uint8 pixels: the training crop and the evaluation resize."""

import contextlib
import io
import math
from collections.abc import Sequence

import numpy as np
import simplejpeg
from PIL import Image

from convnext_jax.errors import UserError

try:
    import cykooz_resizer as fast  # four times as fast as Pillow's filter
except ImportError:  # there is none for ARM processors under Linux
    fast = None

JPEG = b'\xff\xd8\xff'
MOST_PIXELS = 10**8  # of a resized image, as Pillow's own bound on what it opens


def decode(image: bytes, channels: int, name: str) -> Image.Image:
    """A Pillow image with 1 (grey) or 3 (RGB) channels.

    Raises:
        UserError: the bytes are no whole image; `name` says which.
    """
    try:
        return Image.open(io.BytesIO(image)).convert('L' if channels == 1 else 'RGB')
    except Image.UnidentifiedImageError as error:
        raise UserError(f'{name} cannot be decoded as an image: Pillow knows no such format') from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f'{name} cannot be decoded as an image: {error}') from error


def resize(image: Image.Image, size: int, *, resample: int = Image.Resampling.BICUBIC) -> np.ndarray:
    """The whole image squashed to the square, (size, size, C) uint8."""
    return _pixels(image.resize((size, size), resample))


def train_crop(
    image: bytes,
    size: int,
    *,
    channels: int,
    scale: tuple[float, float],
    seed: Sequence[int],
    exact: bool = False,
    name: str = 'the image',
) -> np.ndarray:
    """A random part of an encoded image at size×size, (size, size, C) uint8.

    The crop of arXiv:1409.4842 as torchvision draws it: area uniform in `scale` of the image's, aspect ratio
    log-uniform from 3/4 to 4/3, ten tries, then the largest centre crop of an allowed ratio.

    Args:
        image: the bytes of a file.
        size: side of the result.
        channels: 1 (grey) or 3 (RGB).
        scale: least and most share of the area.
        seed: what the crop is drawn from.
        exact: the pixels of Pillow's decoder and bicubic filter. Otherwise JPEGs are decoded no larger than the crop
            needs, and filtered with rounded weights: on photographs 0.2 grey levels apart on the mean, 1.1 where the
            crop has more than four times the result's sides.
        name: tells a person which image it is.

    Raises:
        UserError: the bytes are no whole image.
    """
    if not exact and image.startswith(JPEG):
        with contextlib.suppress(ValueError):  # of CMYK, or damaged: Pillow reads it, or says what is wrong with it
            return _fast_crop(image, size, channels, scale, seed)
    whole = decode(image, channels, name)
    box = _random_box(whole.width, whole.height, scale, seed)
    return _pixels(whole.crop(box).resize((size, size), Image.Resampling.BICUBIC))


def _fast_crop(image: bytes, size: int, channels: int, scale: tuple[float, float], seed: Sequence[int]) -> np.ndarray:
    height, width, space, _ = simplejpeg.decode_jpeg_header(image)
    if space not in ('YCbCr', 'RGB', 'Gray') or width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError
    left, top, right, bottom = _random_box(width, height, scale, seed)
    # libjpeg scales by powers of two at little cost, but softly: it leaves at least half of the work to the filter.
    room = min(right - left, bottom - top) // (2 * size)
    shrink = max(factor for factor in (1, 2, 4, 8) if factor <= max(room, 1))
    pixels = simplejpeg.decode_jpeg(
        image,
        'RGB' if channels == 3 else 'GRAY',
        min_height=-(-height // shrink),
        min_width=-(-width // shrink),
    )
    across, down = pixels.shape[1] / width, pixels.shape[0] / height
    return _filter(pixels, size, (left * across, top * down, right * across, bottom * down))


def _filter(pixels: np.ndarray, size: int, box: tuple[float, float, float, float]) -> np.ndarray:
    """The box of an image at size×size by Pillow's antialiased bicubic, with its weights rounded to 16 bits."""
    left, top = math.floor(box[0]), math.floor(box[1])
    part = pixels[top : math.ceil(box[3]), left : math.ceil(box[2])]
    inside = (box[0] - left, box[1] - top, min(box[2] - left, part.shape[1]), min(box[3] - top, part.shape[0]))
    if fast is None:
        image = Image.fromarray(part if part.shape[2] == 3 else part[:, :, 0])
        return _pixels(image.resize((size, size), Image.Resampling.BICUBIC, box=inside))
    kind = fast.PixelType.U8x3 if part.shape[2] == 3 else fast.PixelType.U8
    source = fast.ImageData(part.shape[1], part.shape[0], kind, part.tobytes())
    result = fast.ImageData(size, size, kind)
    options = fast.ResizeOptions(
        resize_alg=fast.ResizeAlg.convolution(fast.FilterType.catmull_rom),
        crop_box=fast.CropBox(inside[0], inside[1], inside[2] - inside[0], inside[3] - inside[1]),
    )
    fast.Resizer().resize(source, result, options)
    return np.frombuffer(result.rust_image.buffer(), np.uint8).reshape(size, size, -1)


def eval_resize(
    image: Image.Image,
    size: int,
    crop_pct: float,
    *,
    squash: bool | None = None,
    resample: int = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """The middle of the image, (size, size, C) uint8, as Hugging Face's ConvNeXt processor cuts it out.

    The shorter side goes to int(size / crop_pct), and the centre is cropped; with `squash`, by default from 384 on, the
    whole image is squashed to the square.
    """
    if squash or (squash is None and size >= 384):
        return resize(image, size, resample=resample)
    shorter = int(size / crop_pct)
    width, height = (int(shorter * side / min(image.size)) for side in image.size)
    if width * height > MOST_PIXELS:
        raise UserError(f'an image of {image.width}×{image.height} is too thin: resized it would be {width}×{height}')
    resized = image.resize((width, height), resample)
    left, top = (width - size) // 2, (height - size) // 2
    return _pixels(resized.crop((left, top, left + size, top + size)))


def _random_box(width: int, height: int, scale: tuple[float, float], seed: Sequence[int]) -> tuple[int, int, int, int]:
    rng = np.random.default_rng(seed)
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
