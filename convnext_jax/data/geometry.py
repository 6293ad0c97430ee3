"""Rotations, shears and translations of a batch, each image by its own numbers, without a gather: shifts of rows."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from convnext_jax.data.pillow_arithmetic import grey_level

# The largest that timm's RandAugment draws (`auto_augment.py`): they bound the shifts.
MOST_DEGREES = 30.0
MOST_SHEAR = 0.3
MOST_TRANSLATION = 0.45
EDGE = 4  # pixels that the outermost row or column is repeated: what bicubic taps beyond the side see


def move(
    images: jax.Array,
    *,
    degrees: jax.Array,
    shear_x: jax.Array,
    shear_y: jax.Array,
    translate_x: jax.Array,
    translate_y: jax.Array,
    fill: Sequence[int],
) -> jax.Array:
    """Moves each image, bicubic as Pillow's transforms; what lies outside of it is `fill`.

    A rotation is three shears, of rows, columns and rows (Paeth, Graphics Interface 1986): so all five are shifts of
    whole rows and columns. A shear or translation has one of them and equals Pillow's; a rotation is resampled three
    times in place of once.

    Args:
        images: (N, H, W, C) uint8.
        degrees: (N,), anticlockwise, at most `MOST_DEGREES` either way.
        shear_x, shear_y: (N,), tangents, at most `MOST_SHEAR`. Of the five an image has one that is not 0.
        translate_x, translate_y: (N,), shares of the side, at most `MOST_TRANSLATION`.
        fill: grey level of each channel.
    """
    height, width = images.shape[1:3]
    angle = jnp.deg2rad(-degrees)
    tangent, sine = jnp.tan(angle / 2), jnp.sin(angle)
    turned = degrees != 0
    x, y = jnp.arange(width) + 0.5, jnp.arange(height) + 0.5
    most_angle = np.deg2rad(MOST_DEGREES)
    most_turned = np.tan(most_angle / 2) * height / 2
    margin = int(np.ceil(most_turned)) + EDGE  # what the first shear moves out of the image and the last one back in
    wide_x = jnp.arange(-margin, width + margin) + 0.5

    about_middle = _lines(tangent, -tangent * height / 2, y)
    rows = _lines(shear_x + tangent, translate_x * width - tangent * height / 2, y)
    columns = _lines(shear_y - sine, translate_y * height + sine * width / 2, wide_x)
    most_rows = max(MOST_SHEAR * height, MOST_TRANSLATION * width, most_turned)
    most_columns = max(MOST_SHEAR * (width + margin), MOST_TRANSLATION * height, np.sin(most_angle) * len(wide_x) / 2)

    padded = jnp.pad(images, ((0, 0), (0, 0), (margin, margin), (0, 0)), mode='edge')
    moved = _shift(padded, rows, most_rows, turned)
    moved = _shift(moved.swapaxes(1, 2), columns, most_columns, turned).swapaxes(1, 2)
    moved = _shift(moved, about_middle, most_turned, jnp.zeros_like(turned))[:, :, margin:-margin]

    # Where each pixel comes from, by the one affine map.
    cosine = jnp.cos(angle)[:, None, None]
    sine, x, y = sine[:, None, None], x[None, None], y[None, :, None]
    from_x = width / 2 + cosine * (x - width / 2) + sine * (y - height / 2)
    from_y = height / 2 - sine * (x - width / 2) + cosine * (y - height / 2)
    from_x += shear_x[:, None, None] * y + translate_x[:, None, None] * width
    from_y += shear_y[:, None, None] * x + translate_y[:, None, None] * height
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    return jnp.where(inside[..., None], moved, jnp.asarray(fill, jnp.uint8))


def _lines(slope: jax.Array, start: jax.Array, place: jax.Array) -> jax.Array:
    """slope · place + start, of (N,), (N,) and (L,): (N, L).

    As a matrix product, because the CPU's compiler computes anything else anew for every pixel that is shifted by it.
    """
    basis = jnp.stack([place, jnp.ones_like(place)])
    return jnp.matmul(jnp.stack([slope, start], 1), basis, precision=lax.Precision.HIGHEST)


def _shift(images: jax.Array, shift: jax.Array, most: float, rounds: jax.Array) -> jax.Array:
    """Moves row y of each image by `shift[:, y]` pixels to the left, bicubic (a = −1, as Pillow's transforms).

    The whole pixels go digit by digit to the base of 4: for each digit a row takes one of four slices.

    Args:
        images: (N, H, W, C) uint8.
        shift: (N, H).
        most: the largest shift either way.
        rounds: (N,), whether to round to the nearest level or to cut off, as Pillow does at the end.
    """
    width = images.shape[2]
    whole = jnp.floor(shift)
    least = -int(most) - 1
    steps = whole.astype(jnp.int32) - least
    digits = int(np.ceil(np.log(1 - 2 * least) / np.log(4)))
    sides = (1 - least, 4**digits + least + 1)  # a pixel before and two after: the bicubic taps
    moved = jnp.pad(images, ((0, 0), (0, 0), sides, (0, 0)), mode='edge')
    for stride in (4**digit for digit in reversed(range(digits))):
        length = moved.shape[2] - 3 * stride
        slices = [moved[:, :, first : first + length] for first in range(0, 4 * stride, stride)]
        digit = (steps // stride % 4)[:, :, None, None]
        moved = lax.select_n(jnp.broadcast_to(digit, slices[0].shape), *slices)
    a, b, c, d = (moved[:, :, tap : tap + width].astype(jnp.float32) for tap in range(4))
    t = (shift - whole)[:, :, None, None]
    value = b + t * (c - a + t * (2 * (a - b) + c - d + t * (b - a + d - c)))
    return grey_level(value + jnp.where(rounds, 0.5, 0.0)[:, None, None, None]).astype(jnp.uint8)
