"""Photometric distortion on the device, with OpenCV's 8-bit arithmetic and a random key for each image."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from convnext_jax.data.pillow_arithmetic import clip_and_floor

BRIGHTNESS = 32.0  # largest change; all ranges are from SSD (arXiv:1512.02325), and mmsegmentation's defaults
FACTOR = (0.5, 1.5)  # range of the factors of contrast and saturation
HUE = 18  # largest change, in the 180 steps of OpenCV's 8-bit hue
FRACTION_BITS = 12  # precision of the divisions in OpenCV's conversion to HSV


class Distortion(NamedTuple):
    """The changes of one image, or with arrays (N,) of each image in a batch.

    Attributes:
        brightness: a number that is added to all values.
        contrast: a factor of all values.
        contrast_first: whether the contrast is changed before saturation and hue, not after them.
        saturation: a factor of the saturation.
        changes_saturation: whether the saturation is changed.
        hue: an integer in (−180, 180) that is added to the hue.
        changes_hue: whether the hue is changed.
    """

    brightness: Float[Array, '*n']
    contrast: Float[Array, '*n']
    contrast_first: Bool[Array, '*n']
    saturation: Float[Array, '*n']
    changes_saturation: Bool[Array, '*n']
    hue: Int[Array, '*n']
    changes_hue: Bool[Array, '*n']


def distort(images: UInt8[Array, 'n h w 3'], keys: Key[Array, ' n']) -> UInt8[Array, 'n h w 3']:
    """Random changes of brightness, contrast, saturation and hue, each with probability ½.

    This is `PhotoMetricDistortion` of mmsegmentation, which clips and rounds down to 8 bits after each step.

    Args:
        images: (N, H, W, 3) uint8, RGB.
        keys: (N,) random keys, one for each image.

    Returns:
        (N, H, W, 3) uint8.
    """
    return apply_distortion(images, jax.vmap(draw_distortion)(keys))


def draw_distortion(key: Key[Array, '']) -> Distortion:
    """The random changes of one image."""
    chosen_key, *keys = jax.random.split(key, 5)
    brightens, contrasts, contrast_first, changes_saturation, changes_hue = jax.random.bernoulli(chosen_key, shape=(5,))
    brightness = jax.random.uniform(keys[0], minval=-BRIGHTNESS, maxval=BRIGHTNESS)
    contrast, saturation = (jax.random.uniform(key, minval=FACTOR[0], maxval=FACTOR[1]) for key in keys[1:3])
    return Distortion(
        brightness=jnp.where(brightens, brightness, 0.0),
        contrast=jnp.where(contrasts, contrast, 1.0),
        contrast_first=contrast_first,
        saturation=saturation,
        changes_saturation=changes_saturation,
        hue=jax.random.randint(keys[3], (), -HUE, HUE),  # excludes HUE, as in mmsegmentation
        changes_hue=changes_hue,
    )


def apply_distortion(images: UInt8[Array, 'n h w 3'], distortion: Distortion) -> UInt8[Array, 'n h w 3']:
    """Applies given changes; images and result as for `distort`."""
    each = jax.tree.map(lambda x: x[:, None, None], distortion)
    first, contrast = each.contrast_first[..., None], each.contrast[..., None]
    images = _to_uint8(images + each.brightness[..., None])
    images = _to_uint8(images * jnp.where(first, contrast, 1.0))

    hue, saturation, value = rgb_to_hsv(images)
    saturation = clip_and_floor(saturation * each.saturation)
    images = jnp.where(each.changes_saturation[..., None], hsv_to_rgb(hue, saturation, value), images)

    hue, saturation, value = rgb_to_hsv(images)
    hue = (hue + each.hue) % 180
    images = jnp.where(each.changes_hue[..., None], hsv_to_rgb(hue, saturation, value), images)
    return _to_uint8(images * jnp.where(first, 1.0, contrast))


def _to_uint8(values: Float[Array, '*shape']) -> UInt8[Array, '*shape']:
    return clip_and_floor(values).astype(jnp.uint8)


def rgb_to_hsv(
    images: UInt8[Array, '*n 3'],
) -> tuple[Int[Array, '*n'], Int[Array, '*n'], Int[Array, '*n']]:
    """OpenCV's conversion of 8-bit colours (`COLOR_RGB2HSV`).

    Returns:
        Hue from 0 to 179, saturation and value from 0 to 255, int32.
    """
    red, green, blue = (images[..., channel].astype(jnp.int32) for channel in range(3))
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    hue = jnp.where(
        value == red,
        green - blue,
        jnp.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma),
    )
    hue = _ratio(30, hue, chroma)
    return jnp.where(hue < 0, hue + 180, hue), _ratio(255, chroma, value), value


def _ratio(scale: int, x: Int[Array, '*n'], y: Int[Array, '*n']) -> Int[Array, '*n']:
    """scale · x / y, rounded. The factor scale / y is rounded to 12 fractional bits, and is 0 for y = 0."""
    factor = jnp.where(y == 0, 0, ((scale << FRACTION_BITS + 1) + y) // jnp.maximum(2 * y, 1))
    return (x * factor + (1 << FRACTION_BITS - 1)) >> FRACTION_BITS


def hsv_to_rgb(hue: Int[Array, '*n'], saturation: Int[Array, '*n'], value: Int[Array, '*n']) -> UInt8[Array, '*n 3']:
    """OpenCV's conversion of 8-bit colours (`COLOR_HSV2RGB`).

    OpenCV rounds down, except the last W mod 32 pixels of a row, which it rounds to the nearest integer. Here all are
    rounded down. In both libraries, the rounding of products close to an integer depends on the processor: one value in
    10,000 may differ by 1.
    """
    scaled = hue * jnp.float32(6 / 180)
    sector = scaled.astype(jnp.int32)
    fraction = scaled - sector
    s, v = (x * jnp.float32(1 / 255) for x in (saturation, value))
    low, falling, rising = ((v * (1 - part) * 255).astype(jnp.int32) for part in (s, s * fraction, s * (1 - fraction)))
    choices = {
        'red': (value, falling, low, low, rising, value),
        'green': (rising, value, value, falling, low, low),
        'blue': (low, low, rising, value, value, falling),
    }
    return jnp.stack([jnp.select([sector == i for i in range(6)], x) for x in choices.values()], -1).astype(jnp.uint8)
