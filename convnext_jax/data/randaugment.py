"""RandAugment (arXiv:1909.13719) as timm has it, on the device: every image of a batch its own operations, by key.

Each operation gives what Pillow's does. All images go through one program, in which what an image did not draw is the
identity: a table of 256 grey levels for each channel, two blends, and three shifts of rows and columns. On accelerators
none of it gathers pixel by pixel, which TPUs do slowly.
"""

import dataclasses
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from convnext_jax.errors import UserError

OPERATIONS = (
    'AutoContrast',
    'Equalize',
    'Invert',
    'Rotate',
    'Posterize',
    'Solarize',
    'SolarizeAdd',
    'Color',
    'Contrast',
    'Brightness',
    'Sharpness',
    'ShearX',
    'ShearY',
    'TranslateX',
    'TranslateY',
)
IDENTITY = len(OPERATIONS)
MOST_DEGREES = 30.0  # of a rotation
EDGE = 4  # pixels that the outermost row or column is repeated: what bicubic taps beyond the side see


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """A policy.

    Attributes:
        magnitude: mean strength, in [0, 10].
        magnitude_std: its standard deviation; what falls outside of [0, 10] is clipped.
        layers: operations drawn for each image, with replacement.
        probability: that a drawn operation is applied.
        increasing: posterize, solarize and the enhancements grow with the magnitude too, as timm's `inc1`.
    """

    magnitude: float = 10.0
    magnitude_std: float = 0.0
    layers: int = 2
    probability: float = 0.5
    increasing: bool = False


def parse_randaugment(text: str) -> RandAugment:
    """timm's syntax, as in 'rand-m9-mstd0.5-inc1': m, mstd, n (layers), p (probability), inc.

    Raises:
        UserError: another syntax, or a value out of its range.
    """
    kind, *parts = text.split('-')
    fields = {'m': 'magnitude', 'mstd': 'magnitude_std', 'n': 'layers', 'p': 'probability', 'inc': 'increasing'}
    values = {}
    for part in parts:
        match = re.fullmatch(r'([a-z]+)(\d+\.?\d*)', part)
        if not match or match[1] not in fields:
            raise UserError(f"augment.randaugment='{text}': '{part}' is none of {', '.join(fields)} with a number")
        values[fields[match[1]]] = float(match[2])
    policy = RandAugment(**values)
    layers = int(policy.layers)
    if kind != 'rand' or policy.magnitude > 10 or policy.probability > 1 or not 1 <= layers == policy.layers:
        raise UserError(f"augment.randaugment='{text}' is not as rand-m9-mstd0.5-inc1: m to 10, n from 1, p to 1")
    return dataclasses.replace(policy, layers=layers, increasing=bool(policy.increasing))


def rand_augment(images: jax.Array, keys: jax.Array, policy: RandAugment, fill: Sequence[int]) -> jax.Array:
    """Draws and applies the operations of each image.

    Args:
        images: (N, H, W, C) uint8, C 1 or 3.
        keys: (N,), one for each image.
        policy: as `parse_randaugment` gives it.
        fill: grey level of each channel, 0 to 255, that comes in at the sides.

    Returns:
        (N, H, W, C) uint8.
    """

    def apply_layer(images: jax.Array, layer: jax.Array) -> tuple[jax.Array, None]:
        layer_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, layer)
        operation, argument = jax.vmap(lambda key: _draw(key, policy))(layer_keys)
        return apply_operations(images, operation, argument, fill), None

    # A loop, not unrolled: otherwise the compiler computes the first layer anew wherever the second reads a pixel.
    return lax.scan(apply_layer, images, jnp.arange(policy.layers))[0]


