"""Data augmentation and normalisation on the device.

Each image has its own random key, so that its augmentation depends neither on the sharding nor on the other images.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Num

from convnext_jax.data.color import jitter_colors, three_augment
from convnext_jax.data.randaugment import parse_randaugment, rand_augment
from convnext_jax.data.selection import apply_to_selected
from convnext_jax.errors import UserError

ERASED_AREA = (0.02, 1 / 3)  # fraction of the image; area and aspect ratio as in arXiv:1708.04896 and timm
ERASED_ASPECT = (0.3, 1 / 0.3)
ERASING_TRIES = 10


def augment(
    images: Num[Array, 'n h w c'],
    keys: Key[Array, ' n'],
    *,
    flip: bool,
    crop_padding: int,
    policy: str,
    color_jitter: float,
    erasing: float,
    erasing_mode: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Array, 'n h w c']:
    """Augmented and normalised training images.

    Args:
        images: (N, H, W, C), as for `normalize`. `policy` and `color_jitter` need uint8.
        keys: (N,) random keys, one for each image.
        flip, crop_padding, policy, color_jitter, erasing, erasing_mode: the fields of the config's `augment` section.
        mean, std: mean and standard deviation of each channel, as for `normalize`.

    Returns:
        (N, H, W, C) float32, normalised.

    Raises:
        UserError: `policy` or `erasing_mode` is invalid.
    """
    flip_keys, crop_keys, policy_keys, color_keys, erasing_keys = jnp.unstack(
        jax.vmap(lambda key: jax.random.split(key, 5))(keys), axis=1
    )
    if crop_padding:
        images = random_crop(images, crop_keys, crop_padding)
    if flip:
        images = random_flip(images, flip_keys)
    if policy == '3a':
        images = three_augment(images, policy_keys)
    elif policy:
        fill = [round(255 * value) for value in mean]
        images = rand_augment(images, policy_keys, parse_randaugment(policy), fill)
    if color_jitter:
        images = jitter_colors(images, color_keys, color_jitter)
    images = normalize(images, mean, std)
    if erasing:
        images = random_erasing(images, erasing_keys, erasing, erasing_mode)
    return images


def normalize(images: Num[Array, 'n h w c'], mean: Sequence[float], std: Sequence[float]) -> Float[Array, 'n h w c']:
    """(images − mean) / std as float32, with mean and std of each channel. uint8 images are first divided by 255."""
    scale = 255 if images.dtype == jnp.uint8 else 1
    return (images.astype(jnp.float32) / scale - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def random_flip(images: Num[Array, 'n h w c'], keys: Key[Array, ' n']) -> Num[Array, 'n h w c']:
    """The images, (N, H, W, C), each mirrored left to right with probability ½; `keys` are (N,) random keys."""
    mirrored = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def random_crop(images: Num[Array, 'n h w c'], keys: Key[Array, ' n'], padding: int) -> Num[Array, 'n h w c']:
    """A random crop of each image after zero padding: (N, H, W, C) → (N, H, W, C).

    Args:
        images: (N, H, W, C).
        keys: (N,) random keys, one for each image.
        padding: rows or columns of zeros that are added at each side.
    """

    def crop(image: jax.Array, key: jax.Array) -> jax.Array:
        padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)

    return jax.vmap(crop)(images, keys)


def random_erasing(
    images: Float[Array, 'n h w c'], keys: Key[Array, ' n'], probability: float, mode: str
) -> Float[Array, 'n h w c']:
    """Random erasing (arXiv:1708.04896): overwrites a random rectangle of an image.

    Args:
        images: (N, H, W, C) float32, normalised.
        keys: (N,) random keys, one for each image.
        probability: probability with which an image is changed.
        mode: the new values: 'pixel' draws each value from N(0, 1), 'rand' draws one value per channel, 'const' is 0.

    Returns:
        (N, H, W, C) float32.

    Raises:
        UserError: an unknown mode.
    """
    if mode not in ('pixel', 'rand', 'const'):
        raise UserError(f"augment.erasing_mode must be 'pixel', 'rand' or 'const', not '{mode}'")
    height, width, channels = images.shape[1:]

    def erase(image: jax.Array, box_key: jax.Array, noise_key: jax.Array) -> jax.Array:
        inside = _erased_box(box_key, height, width)
        shape = {'pixel': image.shape, 'rand': (1, 1, channels), 'const': (1, 1, 1)}[mode]
        noise = jnp.zeros(shape) if mode == 'const' else jax.random.normal(noise_key, shape)
        return jnp.where(inside[:, :, None], noise, image)

    erased_keys, box_keys, noise_keys = jax.vmap(jax.random.split, (0, None), 1)(keys, 3)
    selected = jax.vmap(jax.random.bernoulli, (0, None))(erased_keys, probability)
    return apply_to_selected(jax.vmap(erase), selected, images, box_keys, noise_keys)


def _erased_box(key: Key[Array, ''], height: int, width: int) -> Bool[Array, '{height} {width}']:
    """The mask, (H, W) bool, of the first of ten random rectangles that fits; all False if none fits."""
    area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
    area = height * width * jax.random.uniform(area_key, (ERASING_TRIES,), minval=ERASED_AREA[0], maxval=ERASED_AREA[1])
    low, high = jnp.log(jnp.asarray(ERASED_ASPECT))
    aspect = jnp.exp(jax.random.uniform(aspect_key, (ERASING_TRIES,), minval=low, maxval=high))
    tall, wide = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (tall < height) & (wide < width)
    first = jnp.argmax(fits)
    tall, wide = jnp.where(fits.any(), tall[first], 0), jnp.where(fits.any(), wide[first], 0)
    top = jnp.floor(jax.random.uniform(top_key) * (height - tall + 1))
    left = jnp.floor(jax.random.uniform(left_key) * (width - wide + 1))
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None]
    return (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)
