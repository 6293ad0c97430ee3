"""Image decoding: encoded bytes → pixels, with the training crop and the evaluation resize."""

import contextlib
import io
import math
import struct
from collections.abc import Sequence

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from convnext_jax.data.arrays import NPY, PILLOW_CHANNELS, ArrayImage, decode_array, read_npy, to_image
from convnext_jax.errors import UserError, first_line

try:
    import cykooz_resizer as fast  # four times as fast as Pillow's filter
except ImportError:  # not available on Linux with ARM processors
    fast = None

JPEG = b'\xff\xd8\xff'
MAX_PIXELS = 10**8  # maximum number of pixels of a resized image; similar to Pillow's limit for opened images
FORMATS = ('JPEG', 'PNG', 'WEBP', 'TIFF', 'BMP', 'DIB', 'GIF', 'PPM', 'JPEG2000', 'AVIF')
"""The formats that are decoded, by their names in Pillow. The content of a file determines its format, not the suffix.
Pillow's other formats are excluded, because for a PostScript file Pillow would start Ghostscript."""

DECODING_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, MemoryError)
"""The errors that Pillow raises for damaged files, such as RuntimeError for AVIF, and MemoryError for a wrong size."""


def decode(image: bytes, channels: int, name: str) -> Image.Image:
    """The upright 8-bit image in an encoded file; training, evaluation and prediction all use this decoder.

    The image is rotated according to its EXIF orientation. Only the first of several frames is decoded.

    Args:
        image: the bytes of the file, in one of `FORMATS`, or a .npy file.
        channels: 1 (greyscale, mode 'L') or 3 (mode 'RGB').
        name: the file, for error messages.

    Raises:
        UserError: the bytes are not a complete image, or its pixel values have an unknown range (see `convert_mode`).
    """
    if image.startswith(NPY):
        return convert_mode(_eight_bits(read_npy(image, name), channels, name), channels)
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as file:
            converted = convert_mode(file, channels)
            orientation = _orientation(file)  # read after the pixels, because a PNG may store the EXIF data after them
    except Image.UnidentifiedImageError as error:
        raise UserError(f'{name} cannot be decoded as an image: its format is none of {", ".join(FORMATS)}') from error
    except (*DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise UserError(f'{name} cannot be decoded as an image: {first_line(error)}') from error
    return converted if orientation == 1 else Image.fromarray(_upright(np.asarray(converted), orientation))


def decode_channels(image: bytes, channels: int, name: str) -> Image.Image | ArrayImage:
    """The image of `decode` for 1 or 3 channels, or of `decode_array` for any other number of channels."""
    return decode(image, channels, name) if channels in PILLOW_CHANNELS else decode_array(image, channels, name)


def _eight_bits(pixels: np.ndarray, channels: int, name: str) -> Image.Image:
    """An array (H, W), (H, W, 1) or (H, W, channels) as an 8-bit image."""
    is_grey = pixels.ndim == 2 or pixels.shape[2:] == (1,)
    values = np.asarray(to_image(pixels, 1 if is_grey else channels, name))
    if not (values.min() >= 0 and values.max() <= 1):
        raise UserError(f'{name} has float pixel values outside [0, 1]: scale them to [0, 1]')
    scaled = np.round(values * 255).astype(np.uint8)
    return Image.fromarray(scaled[:, :, 0] if scaled.shape[2] == 1 else scaled)


def decode_rgb(image: bytes, name: str) -> np.ndarray:
    """The pixels of `decode(image, 3, name)`, (H, W, 3) uint8. A JPEG is decoded faster, to the same values.

    Raises:
        UserError: as for `decode`.
    """
    if image.startswith(JPEG):
        with contextlib.suppress(ValueError):  # CMYK or damaged: Pillow decodes it or reports the error
            *_, orientation = _jpeg_header(image)
            return _upright(simplejpeg.decode_jpeg(image), orientation)
    return np.asarray(decode(image, 3, name))


def upright_size(image: bytes, name: str) -> tuple[int, int]:
    """Width and height of the image that `decode` returns. For most formats, only the header is read.

    Raises:
        UserError: the header of the file cannot be read.
    """
    if image.startswith(NPY):
        return decode(image, 3, name).size
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as file:
            orientation = _orientation(file)
            width, height = file.size
    except (*DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise UserError(f'{name} cannot be decoded as an image: {first_line(error)}') from error
    return (height, width) if orientation >= 5 else (width, height)


def convert_mode(image: Image.Image, channels: int) -> Image.Image:
    """The image as 8 bits in 1 (mode 'L') or 3 (mode 'RGB') channels.

    Transparency is dropped, as in timm and torchvision. Greyscale images of more than 8 bits are scaled by the largest
    value of their type: 16 bits, 12 bits in some TIFF files, or 1.0 for floats. Pillow's own conversion would clip
    their values at 255.

    Args:
        image: a Pillow image of any mode.
        channels: 1 or 3.

    Raises:
        UserError: the pixel values are 32-bit integers, whose range is unknown, or floats outside [0, 1].
    """
    if image.mode in ('I', 'F') or image.mode.startswith('I;16'):
        image = _scale_to_8_bits(image)
    elif image.mode == 'La':  # Pillow converts this mode, and the next two, only to a few other modes
        image = image.convert('LA')
    elif image.mode == 'RGBa':
        image = image.convert('RGBA')
    elif image.mode == 'LAB':
        image = image.convert('RGB')
    elif image.mode == 'P' and 'transparency' in image.info:  # direct conversion gives an equal result with a warning
        image = image.convert('RGBA')
    return image.convert('L' if channels == 1 else 'RGB')


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    image.load()
    pixels = np.asarray(image)
    tags = getattr(image, 'tag_v2', {})  # only TIFF images have them
    if image.mode == 'F':
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise UserError('its float pixel values are outside [0, 1]: save it with 8 or 16 bits')
        scaled = np.uint8(np.round(pixels * 255))
    elif image.mode == 'I' and image.format != 'PPM':  # Pillow reads a deep PGM as I with values up to 65535
        raise UserError('its pixel values are 32-bit integers of unknown range: save it with 8 or 16 bits')
    else:
        largest = 2 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1
        scaled = np.uint8((pixels.astype(np.uint32).clip(0, largest) * 255 + largest // 2) // largest)
    white_is_zero = tags.get(ExifTags.Base.PhotometricInterpretation) == 0  # Pillow applies it up to 8 bits only
    return Image.fromarray(255 - scaled if white_is_zero else scaled)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an open file, 1 to 8; 1 (upright) if it is missing or the EXIF data are damaged.

    For a loaded TIFF the result is 1, because Pillow itself rotates the image and removes the tag.
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
    ):  # the pixels are valid even if the EXIF data are not
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """An upright view of pixels, (H, W) or (H, W, C), that are stored with an EXIF orientation."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def resize(image: Image.Image | ArrayImage, size: int, *, resample: int = Image.Resampling.BICUBIC) -> np.ndarray:
    """The whole image resized to a square, without keeping the aspect ratio: (size, size, C)."""
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
    """A random resized crop of an encoded image, upright: (size, size, C) with the dtype of `pixel_dtype`.

    The crop of arXiv:1409.4842, as in torchvision: the fraction of the image's area is uniform in `scale`, and the
    aspect ratio is log-uniform in [3/4, 4/3]. After ten draws that do not fit into the image, the result is the largest
    centre crop with an allowed ratio.

    Args:
        image: the bytes of the file.
        size: side of the result in pixels.
        channels: 1 (greyscale), 3 (RGB), or any other number for a .npy or TIFF file.
        scale: smallest and largest fraction of the image's area.
        seed: non-negative integers that seed the random crop.
        exact: use Pillow's decoder and bicubic filter. Otherwise JPEGs are decoded at the smallest sufficient
            resolution and filtered with rounded weights: the pixel values of photographs then differ by 0.2 on average,
            and by 1.1 if the sides of the crop are more than four times `size`.
        name: the file, for error messages.

    Raises:
        UserError: as for `decode_channels`.
    """
    if not exact and image.startswith(JPEG) and channels in PILLOW_CHANNELS:
        with contextlib.suppress(ValueError):  # CMYK or damaged: Pillow decodes it or reports the error
            return _fast_crop(image, size, channels, scale, seed)
    whole = decode_channels(image, channels, name)
    box = _random_box(whole.width, whole.height, scale, seed)
    return _pixels(whole.crop(box).resize((size, size), Image.Resampling.BICUBIC))


def _fast_crop(image: bytes, size: int, channels: int, scale: tuple[float, float], seed: Sequence[int]) -> np.ndarray:
    height, width, orientation = _jpeg_header(image)
    stored_height, stored_width = height, width
    if orientation >= 5:
        height, width = width, height
    left, top, right, bottom = _random_box(width, height, scale, seed)
    # libjpeg downscales by powers of two at little cost, but it blurs. The filter therefore does at least the last
    # factor of 2.
    limit = min(right - left, bottom - top) // (2 * size)
    shrink = max(factor for factor in (1, 2, 4, 8) if factor <= max(limit, 1))
    pixels = simplejpeg.decode_jpeg(
        image,
        'RGB' if channels == 3 else 'GRAY',
        min_height=-(-stored_height // shrink),
        min_width=-(-stored_width // shrink),
    )
    pixels = _upright(pixels, orientation)
    x_scale, y_scale = pixels.shape[1] / width, pixels.shape[0] / height
    return _filter(pixels, size, (left * x_scale, top * y_scale, right * x_scale, bottom * y_scale))


def _jpeg_header(image: bytes) -> tuple[int, int, int]:
    """Height and width of the stored pixels of a JPEG, and its EXIF orientation.

    Raises:
        ValueError: simplejpeg cannot decode the image, or it is too large.
    """
    header = simplejpeg.decode_jpeg_header(image)
    height, width, space = int(header[0]), int(header[1]), header[2]
    if space not in ('YCbCr', 'RGB', 'Gray') or width * height > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError
    with Image.open(io.BytesIO(image), formats=('JPEG',)) as file:  # parses only the header
        return height, width, _orientation(file)


def _filter(pixels: np.ndarray, size: int, box: tuple[float, float, float, float]) -> np.ndarray:
    """A box of an image resized to (size, size, C), by Pillow's antialiased bicubic filter with 16-bit weights."""
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
    image: Image.Image | ArrayImage,
    size: int,
    crop_pct: float,
    *,
    squash: bool | None = None,
    resample: int = Image.Resampling.BICUBIC,
    name: str = 'the image',
) -> np.ndarray:
    """The evaluation resize and centre crop of Hugging Face's ConvNeXt processor: (size, size, C).

    The shorter side is resized to int(size / crop_pct), and the centre is cropped. With `squash` the whole image is
    resized to a square instead.

    Args:
        image: an upright image.
        size: side of the result in pixels.
        crop_pct: `size` as a fraction of the shorter side after the resize.
        squash: whether to ignore `crop_pct` and the aspect ratio; None means True for sizes of 384 and above, else
            False.
        resample: Pillow's number of the resampling filter.
        name: the file, for error messages.

    Raises:
        UserError: as for `eval_sides`.
    """
    width, height = eval_sides(image.size, size, crop_pct, squash=squash, name=name)
    resized = image.resize((width, height), resample)
    left, top = (width - size) // 2, (height - size) // 2
    return _pixels(resized.crop((left, top, left + size, top + size)))


def eval_sides(
    image_size: tuple[int, int], size: int, crop_pct: float, *, squash: bool | None = None, name: str = 'the image'
) -> tuple[int, int]:
    """Width and height to which `eval_resize` resizes an image before the crop, in pixels.

    Args:
        image_size: width and height of the image.
        size, crop_pct, squash, name: as for `eval_resize`.

    Raises:
        UserError: the aspect ratio is so extreme that the resized image would take too much memory.
    """
    if squash or (squash is None and size >= 384):
        return size, size
    width, height = (int(int(size / crop_pct) * side / min(image_size)) for side in image_size)
    if width * height > MAX_PIXELS:
        raise UserError(
            f'{name} of {image_size[0]}×{image_size[1]} pixels is too narrow: resized it would have '
            f'{width}×{height}. Crop or remove it'
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


def _pixels(image: Image.Image | ArrayImage) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
