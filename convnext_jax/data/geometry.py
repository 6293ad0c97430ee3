"""Rotations, shears and translations of a batch, with separate arguments for each image.

They are computed as shifts of rows and columns, because a gather of pixels is slow on TPUs.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, UInt8

from convnext_jax.data.pillow_arithmetic import clip_and_floor

# The largest values in timm's RandAugment (`auto_augment.py`); they limit the shifts.
MAX_DEGREES = 30.0
MAX_SHEAR = 0.3
MAX_TRANSLATION = 0.45
EDGE = 4  # copies of the outermost row or column that are added at each side, for bicubic taps outside the image


def move(
    images: UInt8[Array, 'n h w c'],
    *,
    degrees: Float[Array, ' n'],
    shear_x: Float[Array, ' n'],
    shear_y: Float[Array, ' n'],
    translate_x: Float[Array, ' n'],
    translate_y: Float[Array, ' n'],
    fill: Sequence[int],
) -> UInt8[Array, 'n h w c']:
    """A rotation, shear or translation of each image, bicubic as in Pillow's transforms.

    All five transforms are shifts of whole rows and columns: a rotation is three shears, of rows, columns and rows
    (Paeth, Graphics Interface 1986). Shears and translations equal Pillow's results. Rotations differ slightly, because
    they are resampled three times instead of once.

    Args:
        images: (N, H, W, C) uint8.
        degrees: (N,) float, anticlockwise, at most `MAX_DEGREES` in absolute value.
        shear_x, shear_y: (N,) float, tangents of the angle, at most `MAX_SHEAR` in absolute value.
        translate_x, translate_y: (N,) float, fractions of the width or height, at most `MAX_TRANSLATION` in absolute
            value. At most one of the five arguments of an image may differ from 0.
        fill: value, 0 to 255, of each channel for pixels outside the original image.

    Returns:
        (N, H, W, C) uint8.
    """
    height, width = images.shape[1:3]
    angle = jnp.deg2rad(-degrees)
    tangent, sine = jnp.tan(angle / 2), jnp.sin(angle)
    rotated = degrees != 0
    x, y = jnp.arange(width) + 0.5, jnp.arange(height) + 0.5
    max_angle = np.deg2rad(MAX_DEGREES)
    max_rotated = np.tan(max_angle / 2) * height / 2
    margin = (
        int(np.ceil(max_rotated)) + EDGE
    )  # columns that the first shear moves out of the image and the last one back
    wide_x = jnp.arange(-margin, width + margin) + 0.5

    back = _lines(tangent, -tangent * height / 2, y)
    rows = _lines(shear_x + tangent, translate_x * width - tangent * height / 2, y)
    columns = _lines(shear_y - sine, translate_y * height + sine * width / 2, wide_x)
    max_rows = max(MAX_SHEAR * height, MAX_TRANSLATION * width, max_rotated)
    max_columns = max(MAX_SHEAR * (width + margin), MAX_TRANSLATION * height, np.sin(max_angle) * len(wide_x) / 2)

    padded = jnp.pad(images, ((0, 0), (0, 0), (margin, margin), (0, 0)), mode='edge')
    moved = _shift(padded, rows, max_rows, rotated)
    moved = _shift(moved.swapaxes(1, 2), columns, max_columns, rotated).swapaxes(1, 2)
    moved = _shift(moved, back, max_rotated, jnp.zeros_like(rotated))[:, :, margin:-margin]

    # One affine map gives the position of each pixel in the original image. Pixels from outside the image are filled.
    cosine = jnp.cos(angle)[:, None, None]
    sine, x, y = sine[:, None, None], x[None, None], y[None, :, None]
    from_x = width / 2 + cosine * (x - width / 2) + sine * (y - height / 2)
    from_y = height / 2 - sine * (x - width / 2) + cosine * (y - height / 2)
    from_x += shear_x[:, None, None] * y + translate_x[:, None, None] * width
    from_y += shear_y[:, None, None] * x + translate_y[:, None, None] * height
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    return jnp.where(inside[..., None], moved, jnp.asarray(fill, jnp.uint8))


def _lines(
    slope: Float[Array, ' n'], start: Float[Array, ' n'], position: Float[Array, ' length']
) -> Float[Array, 'n length']:
    """slope · position + start: (N,), (N,), (L,) → (N, L).

    It is a matrix product, because the CPU compiler would recompute an elementwise expression for every pixel.
    """
    basis = jnp.stack([position, jnp.ones_like(position)])
    return jnp.matmul(jnp.stack([slope, start], 1), basis, precision=lax.Precision.HIGHEST)


def _shift(
    images: UInt8[Array, 'n h w c'], shift: Float[Array, 'n h'], max_shift: float, rounds: Bool[Array, ' n']
) -> UInt8[Array, 'n h w c']:
    """Row y of each image shifted left by `shift[:, y]` pixels, with Pillow's bicubic filter for transforms (a = −1).

    The integer part of the shift is applied digit by digit in base 4: for each digit, a row selects one of four slices.

    Args:
        images: (N, H, W, C) uint8.
        shift: (N, H) float32, in pixels.
        max_shift: the largest absolute value of `shift`.
        rounds: (N,) bool, whether to round to the nearest integer; otherwise fractions are truncated, as in Pillow.

    Returns:
        (N, H, W, C) uint8.
    """
    width = images.shape[2]
    integer = jnp.floor(shift)
    least = -int(max_shift) - 1
    steps = integer.astype(jnp.int32) - least
    digits = int(np.ceil(np.log(1 - 2 * least) / np.log(4)))
    sides = (1 - least, 4**digits + least + 1)  # the bicubic taps need one pixel before and two after
    moved = jnp.pad(images, ((0, 0), (0, 0), sides, (0, 0)), mode='edge')
    for stride in (4**digit for digit in reversed(range(digits))):
        length = moved.shape[2] - 3 * stride
        slices = [moved[:, :, first : first + length] for first in range(0, 4 * stride, stride)]
        digit = (steps // stride % 4)[:, :, None, None]
        moved = lax.select_n(jnp.broadcast_to(digit, slices[0].shape), *slices)
    a, b, c, d = (moved[:, :, tap : tap + width].astype(jnp.float32) for tap in range(4))
    t = (shift - integer)[:, :, None, None]
    value = b + t * (c - a + t * (2 * (a - b) + c - d + t * (b - a + d - c)))
    return clip_and_floor(value + jnp.where(rounds, 0.5, 0.0)[:, None, None, None]).astype(jnp.uint8)
