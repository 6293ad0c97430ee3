"""Pillow's operations on pixel values for a batch of images, with separate arguments for each image."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt, UInt8

MAX_BLUR_RADIUS = 2.0  # largest radius of `gaussian_blur`, in pixels
BLUR_REACH = 2  # pixels on each side that one box blur of this radius reads


def grey(images: UInt8[Array, 'n h w c']) -> UInt8[Array, 'n h w 1']:
    """Conversion of RGB to greyscale, Pillow's mode L: (N, H, W, C) uint8 → (N, H, W, 1) uint8."""
    if images.shape[3] == 1:
        return images
    weighted = images.astype(jnp.int32) * jnp.array([19595, 38470, 7471])
    return ((weighted.sum(-1, keepdims=True) + 2**15) >> 16).astype(jnp.uint8)


def mean_grey(images: UInt8[Array, 'n h w c']) -> UInt8[Array, 'n 1 1 1']:
    """The rounded mean grey value, as in `ImageEnhance.Contrast`: (N, H, W, C) uint8 → (N, 1, 1, 1) uint8."""
    return jnp.floor(grey(images).mean((1, 2, 3), dtype=jnp.float32, keepdims=True) + 0.5).astype(jnp.uint8)


def blend(
    start: UInt8[Array, 'n _ _ _'], images: UInt8[Array, 'n h w c'], factor: Float[Array, ' n']
) -> UInt8[Array, 'n h w c']:
    """`Image.blend`: start + factor · (images − start), clipped.

    Args:
        start: uint8 that broadcasts to the shape of the images.
        images: (N, H, W, C) uint8.
        factor: (N,) float32; 0 gives `start`, 1 the images, more than 1 extrapolates.

    Returns:
        (N, H, W, C) uint8.
    """
    start = start.astype(jnp.float32)
    mixed = start + factor[:, None, None, None] * (images.astype(jnp.float32) - start)
    return clip_and_floor(mixed).astype(jnp.uint8)


def clip_and_floor(value: Float[Array, '*shape']) -> Int[Array, '*shape']:
    """Values clipped to [0, 255] and rounded down: any shape, float → int32."""
    return jnp.floor(jnp.clip(value, 0, 255)).astype(jnp.int32)


def smooth(images: UInt8[Array, 'n h w c']) -> UInt8[Array, 'n h w c']:
    """`ImageFilter.SMOOTH`, a 3×3 mean with weight 5 at the centre: (N, H, W, C) uint8 → uint8.

    The outermost pixels are unchanged.
    """
    wide = images.astype(jnp.float32)
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * wide[:, 1:-1, 1:-1]
    return images.at[:, 1:-1, 1:-1].set(clip_and_floor(total / 13 + 0.5).astype(jnp.uint8))


def gaussian_blur(images: UInt8[Array, 'n h w c'], radius: Float[Array, ' n']) -> UInt8[Array, 'n h w c']:
    """`ImageFilter.GaussianBlur`: three box blurs along each axis (Gwosdek et al., SSVM 2011), rounded after each.

    It uses Pillow's integer arithmetic (`BoxBlur.c`), because many sums lie halfway between two pixel values.

    Args:
        images: (N, H, W, C) uint8.
        radius: (N,) float32, in (0, `MAX_BLUR_RADIUS`] pixels.

    Returns:
        (N, H, W, C) uint8.
    """
    variance = radius[:, None] ** 2 / 3
    full = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)  # pixels on each side with full weight
    edge = (
        (2 * full + 1) * (full * (full + 1) - 3 * variance) / (6 * (variance - (full + 1) ** 2))
    )  # weight of the next pixel on each side
    distance = jnp.abs(jnp.arange(-BLUR_REACH, BLUR_REACH + 1))
    inner = jnp.floor(2**24 / (2 * (full + edge) + 1))
    outer = jnp.floor((2**24 - (2 * full + 1) * inner) / 2)
    weights = jnp.select([distance <= full, distance == full + 1], [inner, outer], 0).astype(jnp.uint32)
    for _ in range(3):
        images = _weighted(images, weights)
    images = images.swapaxes(1, 2)
    for _ in range(3):
        images = _weighted(images, weights)
    return images.swapaxes(1, 2)


