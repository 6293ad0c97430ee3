"""Encoded bytes → uint8 pixels: the training crop and the evaluation resize."""

import contextlib
import io
import math
import struct
from collections.abc import Sequence

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from convnext_jax.errors import UserError, first_line

try:
    import cykooz_resizer as fast  # four times as fast as Pillow's filter
except ImportError:  # there is none for ARM processors under Linux
    fast = None

JPEG = b'\xff\xd8\xff'
MOST_PIXELS = 10**8  # of a resized image, as Pillow's own bound on what it opens
FORMATS = ('JPEG', 'PNG', 'WEBP', 'TIFF', 'BMP', 'DIB', 'GIF', 'PPM', 'JPEG2000', 'AVIF')
"""Pillow's names of the formats that are decoded. The content tells the format, not the suffix. Pillow knows more, but
would start Ghostscript for a PostScript file."""

DECODING_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, MemoryError)
"""What Pillow raises for damaged files; RuntimeError comes from AVIF, MemoryError from a damaged size."""


def decode(image: bytes, channels: int, name: str) -> Image.Image:
    """Decodes a file to an upright 8-bit image: the one decoder of training, evaluation and prediction.

    The image is turned as its EXIF orientation says; of several frames the first is taken.

    Args:
        image: the bytes of the file, in one of `FORMATS`.
        channels: 1 (grey, mode 'L') or 3 (mode 'RGB').
        name: the file, for error messages.

    Raises:
        UserError: the bytes are not a whole image, or its pixels have an unknown range (see `convert_mode`).
    """
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as file:
            converted = convert_mode(file, channels)
            orientation = _orientation(file)  # after the pixels: a PNG may hold its EXIF data behind them
    except Image.UnidentifiedImageError as error:
        raise UserError(f'{name} cannot be decoded as an image: it is none of {", ".join(FORMATS)}') from error
    except (*DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise UserError(f'{name} cannot be decoded as an image: {first_line(error)}') from error
    return converted if orientation == 1 else Image.fromarray(_turn(np.asarray(converted), orientation))


def convert_mode(image: Image.Image, channels: int) -> Image.Image:
    """Converts any Pillow image to 8 bits and 1 (mode 'L') or 3 (mode 'RGB') channels.

    Transparency is dropped, as timm and torchvision do. Deep grey images are scaled by the range of their type, where
    Pillow's own conversion cuts off all values above 255: 16 bits (of a TIFF also 12) by the largest value, floats
    from 0 to 1.

    Raises:
        UserError: integers of 32 bits, whose range is unknown, or floats outside 0 to 1.
    """
    if image.mode in ('I', 'F') or image.mode.startswith('I;16'):
        image = _scale_to_8_bits(image)
    elif image.mode == 'La':  # Pillow converts these three to few other modes
        image = image.convert('LA')
    elif image.mode == 'RGBa':
        image = image.convert('RGBA')
    elif image.mode == 'LAB':
        image = image.convert('RGB')
    elif image.mode == 'P' and 'transparency' in image.info:  # direct conversion is the same, with a warning
        image = image.convert('RGBA')
    return image.convert('L' if channels == 1 else 'RGB')


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    image.load()
    pixels = np.asarray(image)
    tags = getattr(image, 'tag_v2', {})  # of a TIFF
    if image.mode == 'F':
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise UserError('its float pixels are not all from 0 to 1: save it with 8 or 16 bits')
        scaled = np.uint8(np.round(pixels * 255))
    elif image.mode == 'I' and image.format != 'PPM':  # Pillow reads a deep PGM as I with values up to 65535
        raise UserError('its pixels are integers of unknown range (mode I): save it with 8 or 16 bits')
    else:
        largest = 2 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1
        scaled = np.uint8((pixels.astype(np.uint32).clip(0, largest) * 255 + largest // 2) // largest)
    white_is_zero = tags.get(ExifTags.Base.PhotometricInterpretation) == 0  # Pillow heeds it for up to 8 bits only
    return Image.fromarray(255 - scaled if white_is_zero else scaled)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an open file, 1 to 8; 1 (upright) if it has none or its EXIF data are damaged.

    The tag counts no longer where Pillow has turned the image itself, as it does when it loads a TIFF.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (
        SyntaxError,
        ValueError,
        TypeError,
        LookupError,
        OSError,
        struct.error,
    ):  # the pixels are whole all the same
        return 1
    return orientation if orientation in range(1, 9) else 1


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of (H, W) or (H, W, C) pixels as the EXIF orientation wants them shown."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


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
    """A random part of an encoded image, upright, at size×size: (size, size, C) uint8.

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
    with Image.open(io.BytesIO(image), formats=('JPEG',)) as file:  # parses the header alone
        orientation = _orientation(file)
    stored_height, stored_width = height, width
    if orientation >= 5:
        height, width = width, height
    left, top, right, bottom = _random_box(width, height, scale, seed)
    # libjpeg scales by powers of two at little cost, but softly: it leaves at least half of the work to the filter.
    room = min(right - left, bottom - top) // (2 * size)
    shrink = max(factor for factor in (1, 2, 4, 8) if factor <= max(room, 1))
    pixels = simplejpeg.decode_jpeg(
        image,
        'RGB' if channels == 3 else 'GRAY',
        min_height=-(-stored_height // shrink),
        min_width=-(-stored_width // shrink),
    )
    pixels = _turn(pixels, orientation)
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
    name: str = 'the image',
) -> np.ndarray:
    """The middle of the image, (size, size, C) uint8, as Hugging Face's ConvNeXt processor cuts it out.

    The shorter side goes to int(size / crop_pct), and the centre is cropped; with `squash`, by default from 384 on, the
    whole image is squashed to the square.

    Raises:
        UserError: as `eval_sides`; `name` says which image it is.
    """
    width, height = eval_sides(image.size, size, crop_pct, squash=squash, name=name)
    resized = image.resize((width, height), resample)
    left, top = (width - size) // 2, (height - size) // 2
    return _pixels(resized.crop((left, top, left + size, top + size)))


def eval_sides(
    image_size: tuple[int, int], size: int, crop_pct: float, *, squash: bool | None = None, name: str = 'the image'
) -> tuple[int, int]:
    """Width and height to which `eval_resize` resizes an image of a width and height, before the crop.

    Raises:
        UserError: the image is so thin that this would take too much memory.
    """
    if squash or (squash is None and size >= 384):
        return size, size
    width, height = (int(int(size / crop_pct) * side / min(image_size)) for side in image_size)
    if width * height > MOST_PIXELS:
        raise UserError(
            f'{name}, {image_size[0]}×{image_size[1]} pixels, is too thin: resized it would be {width}×{height}'
        )
    return width, height


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