def apply_operations(images: jax.Array, operation: jax.Array, argument: jax.Array, fill: Sequence[int]) -> jax.Array:
    """One operation on each image: (N, H, W, C) uint8 → the same.

    Args:
        images: (N, H, W, C) uint8, C 1 or 3.
        operation: (N,) int32, index into `OPERATIONS`; `IDENTITY` for none.
        argument: (N,) float32. Rotate: degrees anticlockwise, at most `MOST_DEGREES`; Posterize: bits to keep;
            Solarize: threshold; SolarizeAdd: what is added; the enhancements: factor; shears: tangent; translations:
            share of the side.
        fill: grey level of each channel that comes in at the sides.
    """

    def where(name: str, otherwise: float) -> jax.Array:
        return jnp.where(operation == OPERATIONS.index(name), argument, otherwise)

    images = _look_up(images, _tables(images, operation, argument))
    images = _blend(_grey(images), images, where('Color', 1.0))
    images = _blend(_smooth(images), images, where('Sharpness', 1.0))
    return _move(
        images,
        degrees=where('Rotate', 0.0),
        shear_x=where('ShearX', 0.0),
        shear_y=where('ShearY', 0.0),
        translate_x=where('TranslateX', 0.0),
        translate_y=where('TranslateY', 0.0),
        fill=fill,
    )


def _draw(key: jax.Array, policy: RandAugment) -> tuple[jax.Array, jax.Array]:
    """Operation and argument of one image in one layer."""
    choice_key, apply_key, level_key, sign_key = jax.random.split(key, 4)
    operation = jax.random.randint(choice_key, (), 0, len(OPERATIONS))
    level = policy.magnitude + policy.magnitude_std * jax.random.normal(level_key)
    argument = operation_argument(operation, level, jax.random.bernoulli(sign_key), policy.increasing)
    applied = jax.random.bernoulli(apply_key, policy.probability)
    return jnp.where(applied, operation, IDENTITY), argument


def operation_argument(operation: jax.Array, level: jax.Array, negate: jax.Array, increasing: bool) -> jax.Array:
    """The argument of `apply_operations` at a level from 0 to 10, by timm's rules (`auto_augment.py`)."""
    share = jnp.clip(level, 0, 10) / 10
    signed = jnp.where(negate, -share, share)
    bits, threshold = jnp.floor(share * 4), jnp.floor(share * 256)
    enhancement = 0.1 + 1.8 * share
    if increasing:
        bits, threshold = 4 - bits, 256 - threshold
        enhancement = jnp.maximum(0.1, 1 + 0.9 * signed)
    by_name = {
        'Rotate': MOST_DEGREES * signed,
        'Posterize': bits,
        'Solarize': threshold,
        'SolarizeAdd': jnp.floor(share * 110),
        'Color': enhancement,
        'Contrast': enhancement,
        'Brightness': enhancement,
        'Sharpness': enhancement,
        'ShearX': 0.3 * signed,
        'ShearY': 0.3 * signed,
        'TranslateX': 0.45 * signed,
        'TranslateY': 0.45 * signed,
    }
    return jnp.select([operation == OPERATIONS.index(name) for name in by_name], list(by_name.values()), 0.0)


def _tables(images: jax.Array, operation: jax.Array, argument: jax.Array) -> jax.Array:
    """What each grey level becomes: (N, C, 256) int32."""
    level = jnp.arange(256)[None, None]
    operation, argument = operation[:, None, None], argument[:, None, None]
    threshold = argument.astype(jnp.int32)
    mean = jnp.floor(_grey(images).mean((1, 2, 3), dtype=jnp.float32) + 0.5)[:, None, None]
    step_of_bits = jnp.left_shift(1, jnp.clip(8 - threshold, 0, 8))
    by_name = {
        'AutoContrast': _stretched(images),
        'Equalize': _equalized(images),
        'Invert': 255 - level,
        'Posterize': level // step_of_bits * step_of_bits,
        'Solarize': jnp.where(level < threshold, level, 255 - level),
        'SolarizeAdd': jnp.where(level < 128, jnp.minimum(level + threshold, 255), level),
        'Contrast': _grey_level(mean + argument * (level - mean)),
        'Brightness': _grey_level(argument * level),
    }
    shape = (images.shape[0], images.shape[3], 256)
    return jnp.select(
        [jnp.broadcast_to(operation == OPERATIONS.index(name), shape) for name in by_name],
        [jnp.broadcast_to(table, shape).astype(jnp.int32) for table in by_name.values()],
        jnp.broadcast_to(level, shape),
    )


