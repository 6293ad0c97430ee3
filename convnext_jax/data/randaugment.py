"""RandAugment (arXiv:1909.13719) in timm's version, on the device, with random operations for each image.

The results equal Pillow's, except for rotations (see `geometry`). Three parts compute all operations: a look-up table
of 256 entries for each channel, a blend, and three shifts of rows and columns. Each part runs on the images whose
operation needs it. On TPUs no part gathers pixels, because that is slow there.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from convnext_jax.data import pillow_arithmetic
from convnext_jax.data.geometry import MAX_DEGREES, MAX_SHEAR, MAX_TRANSLATION, move
from convnext_jax.data.selection import apply_to_selected
from convnext_jax.errors import UserError

OPERATIONS = (  # the order determines which operation is drawn
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
TABLES = ('AutoContrast', 'Equalize', 'Invert', 'Posterize', 'Solarize', 'SolarizeAdd')
ENHANCEMENTS = ('Color', 'Contrast', 'Brightness', 'Sharpness')
MOVEMENTS = ('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY')


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """A policy.

    Attributes:
        magnitude: mean magnitude, in [0, 10].
        magnitude_std: standard deviation of the magnitude, which is clipped to [0, 10].
        layers: number of operations drawn for each image, with replacement.
        probability: probability with which a drawn operation is applied.
        increasing: whether posterize, solarize and the enhancements also become stronger with the magnitude, as in
            timm's `inc1`.
    """

    magnitude: float = 10.0
    magnitude_std: float = 0.0
    layers: int = 2
    probability: float = 0.5
    increasing: bool = False


def parse_randaugment(text: str) -> RandAugment:
    """The policy that a text in timm's syntax describes.

    Args:
        text: 'rand' with m (magnitude), mstd, n (layers), p (probability) or inc, such as 'rand-m9-mstd0.5-inc1'.

    Raises:
        UserError: a syntax error, or a value out of its range.
    """
    kind, *parts = text.split('-')
    fields = {'m': 'magnitude', 'mstd': 'magnitude_std', 'n': 'layers', 'p': 'probability', 'inc': 'increasing'}
    values: dict[str, Any] = {}
    for part in parts:
        match = re.fullmatch(r'([a-z]+)(\d+\.?\d*)', part)
        if not match or match[1] not in fields:
            raise UserError(f"augment.policy='{text}': '{part}' is not one of {', '.join(fields)} with a number")
        values[fields[match[1]]] = float(match[2])
    layers, increasing = values.pop('layers', 2), values.pop('increasing', 0)
    policy = RandAugment(**values, layers=int(layers), increasing=bool(increasing))
    if kind != 'rand' or policy.magnitude > 10 or policy.probability > 1 or not 1 <= policy.layers == layers:
        raise UserError(
            f"augment.policy='{text}' must be '3a' or like 'rand-m9-mstd0.5-inc1', with m ≤ 10, n an integer ≥ 1, p ≤ 1"
        )
    return policy


def rand_augment(
    images: UInt8[Array, 'n h w c'], keys: Key[Array, ' n'], policy: RandAugment, fill: Sequence[int]
) -> UInt8[Array, 'n h w c']:
    """Images after random operations of the policy.

    Args:
        images: (N, H, W, C) uint8, C 1 or 3.
        keys: (N,) random keys, one for each image.
        policy: the policy, as from `parse_randaugment`.
        fill: value, 0 to 255, of each channel for pixels from outside the image.

    Returns:
        (N, H, W, C) uint8.
    """

    def draw(layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(lambda key: _draw(jax.random.fold_in(key, layer), policy))(keys)

    def apply(images: jax.Array, drawn: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return apply_operations(images, *drawn, fill), None

    # A scan, with all random draws before it: in an unrolled loop the CPU compiler would recompute the first layer for
    # every pixel that the second layer reads, and the draws for every pixel.
    return lax.scan(apply, images, jax.vmap(draw)(jnp.arange(policy.layers)))[0]


def apply_operations(
    images: UInt8[Array, 'n h w c'], operation: Int[Array, ' n'], argument: Float[Array, ' n'], fill: Sequence[int]
) -> UInt8[Array, 'n h w c']:
    """One operation on each image.

    Args:
        images: (N, H, W, C) uint8, C 1 or 3.
        operation: (N,) int32, index into `OPERATIONS`, or `IDENTITY`.
        argument: (N,) float32. Rotate: degrees anticlockwise; Posterize: bits to keep; Solarize: threshold;
            SolarizeAdd: summand; enhancements: factor; shears: tangent; translations: fraction of the side.
        fill: value, 0 to 255, of each channel for pixels from outside the image.

    Returns:
        (N, H, W, C) uint8.
    """

    for function, names in (
        (_look_up, TABLES),
        (_enhance, ENHANCEMENTS),
        (functools.partial(_move, fill=fill), MOVEMENTS),
    ):
        selected = jnp.isin(operation, jnp.asarray([OPERATIONS.index(name) for name in names]))
        images = apply_to_selected(function, selected, images, operation, argument)
    return images


def _draw(key: Key[Array, ''], policy: RandAugment) -> tuple[Int[Array, ''], Float[Array, '']]:
    """A random operation and its argument, for one image and layer."""
    choice_key, apply_key, level_key, sign_key = jax.random.split(key, 4)
    operation = jax.random.randint(choice_key, (), 0, len(OPERATIONS))
    level = policy.magnitude + policy.magnitude_std * jax.random.normal(level_key)
    argument = operation_argument(operation, level, jax.random.bernoulli(sign_key), policy.increasing)
    applied = jax.random.bernoulli(apply_key, policy.probability)
    return jnp.where(applied, operation, IDENTITY), argument


def operation_argument(
    operation: Int[Array, ''], level: Float[Array, ''], negate: Bool[Array, ''], increasing: bool
) -> Float[Array, '']:
    """The argument of an operation for `apply_operations`, by the rules of timm's `auto_augment.py`.

    Args:
        operation: () int32, index into `OPERATIONS`.
        level: () float32, magnitude, clipped to [0, 10].
        negate: () bool, whether operations with a sign get a negative argument.
        increasing: as in `RandAugment`.

    Returns:
        () float32.
    """
    fraction = jnp.clip(level, 0, 10) / 10
    signed = jnp.where(negate, -fraction, fraction)
    bits, threshold = jnp.floor(fraction * 4), jnp.floor(fraction * 256)
    enhancement = 0.1 + 1.8 * fraction
    if increasing:
        bits, threshold = 4 - bits, 256 - threshold
        enhancement = jnp.maximum(0.1, 1 + 0.9 * signed)
    by_name = {
        'Rotate': MAX_DEGREES * signed,
        'Posterize': bits,
        'Solarize': threshold,
        'SolarizeAdd': jnp.floor(fraction * 110),
        'Color': enhancement,
        'Contrast': enhancement,
        'Brightness': enhancement,
        'Sharpness': enhancement,
        'ShearX': MAX_SHEAR * signed,
        'ShearY': MAX_SHEAR * signed,
        'TranslateX': MAX_TRANSLATION * signed,
        'TranslateY': MAX_TRANSLATION * signed,
    }
    return jnp.select([operation == OPERATIONS.index(name) for name in by_name], list(by_name.values()), 0.0)


def _look_up(
    images: UInt8[Array, 'n h w c'], operation: Int[Array, ' n'], argument: Float[Array, ' n']
) -> UInt8[Array, 'n h w c']:
    """The images after an operation on each pixel value."""
    return pillow_arithmetic.look_up(images, _tables(images, operation, argument))


def _tables(
    images: UInt8[Array, 'n h w c'], operation: Int[Array, ' n'], argument: Float[Array, ' n']
) -> Int[Array, 'n c 256']:
    """The look-up tables of the images, (N, C, 256) int32."""
    level = jnp.arange(256)[None, None]
    operation, argument = operation[:, None, None], argument[:, None, None]
    threshold = argument.astype(jnp.int32)
    counts = pillow_arithmetic.histogram(images)
    step = jnp.left_shift(1, jnp.clip(8 - threshold, 0, 8))
    by_name = {
        'AutoContrast': pillow_arithmetic.autocontrast_table(counts),
        'Equalize': pillow_arithmetic.equalize_table(counts),
        'Invert': 255 - level,
        'Posterize': level // step * step,
        'Solarize': jnp.where(level < threshold, level, 255 - level),
        'SolarizeAdd': jnp.where(level < 128, jnp.minimum(level + threshold, 255), level),
    }
    shape = (images.shape[0], images.shape[3], 256)
    return jnp.select(
        [jnp.broadcast_to(operation == OPERATIONS.index(name), shape) for name in by_name],
        [jnp.broadcast_to(table, shape).astype(jnp.int32) for table in by_name.values()],
        jnp.broadcast_to(level, shape),
    )


def _enhance(
    images: UInt8[Array, 'n h w c'], operation: Int[Array, ' n'], argument: Float[Array, ' n']
) -> UInt8[Array, 'n h w c']:
    """The images after an enhancement of `ImageEnhance`."""
    degenerate = {
        'Brightness': jnp.uint8(0),
        'Contrast': pillow_arithmetic.mean_grey(images),
        'Color': pillow_arithmetic.grey(images),
        'Sharpness': pillow_arithmetic.smooth(images),
    }
    start = images
    for name, other in degenerate.items():
        start = jnp.where((operation == OPERATIONS.index(name))[:, None, None, None], other, start)
    return pillow_arithmetic.blend(start, images, argument)


def _move(
    images: UInt8[Array, 'n h w c'], operation: Int[Array, ' n'], argument: Float[Array, ' n'], *, fill: Sequence[int]
) -> UInt8[Array, 'n h w c']:
    """The images after a rotation, shear or translation."""

    def where(name: str) -> jax.Array:
        return jnp.where(operation == OPERATIONS.index(name), argument, 0.0)

    return move(
        images,
        degrees=where('Rotate'),
        shear_x=where('ShearX'),
        shear_y=where('ShearY'),
        translate_x=where('TranslateX'),
        translate_y=where('TranslateY'),
        fill=fill,
    )
