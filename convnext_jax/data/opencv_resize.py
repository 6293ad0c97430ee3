"""OpenCV's bilinear and nearest-neighbour resize of uint8 images (`cv2.resize`), bit for bit.

mmsegmentation, and therefore the published weights of segmentation networks, resize with OpenCV, which does not
antialias. A part of the result can be computed alone.
"""

import numpy as np

SCALE = 2**11
"""The weights of the bilinear filter are integers in units of 1 / SCALE."""
BLOCK = 32  # rows that are computed at once, so that they stay in the processor's cache
ALL = slice(None)


def resize_bilinear(image: np.ndarray, size: tuple[int, int], *, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
    """A part of a resized image, as with `cv2.INTER_LINEAR`.

    Args:
        image: (H, W, C) uint8.
        size: height and width of the whole resized image in pixels, at least 1.
        rows, columns: the part of the resized image to compute.

    Returns:
        (rows, columns, C) uint8.
    """
    y, y_weights = _taps(image.shape[0], size[0], rows)
    x, x_weights = _taps(image.shape[1], size[1], columns)
    x_weights = x_weights.repeat(image.shape[2], 1)
    used, (top, bottom) = np.unique(np.stack([y, y + 1]).clip(0, image.shape[0] - 1), return_inverse=True)
    source = image[used]
    left, right = (source.take(at.clip(0, image.shape[1] - 1), 1).reshape(len(used), -1) for at in (x, x + 1))

    # OpenCV rounds three times. Horizontal sums have 11 fractional bits, of which 7 are kept. Their products with the
    # vertical weights have 18, of which 2 are kept. The sum of two products is rounded to an integer.
    sums = np.empty(left.shape, np.int32)
    for first in range(0, len(sums), BLOCK):
        block = slice(first, first + BLOCK)
        total = np.multiply(left[block], x_weights[0], out=sums[block])
        total += right[block] * x_weights[1]
        total >>= 4

    result = np.empty((len(y), sums.shape[1]), np.uint8)
    for first in range(0, len(result), BLOCK):
        block = slice(first, first + BLOCK)
        above, below = (
            sums[at[block]] * weight[block, None] for at, weight in zip((top, bottom), y_weights, strict=True)
        )
        above >>= 16
        below >>= 16
        above += below
        above += 2
        above >>= 2
        result[block] = above
    return result.reshape(len(y), len(x), -1)


def resize_nearest(mask: np.ndarray, size: tuple[int, int], *, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
    """A part of a resized mask, as with `cv2.INTER_NEAREST`.

    Args:
        mask: (H, W), any dtype.
        size, rows, columns: as for `resize_bilinear`.

    Returns:
        (rows, columns), with the dtype of the mask.
    """
    y, x = (
        np.floor(np.arange(new)[part] * _step(old, new)).astype(int).clip(max=old - 1)
        for old, new, part in zip(mask.shape, size, (rows, columns), strict=True)
    )
    return mask[y].take(x, 1)


def _step(old: int, new: int) -> float:
    """The distance between two pixels of the result, in pixels of the image, rounded as in OpenCV."""
    return 1 / (new / old)


def _taps(old: int, new: int, part: slice) -> tuple[np.ndarray, np.ndarray]:
    """The two source pixels of each result pixel along one axis.

    Returns:
        Index of the first one, (n,) int, and the weights of both, (2, n) int32.
    """
    position = np.float32((np.arange(new)[part] + 0.5) * _step(old, new) - 0.5)
    first = np.floor(position)
    fraction = position - first
    weights = np.rint(np.stack([1 - fraction, fraction]) * SCALE)
    return first.astype(int), weights.astype(np.int32)