def _stretched(images: jax.Array) -> jax.Array:
    """`ImageOps.autocontrast`: the darkest level of a channel to 0, its brightest to 255."""
    low, high = (reduce(images, (1, 2)).astype(jnp.float32)[:, :, None] for reduce in (jnp.min, jnp.max))
    scale = 255 / jnp.maximum(high - low, 1)
    level = jnp.arange(256)
    # As the reference: cut off, not rounded; the summand keeps a whole number from falling below itself by rounding.
    return jnp.where(high > low, _grey_level((level - low) * scale + 1e-4), level)


def _equalized(images: jax.Array) -> jax.Array:
    """`ImageOps.equalize`: levels spread so that each share of the range holds the same share of the pixels."""
    counts = _histogram(images)
    level = jnp.arange(256)
    brightest = jnp.where(counts > 0, level, 0).max(-1, keepdims=True)
    of_brightest = jnp.take_along_axis(counts, brightest, -1)
    step = (counts.sum(-1, keepdims=True) - of_brightest) // 255
    below = counts.cumsum(-1) - counts
    return jnp.where(step > 0, jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255), level)


def _histogram(images: jax.Array) -> jax.Array:
    """Pixels of each grey level: (N, H, W, C) uint8 → (N, C, 256) int32."""

    def scatter(images: jax.Array) -> jax.Array:
        pixels = images.reshape(images.shape[0], -1, images.shape[3]).swapaxes(1, 2)
        return jax.vmap(jax.vmap(lambda x: jnp.bincount(x, length=256)))(pixels)

    def compare(images: jax.Array) -> jax.Array:
        return (images[:, :, :, :, None] == jnp.arange(256, dtype=jnp.uint8)).sum((1, 2), dtype=jnp.int32)

    return lax.platform_dependent(images, cpu=scatter, default=compare)


def _look_up(images: jax.Array, tables: jax.Array) -> jax.Array:
    """(N, H, W, C) uint8 and (N, C, 256) → (N, H, W, C) uint8."""

    def gather(images: jax.Array, tables: jax.Array) -> jax.Array:
        pixels = images.reshape(images.shape[0], -1, images.shape[3]).swapaxes(1, 2)
        return jnp.take_along_axis(tables, pixels.astype(jnp.int32), -1).swapaxes(1, 2).reshape(images.shape)

    def compare(images: jax.Array, tables: jax.Array) -> jax.Array:
        hits = images[:, :, :, :, None] == jnp.arange(256, dtype=jnp.uint8)
        return jnp.where(hits, tables[:, None, None], 0).sum(-1)

    return lax.platform_dependent(images, tables, cpu=gather, default=compare).astype(jnp.uint8)


def _grey(images: jax.Array) -> jax.Array:
    """Pillow's mode L of RGB: (N, H, W, C) uint8 → (N, H, W, 1) int32."""
    wide = images.astype(jnp.int32)
    if images.shape[3] == 1:
        return wide
    return ((wide * jnp.array([19595, 38470, 7471])).sum(-1, keepdims=True) + 2**15) >> 16


