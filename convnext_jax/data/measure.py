"""Mean and standard deviation of each channel over the images of a split."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
from tqdm import tqdm

from convnext_jax.data.arrays import pixel_dtype
from convnext_jax.data.decode import decode_channels
from convnext_jax.data.sources import Source
from convnext_jax.errors import UserError

CHUNK = 256  # images that are submitted to the threads together
ROUNDING = Fraction(1, 10**12)  # the float64 sums give a constant channel a variance of this size relative to mean²


def mean_and_std(source: Source, channels: int) -> tuple[list[float], list[float]]:
    """The mean and the standard deviation of each channel over all pixels, in one pass over the images.

    Integer pixels are divided by the largest value of their type, as in training. The images are neither resized nor
    cropped, and all pixels have the same weight. The sums over an image are float64. They are added as fractions,
    without rounding, so that the order of the images has no effect.

    Args:
        source: the images.
        channels: the number of channels.

    Raises:
        UserError: an image cannot be read, or a channel has the same value everywhere.
    """
    count, sums, squares = 0, [Fraction(0)] * channels, [Fraction(0)] * channels

    def sums_of(index: int) -> tuple[int, np.ndarray, np.ndarray]:
        example = source[index]
        pixels = np.asarray(decode_channels(example.image, channels, example.name))
        values = pixels.reshape(-1, channels).astype(np.float64)
        return len(values), values.sum(0), np.square(values).sum(0)

    with ThreadPoolExecutor() as pool, tqdm(total=len(source), unit='image', disable=not sys.stderr.isatty()) as bar:
        for start in range(0, len(source), CHUNK):
            for pixels, sum_, square in pool.map(sums_of, range(start, min(start + CHUNK, len(source)))):
                count += pixels
                sums = [total + Fraction(x) for total, x in zip(sums, sum_, strict=True)]
                squares = [total + Fraction(x) for total, x in zip(squares, square, strict=True)]
                bar.update()
    means = [total / count for total in sums]
    variances = [total / count - mean**2 for total, mean in zip(squares, means, strict=True)]
    constant = [
        str(channel)
        for channel, (mean, variance) in enumerate(zip(means, variances, strict=True))
        if variance <= ROUNDING * mean**2
    ]
    if constant:
        raise UserError(f'all pixels have the same value in channel {", ".join(constant)}: remove it from the images')
    scale = 255 if pixel_dtype(channels) == np.uint8 else 1
    return [float(mean) / scale for mean in means], [math.sqrt(variance) / scale for variance in variances]
