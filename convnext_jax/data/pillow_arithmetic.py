"""What Pillow does to the pixels of an image, on a batch: each image by its own numbers."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

LARGEST_BLUR = 2.0  # the largest radius of `gaussian_blur`
BLUR_REACH = 2  # pixels to each side that one of its box blurs sees at that radius


def grey(images: jax.Array) -> jax.Array:
    """Mode L of RGB: (N, H, W, C) uint8 → (N, H, W, 1) uint8."""
    if images.shape[3] == 1:
        return images
    weighted = images.astype(jnp.int32) * jnp.array([19595, 38470, 7471])
    return ((weighted.sum(-1, keepdims=True) + 2**15) >> 16).astype(jnp.uint8)


def mean_grey(images: jax.Array) -> jax.Array:
    """The level that `ImageEnhance.Contrast` starts from: (N, H, W, C) uint8 → (N, 1, 1, 1) uint8."""
    return jnp.floor(grey(images).mean((1, 2, 3), dtype=jnp.float32, keepdims=True) + 0.5).astype(jnp.uint8)


def blend(start: jax.Array, images: jax.Array, factor: jax.Array) -> jax.Array:
    """`Image.blend`: factor 0 gives the start, 1 the image, beyond 1 it goes on in that direction; (N,) factors."""
    start = start.astype(jnp.float32)
    mixed = start + factor[:, None, None, None] * (images.astype(jnp.float32) - start)
    return grey_level(mixed).astype(jnp.uint8)


def grey_level(value: jax.Array) -> jax.Array:
    """Cut off to a whole level from 0 to 255."""
    return jnp.floor(jnp.clip(value, 0, 255)).astype(jnp.int32)


def smooth(images: jax.Array) -> jax.Array:
    """The filter SMOOTH, a 3×3 mean whose middle counts five times; the outermost pixels stay: uint8 → uint8."""
    wide = images.astype(jnp.float32)
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * wide[:, 1:-1, 1:-1]
    return images.at[:, 1:-1, 1:-1].set(grey_level(total / 13 + 0.5).astype(jnp.uint8))


def gaussian_blur(images: jax.Array, radius: jax.Array) -> jax.Array:
    """`ImageFilter.GaussianBlur`: three box blurs along each axis (Gwosdek et al., SSVM 2011), rounded after each.

    In Pillow's whole numbers (`BoxBlur.c`): many sums lie halfway between two levels.

    Args:
        images: (N, H, W, C) uint8.
        radius: (N,), in (0, `LARGEST_BLUR`].
    """
    variance = radius[:, None] ** 2 / 3
    whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)  # pixels to each side that count fully
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))  # share of next
    distance = jnp.abs(jnp.arange(-BLUR_REACH, BLUR_REACH + 1))
    inner = jnp.floor(2**24 / (2 * (whole + edge) + 1))
    outer = jnp.floor((2**24 - (2 * whole + 1) * inner) / 2)
    weights = jnp.select([distance <= whole, distance == whole + 1], [inner, outer], 0).astype(jnp.uint32)
    for _ in range(3):
        images = _weighted(images, weights)
    images = images.swapaxes(1, 2)
    for _ in range(3):
        images = _weighted(images, weights)
    return images.swapaxes(1, 2)


def _weighted(images: jax.Array, weights: jax.Array) -> jax.Array:
    """Neighbours along rows by `weights`, (N, taps), of 2²⁴; beyond the sides the outermost pixel goes on."""
    width, taps = images.shape[2], weights.shape[1]
    padded = jnp.pad(images, ((0, 0), (0, 0), (taps // 2, taps // 2), (0, 0)), mode='edge').astype(jnp.uint32)
    terms = (weights[:, tap, None, None, None] * padded[:, :, tap : tap + width] for tap in range(taps))
    return ((functools.reduce(jnp.add, terms) + 2**23) >> 24).astype(jnp.uint8)


def stretched(counts: jax.Array) -> jax.Array:
    """`ImageOps.autocontrast`: the darkest level to 0, the brightest to 255. (…, 256) counts of levels → a table."""
    level = jnp.arange(256)
    low = jnp.where(counts > 0, level, 255).min(-1, keepdims=True)
    high = jnp.where(counts > 0, level, 0).max(-1, keepdims=True)
    scale = 255 / jnp.maximum(high - low, 1)
    # As the reference: cut off, not rounded; the summand keeps a whole number from falling below itself by rounding.
    return jnp.where(high > low, grey_level((level - low) * scale + 1e-4), level)


def equalized(counts: jax.Array) -> jax.Array:
    """`ImageOps.equalize`: each share of the range gets the same share of the pixels. (…, 256) counts → a table."""
    level = jnp.arange(256)
    brightest = jnp.where(counts > 0, level, 0).max(-1, keepdims=True)
    of_brightest = jnp.take_along_axis(counts, brightest, -1)
    step = (counts.sum(-1, keepdims=True) - of_brightest) // 255
    below = counts.cumsum(-1) - counts
    return jnp.where(step > 0, jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255), level)


def histogram(images: jax.Array) -> jax.Array:
    """Pixels of each grey level: (N, H, W, C) uint8 → (N, C, 256) int32.

    Accelerators count pairs of the level's two halves of four bits, by a matrix product of ones and zeros.
    """

    def scatter(images: jax.Array) -> jax.Array:
        pixels = images.reshape(images.shape[0], -1, images.shape[3]).swapaxes(1, 2)
        return jax.vmap(jax.vmap(lambda x: jnp.bincount(x, length=256)))(pixels)

    def product(images: jax.Array) -> jax.Array:
        upper, lower = (jax.nn.one_hot(half, 16, dtype=jnp.bfloat16) for half in (images // 16, images % 16))
        counts = jnp.einsum('nhwci,nhwcj->ncij', upper, lower, preferred_element_type=jnp.float32)
        return counts.reshape(*counts.shape[:2], 256).astype(jnp.int32)

    return lax.platform_dependent(images, cpu=scatter, default=product)


def look_up(images: jax.Array, tables: jax.Array) -> jax.Array:
    """(N, H, W, C) uint8 and (N, C, 256) → (N, H, W, C) uint8.

    Accelerators fetch eight neighbouring entries by a matrix product with the level's upper bits, and one of them by
    its lower three. bfloat16 holds every whole number up to 256.
    """

    def gather(images: jax.Array, tables: jax.Array) -> jax.Array:
        pixels = images.reshape(images.shape[0], -1, images.shape[3]).swapaxes(1, 2)
        return jnp.take_along_axis(tables, pixels.astype(jnp.int32), -1).swapaxes(1, 2).reshape(images.shape)

    def product(images: jax.Array, tables: jax.Array) -> jax.Array:
        upper, lower = (jax.nn.one_hot(*part, dtype=jnp.bfloat16) for part in ((images // 8, 32), (images % 8, 8)))
        entries = tables.reshape(*tables.shape[:2], 32, 8).astype(jnp.bfloat16)
        return (jnp.einsum('nhwci,ncij->nhwcj', upper, entries) * lower).sum(-1).astype(jnp.uint8)

    return lax.platform_dependent(images, tables.astype(jnp.uint8), cpu=gather, default=product)
