"""Images with any number of channels, from .npy and TIFF files, as float32 pixels."""

import io
import math
from tokenize import TokenError

import numpy as np
from PIL import ExifTags, Image

from convnext_jax.errors import UserError, first_line

NPY = b'\x93NUMPY'
TIFF = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
"""The first bytes of TIFF files; the last two belong to BigTIFF."""
PILLOW_CHANNELS = (1, 3)
"""Numbers of channels whose images are decoded to 8-bit Pillow images. All others are decoded to `ArrayImage`."""
NPY_ERRORS = (ValueError, TypeError, LookupError, SyntaxError, TokenError, RecursionError, MemoryError)
"""The errors that numpy raises for damaged headers."""
ONE_CHANNEL = ('L', 'I;16', 'I;16B', 'I;16L', 'I;16N', 'F')
"""Pillow's modes of TIFF pages with one channel of 8 or 16 bits or of floats."""


def pixel_dtype(channels: int) -> type[np.generic]:
    """The dtype of decoded images: uint8 for greyscale and RGB, otherwise float32."""
    return np.uint8 if channels in PILLOW_CHANNELS else np.float32


class ArrayImage:
    """Pixels with the attributes and methods of a Pillow image that the data pipeline uses.

    Args:
        pixels: (H, W, C) float32.
    """

    def __init__(self, pixels: np.ndarray):
        self._pixels = pixels

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self._pixels.shape[1], self._pixels.shape[0]

    @property
    def width(self) -> int:
        return self._pixels.shape[1]

    @property
    def height(self) -> int:
        return self._pixels.shape[0]

    def crop(self, box: tuple[int, int, int, int]) -> 'ArrayImage':
        """A part of the image: (left, top, right, bottom), inside the image."""
        left, top, right, bottom = box
        return ArrayImage(self._pixels[top:bottom, left:right])

    def resize(self, size: tuple[int, int], resample: int) -> 'ArrayImage':
        """The image with another width and height; each channel is filtered by Pillow as a float image."""
        channels = (np.ascontiguousarray(channel) for channel in np.moveaxis(self._pixels, 2, 0))
        resized = [np.asarray(Image.fromarray(channel).resize(size, resample)) for channel in channels]
        return ArrayImage(np.stack(resized, axis=2))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._pixels, dtype, copy=copy)


def decode_array(content: bytes, channels: int, name: str) -> ArrayImage:
    """The image in a .npy or TIFF file. Integers are divided by the largest value of their type; floats are unchanged.

    A .npy file holds (H, W, C), or (H, W) for one channel. The pages of a TIFF file are the channels; a page with
    several channels is read by tifffile.

    Args:
        content: the bytes of the file.
        channels: the expected number of channels.
        name: the file, for error messages.

    Raises:
        UserError: the file is damaged or of another format, has another number of channels, or has values of an unknown
            range, NaN or infinity.
    """
    if content.startswith(NPY):
        pixels = read_npy(content, name)
    elif content.startswith(TIFF):
        pixels = _read_tiff(content, name)
    else:
        raise UserError(f'{name} is neither a .npy nor a TIFF file, which images of {channels} channels need')
    return to_image(pixels, channels, name)


def to_image(pixels: np.ndarray, channels: int, name: str) -> ArrayImage:
    """Pixels (H, W, C), or (H, W) for one channel, as an image; arguments and errors as for `decode_array`."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or 0 in pixels.shape or pixels.shape[2] != channels:
        raise UserError(
            f'{name} has the shape {pixels.shape}, not (height, width, {channels}): data.mean and data.std need one '
            'value for each channel, and `measure` needs --channels'
        )
    kind, bits = pixels.dtype.kind, 8 * pixels.dtype.itemsize
    if kind == 'u' and bits <= 16:
        return ArrayImage(pixels.astype(np.float32) / np.float32(2**bits - 1))
    if kind != 'f':
        raise UserError(f'{name} is {pixels.dtype}, whose range is unknown: save it as uint8, uint16 or float32')
    with np.errstate(over='ignore'):  # reported by the next check
        pixels = pixels.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise UserError(f'{name} contains NaN or infinity: replace these values')
    return ArrayImage(pixels)


def read_npy(content: bytes, name: str) -> np.ndarray:
    """The array in a .npy file; it is never unpickled.

    Raises:
        UserError: the file is damaged, or does not contain numbers.
    """
    file = io.BytesIO(content)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, is_fortran, dtype = readers[np.lib.format.read_magic(file)](file)
    except NPY_ERRORS as error:
        raise UserError(f'{name} is not a complete .npy file: {first_line(error)}') from error
    if dtype.kind not in 'uif':
        raise UserError(f'{name} contains {dtype}, not numbers')
    start = file.tell()
    if len(content) - start != math.prod(shape) * dtype.itemsize:  # the header of a damaged file may have any shape
        raise UserError(f'{name} is not a complete .npy file: its size does not fit its shape {shape}')
    return np.frombuffer(content, dtype, offset=start).reshape(shape, order='F' if is_fortran else 'C')


def _read_tiff(content: bytes, name: str) -> np.ndarray:
    try:
        pages = _tiff_pages(content)
        return _tiff_samples(content, name) if pages is None else np.stack(pages, axis=2)
    except UserError:
        raise
    except Exception as error:  # decoders raise many kinds of errors, which Pillow and tifffile do not catch
        raise UserError(f'{name} cannot be decoded as a TIFF image: {first_line(error)}') from error


def _tiff_pages(content: bytes) -> list[np.ndarray] | None:
    """The pages, each (H, W); None if a page has several channels, or a format that Pillow does not read."""
    pages = []
    try:
        with Image.open(io.BytesIO(content), formats=('TIFF',)) as file:
            for page in range(getattr(file, 'n_frames', 1)):
                file.seek(page)
                samples = getattr(file, 'tag_v2', {}).get(ExifTags.Base.SamplesPerPixel, 1)
                if file.mode not in ONE_CHANNEL or samples != 1:  # some pages with several channels have mode 'L'
                    return None
                pages.append(np.asarray(file))
    except Image.UnidentifiedImageError:  # a page with more than four channels, or with several of 16 bits
        return None
    return pages


def _tiff_samples(content: bytes, name: str) -> np.ndarray:
    """The first image of a TIFF file of any structure, (H, W, C)."""
    try:
        import tifffile
    except ImportError as error:
        raise UserError(
            f'{name} is a TIFF file with several channels on a page: pip install tifffile imagecodecs to read it'
        ) from error
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        series = file.series[0]
        pixels = np.moveaxis(series.asarray(), (series.axes.index('Y'), series.axes.index('X')), (0, 1))
    return pixels.reshape(*pixels.shape[:2], -1)