def _smooth(images: jax.Array) -> jax.Array:
    """Pillow's filter SMOOTH: a 3×3 mean whose middle counts five times; the outermost pixels stay."""
    wide = images.astype(jnp.int32)
    height, width = images.shape[1:3]
    total = 4 * wide[:, 1:-1, 1:-1]
    for row in range(3):
        for column in range(3):
            total += wide[:, row : row + height - 2, column : column + width - 2]
    return wide.at[:, 1:-1, 1:-1].set((2 * total + 13) // 26)


def _blend(degenerate: jax.Array, images: jax.Array, factor: jax.Array) -> jax.Array:
    """Pillow's `Image.blend`: 0 gives the degenerate image, 1 the image, beyond 1 it goes on in that direction."""
    start = degenerate.astype(jnp.float32)
    mixed = start + factor[:, None, None, None] * (images.astype(jnp.float32) - start)
    return _grey_level(mixed).astype(jnp.uint8)


def _grey_level(value: jax.Array) -> jax.Array:
    """Cut off to a whole level from 0 to 255, as Pillow does."""
    return jnp.floor(jnp.clip(value, 0, 255)).astype(jnp.int32)


def _move(
    images: jax.Array,
    *,
    degrees: jax.Array,
    shear_x: jax.Array,
    shear_y: jax.Array,
    translate_x: jax.Array,
    translate_y: jax.Array,
    fill: Sequence[int],
) -> jax.Array:
    """Rotations, shears and translations, bicubic; what lies outside of the image is `fill`.

    A rotation is three shears, of rows, columns and rows (Paeth, Graphics Interface 1986): so all five are shifts of
    whole rows and columns. A shear or translation has one of them and equals Pillow's; a rotation is resampled three
    times in place of once.
    """
    height, width = images.shape[1:3]
    angle = jnp.deg2rad(-degrees)
    tangent, sine = jnp.tan(angle / 2), jnp.sin(angle)
    turned = degrees != 0
    x, y = jnp.arange(width) + 0.5, jnp.arange(height) + 0.5
    margin = int(np.ceil(np.tan(np.deg2rad(MOST_DEGREES / 2)) * height / 2)) + 4
    wide_x = jnp.arange(-margin, width + margin) + 0.5

    about_middle = tangent[:, None] * (y - height / 2)
    rows = shear_x[:, None] * y + translate_x[:, None] * width + about_middle
    columns = shear_y[:, None] * wide_x + translate_y[:, None] * height - sine[:, None] * (wide_x - width / 2)

    padded = jnp.pad(images, ((0, 0), (0, 0), (margin, margin), (0, 0)), mode='edge')
    moved = _shift(padded, rows, turned)
    moved = _shift(moved.swapaxes(1, 2), columns, turned).swapaxes(1, 2)
    moved = _shift(moved, about_middle, jnp.zeros_like(turned))[:, :, margin:-margin]

    # Where each pixel comes from, by the one affine map.
    cosine = jnp.cos(angle)[:, None, None]
    sine, x, y = sine[:, None, None], x[None, None], y[None, :, None]
    from_x = width / 2 + cosine * (x - width / 2) + sine * (y - height / 2)
    from_y = height / 2 - sine * (x - width / 2) + cosine * (y - height / 2)
    from_x += shear_x[:, None, None] * y + translate_x[:, None, None] * width
    from_y += shear_y[:, None, None] * x + translate_y[:, None, None] * height
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    return jnp.where(inside[..., None], moved, jnp.asarray(fill, jnp.uint8))


def _shift(images: jax.Array, shift: jax.Array, rounds: jax.Array) -> jax.Array:
    """Moves row y of each image by `shift[:, y]` pixels to the left, bicubic (a = −1, as Pillow's transforms).

    The whole pixels of the shift go by powers of two: rows that have the power in their shift take the rolled image.

    Args:
        images: (N, H, W, C) uint8.
        shift: (N, H).
        rounds: (N,), whether to round to the nearest level or to cut off, as Pillow does at the end.
    """
    width = images.shape[2]
    padded = jnp.pad(images, ((0, 0), (0, 0), (EDGE, EDGE), (0, 0)), mode='edge')
    whole = jnp.floor(shift)
    steps = jnp.mod(whole.astype(jnp.int32), width + 2 * EDGE)
    for bit in range((width + 2 * EDGE - 1).bit_length()):
        rolled = jnp.roll(padded, -(2**bit), axis=2)
        padded = jnp.where(((steps >> bit) & 1).astype(bool)[:, :, None, None], rolled, padded)
    taps = range(EDGE - 1, EDGE + 3)
    a, b, c, d = (padded[:, :, tap : tap + width].astype(jnp.float32) for tap in taps)
    t = (shift - whole)[:, :, None, None]
    value = b + t * (c - a + t * (2 * (a - b) + c - d + t * (b - a + d - c)))
    return _grey_level(value + jnp.where(rounds, 0.5, 0.0)[:, None, None, None]).astype(jnp.uint8)
