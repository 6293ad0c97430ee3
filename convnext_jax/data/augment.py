"""Pixels → the model's input, on the device: random changes by key, then normalising.

Each image draws from its own key, so that what it draws depends neither on the sharding nor on the rest of the batch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def augment(
    images: jax.Array, keys: jax.Array, *, flip: bool, crop_padding: int, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
    """Training images: (N, H, W, C) uint8 and (N,) keys → (N, H, W, C) float32, normalised."""
    flip_keys, crop_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
    if crop_padding:
        images = random_crop(images, crop_keys, crop_padding)
    if flip:
        images = random_flip(images, flip_keys)
    return normalize(images, mean, std)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """(pixels / 255 − mean) / std, one mean and std for each channel: (N, H, W, C) uint8 → float32."""
    return (images.astype(jnp.float32) / 255 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def random_flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability ½."""
    mirrored = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def random_crop(images: jax.Array, keys: jax.Array, padding: int) -> jax.Array:
    """Shifts each image by up to `padding` pixels along each axis; zeros come in at the sides."""

    def crop(image: jax.Array, key: jax.Array) -> jax.Array:
        padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)

    return jax.vmap(crop)(images, keys)