def _weighted(images: UInt8[Array, 'n h w c'], weights: UInt[Array, 'n taps']) -> UInt8[Array, 'n h w c']:
    """The weighted sum of the neighbours along W; `weights` are (N, taps) in units of 2⁻²⁴; borders are replicated."""
    width, taps = images.shape[2], weights.shape[1]
    padded = jnp.pad(images, ((0, 0), (0, 0), (taps // 2, taps // 2), (0, 0)), mode='edge').astype(jnp.uint32)
    terms = (weights[:, tap, None, None, None] * padded[:, :, tap : tap + width] for tap in range(taps))
    return ((functools.reduce(jnp.add, terms) + 2**23) >> 24).astype(jnp.uint8)


def autocontrast_table(counts: Int[Array, '*batch 256']) -> Int[Array, '*batch 256']:
    """The look-up table of `ImageOps.autocontrast`, which maps the darkest value to 0 and the brightest to 255.

    Args:
        counts: (…, 256) int32, the histogram.

    Returns:
        (…, 256) int32.
    """
    level = jnp.arange(256)
    low = jnp.where(counts > 0, level, 255).min(-1, keepdims=True)
    high = jnp.where(counts > 0, level, 0).max(-1, keepdims=True)
    scale = 255 / jnp.maximum(high - low, 1)
    # Fractions are truncated, as in Pillow. 1e-4 is added because rounding errors may make an integer slightly smaller.
    return jnp.where(high > low, clip_and_floor((level - low) * scale + 1e-4), level)


def equalize_table(counts: Int[Array, '*batch 256']) -> Int[Array, '*batch 256']:
    """The look-up table of `ImageOps.equalize`, which makes the histogram as uniform as possible.

    Args:
        counts: (…, 256) int32, the histogram.

    Returns:
        (…, 256) int32.
    """
    level = jnp.arange(256)
    brightest = jnp.where(counts > 0, level, 0).max(-1, keepdims=True)
    brightest_count = jnp.take_along_axis(counts, brightest, -1)
    step = (counts.sum(-1, keepdims=True) - brightest_count) // 255
    below = counts.cumsum(-1) - counts
    return jnp.where(step > 0, jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255), level)


def histogram(images: UInt8[Array, 'n h w c']) -> Int[Array, 'n c 256']:
    """The number of pixels with each value: (N, H, W, C) uint8 → (N, C, 256) int32.

    On accelerators it is a matrix product of one-hot vectors of the upper and the lower four bits.
    """

    def scatter(images: jax.Array) -> jax.Array:
        pixels = images.reshape(images.shape[0], -1, images.shape[3]).swapaxes(1, 2)
        return jax.vmap(jax.vmap(lambda x: jnp.bincount(x, length=256)))(pixels)

    def product(images: jax.Array) -> jax.Array:
        upper, lower = (jax.nn.one_hot(half, 16, dtype=jnp.bfloat16) for half in (images // 16, images % 16))
        counts = jnp.einsum('nhwci,nhwcj->ncij', upper, lower, preferred_element_type=jnp.float32)
        return counts.reshape(*counts.shape[:2], 256).astype(jnp.int32)

    return lax.platform_dependent(images, cpu=scatter, default=product)


def look_up(images: UInt8[Array, 'n h w c'], tables: Int[Array, 'n c 256']) -> UInt8[Array, 'n h w c']:
    """Each pixel value replaced by its entry in a table.

    On CPU and NVIDIA GPUs this is a gather. Elsewhere a matrix product selects eight neighbouring entries by the upper
    five bits of the value, and a product with a one-hot vector of the lower three bits selects one of them. bfloat16
    represents all integers up to 256 exactly.

    Args:
        images: (N, H, W, C) uint8.
        tables: (N, C, 256) int, with entries from 0 to 255.

    Returns:
        (N, H, W, C) uint8.
    """

    def gather(images: jax.Array, tables: jax.Array) -> jax.Array:
        pixels = images.reshape(images.shape[0], -1, images.shape[3]).swapaxes(1, 2)
        return jnp.take_along_axis(tables, pixels.astype(jnp.int32), -1).swapaxes(1, 2).reshape(images.shape)

    def product(images: jax.Array, tables: jax.Array) -> jax.Array:
        upper, lower = (jax.nn.one_hot(*part, dtype=jnp.bfloat16) for part in ((images // 8, 32), (images % 8, 8)))
        entries = tables.reshape(*tables.shape[:2], 32, 8).astype(jnp.bfloat16)
        return (jnp.einsum('nhwci,ncij->nhwcj', upper, entries) * lower).sum(-1).astype(jnp.uint8)

    return lax.platform_dependent(images, tables.astype(jnp.uint8), cpu=gather, cuda=gather, default=product)
