"""Colour jitter and three-augment on the device: every image of a batch by its own key, as Pillow does it."""

import jax
import jax.numpy as jnp

from convnext_jax.data import pillow_arithmetic

BRIGHTNESS, CONTRAST, SATURATION = range(3)
GREY, SOLARIZED, BLURRED = range(3)
SOLARIZE_THRESHOLD = 128
BLUR_RADIUS = (0.1, pillow_arithmetic.LARGEST_BLUR)  # as DeiT (`augment.py`) and timm's policy '3a' draw it


def jitter_colors(images: jax.Array, keys: jax.Array, strength: float) -> jax.Array:
    """Brightness, contrast and saturation, each by a factor of its own, one after the other in any order.

    Args:
        images: (N, H, W, C) uint8.
        keys: (N,), one for each image.
        strength: the factors are uniform in [1 − strength, 1 + strength], from 0 on (torchvision's ColorJitter).

    Returns:
        (N, H, W, C) uint8.
    """
    order, factors = jax.vmap(lambda key: _draw_jitter(key, strength))(keys)
    for place in range(3):
        images = adjust(images, order[:, place], factors[:, place])
    return images


def _draw_jitter(key: jax.Array, strength: float) -> tuple[jax.Array, jax.Array]:
    """The three kinds in an image's own order, and the factors in that order."""
    order_key, factor_key = jax.random.split(key)
    factors = jax.random.uniform(factor_key, (3,), minval=max(0.0, 1 - strength), maxval=1 + strength)
    return jax.random.permutation(order_key, 3), factors


def adjust(images: jax.Array, kind: jax.Array, factor: jax.Array) -> jax.Array:
    """`ImageEnhance` of each image: its `kind`, one of the three, by its `factor`. (N, H, W, C) uint8, (N,), (N,)."""
    kind = kind[:, None, None, None]
    start = jnp.where(kind == CONTRAST, pillow_arithmetic.mean_grey(images), pillow_arithmetic.grey(images))
    start = jnp.where(kind == BRIGHTNESS, 0, start)
    return pillow_arithmetic.blend(start, images, factor)


def three_augment(images: jax.Array, keys: jax.Array) -> jax.Array:
    """One of three for each image, by even odds: grey, solarized or blurred (DeiT III, arXiv:2204.07118).

    Args:
        images: (N, H, W, C) uint8.
        keys: (N,), one for each image.

    Returns:
        (N, H, W, C) uint8.
    """
    choice, radius = jax.vmap(_draw_three)(keys)
    choice = choice[:, None, None, None]
    solarized = jnp.where(images < SOLARIZE_THRESHOLD, images, 255 - images)
    changed = jnp.where(choice == GREY, pillow_arithmetic.grey(images), solarized)
    return jnp.where(choice == BLURRED, pillow_arithmetic.gaussian_blur(images, radius), changed)


def _draw_three(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which of the three an image takes, and the radius if it is the blur."""
    choice_key, radius_key = jax.random.split(key)
    low, high = BLUR_RADIUS
    return jax.random.randint(choice_key, (), 0, 3), jax.random.uniform(radius_key, minval=low, maxval=high)
