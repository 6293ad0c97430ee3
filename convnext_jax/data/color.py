"""Colour jitter and three-augment on the device, with Pillow's arithmetic and a random key for each image."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from convnext_jax.data import pillow_arithmetic
from convnext_jax.data.selection import apply_to_selected

BRIGHTNESS, CONTRAST, SATURATION = range(3)
GREY, SOLARIZED, BLURRED = range(3)
SOLARIZE_THRESHOLD = 128
BLUR_RADIUS = (0.1, pillow_arithmetic.MAX_BLUR_RADIUS)  # the range in DeiT (`augment.py`) and timm's policy '3a'


def jitter_colors(images: UInt8[Array, 'n h w c'], keys: Key[Array, ' n'], strength: float) -> UInt8[Array, 'n h w c']:
    """Random changes of brightness, contrast and saturation, in random order (torchvision's ColorJitter).

    Args:
        images: (N, H, W, C) uint8.
        keys: (N,) random keys, one for each image.
        strength: maximum change; the three factors are uniform in [max(0, 1 − strength), 1 + strength].

    Returns:
        (N, H, W, C) uint8.
    """
    order, factors = jax.vmap(lambda key: _draw_jitter(key, strength))(keys)
    for position in range(3):
        images = adjust(images, order[:, position], factors[:, position])
    return images


def _draw_jitter(key: Key[Array, ''], strength: float) -> tuple[Int[Array, '3'], Float[Array, '3']]:
    """A random order of the three adjustments, and their factors in this order: (3,) int and (3,) float32."""
    order_key, factor_key = jax.random.split(key)
    factors = jax.random.uniform(factor_key, (3,), minval=max(0.0, 1 - strength), maxval=1 + strength)
    return jax.random.permutation(order_key, 3), factors


def adjust(
    images: UInt8[Array, 'n h w c'], kind: Int[Array, ' n'], factor: Float[Array, ' n']
) -> UInt8[Array, 'n h w c']:
    """One enhancement of Pillow's `ImageEnhance` for each image.

    Args:
        images: (N, H, W, C) uint8.
        kind: (N,) int, each `BRIGHTNESS`, `CONTRAST` or `SATURATION`.
        factor: (N,) float32.

    Returns:
        (N, H, W, C) uint8.
    """
    kind = kind[:, None, None, None]
    start = jnp.where(kind == CONTRAST, pillow_arithmetic.mean_grey(images), pillow_arithmetic.grey(images))
    start = jnp.where(kind == BRIGHTNESS, 0, start)
    return pillow_arithmetic.blend(start, images, factor)


def three_augment(images: UInt8[Array, 'n h w c'], keys: Key[Array, ' n']) -> UInt8[Array, 'n h w c']:
    """Three-augment (DeiT III, arXiv:2204.07118): each image becomes grey, solarised or blurred with probability ⅓.

    Args:
        images: (N, H, W, C) uint8.
        keys: (N,) random keys, one for each image.

    Returns:
        (N, H, W, C) uint8.
    """
    choice, radius = jax.vmap(_draw_three)(keys)
    blurred = apply_to_selected(pillow_arithmetic.gaussian_blur, choice == BLURRED, images, radius)
    choice = choice[:, None, None, None]
    solarized = jnp.where(images < SOLARIZE_THRESHOLD, images, 255 - images)
    changed = jnp.where(choice == GREY, pillow_arithmetic.grey(images), solarized)
    return jnp.where(choice == BLURRED, blurred, changed)


def _draw_three(key: Key[Array, '']) -> tuple[Int[Array, ''], Float[Array, '']]:
    """The choice for one image, `GREY`, `SOLARIZED` or `BLURRED`, and a blur radius in pixels."""
    choice_key, radius_key = jax.random.split(key)
    low, high = BLUR_RADIUS
    return jax.random.randint(choice_key, (), 0, 3), jax.random.uniform(radius_key, minval=low, maxval=high)
