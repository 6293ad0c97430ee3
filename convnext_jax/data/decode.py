"""Encoded bytes → uint8 pixels: the training crop and the evaluation resize."""

import io

import numpy as np
from PIL import Image

from convnext_jax.errors import UserError

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


def train_crop(image: Image.Image, size: int, scale: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A random part of the image at size×size, (size, size, C) uint8.

    The crop of arXiv:1409.4842 as torchvision draws it: area uniform in `scale` of the image's, aspect ratio
    log-uniform from 3/4 to 4/3, ten tries, then the largest centre crop of an allowed ratio.
    """
    box = _random_box(image.width, image.height, scale, rng)
    return _pixels(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


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


def _random_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
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
