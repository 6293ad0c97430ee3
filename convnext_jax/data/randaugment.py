"""RandAugment (arXiv:1909.13719) as timm has it, on the device: every image of a batch its own operations, by key.

Each operation gives what Pillow's does. All images go through one program, in which what an image did not draw is the
identity: a table of 256 grey levels for each channel, a blend, and three shifts of rows and columns. On accelerators
none of it gathers pixel by pixel, which TPUs do slowly.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from convnext_jax.data import pillow_arithmetic
from convnext_jax.data.geometry import MOST_DEGREES, MOST_SHEAR, MOST_TRANSLATION, move
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
    values: dict[str, Any] = {}
    for part in parts:
        match = re.fullmatch(r'([a-z]+)(\d+\.?\d*)', part)
        if not match or match[1] not in fields:
            raise UserError(f"augment.policy='{text}': '{part}' is none of {', '.join(fields)} with a number")
        values[fields[match[1]]] = float(match[2])
    policy = RandAugment(**values)
    layers = int(policy.layers)
    if kind != 'rand' or policy.magnitude > 10 or policy.probability > 1 or not 1 <= layers == policy.layers:
        raise UserError(f"augment.policy='{text}' is neither 3a nor as rand-m9-mstd0.5-inc1: m to 10, n from 1, p to 1")
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

    def draw(layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(lambda key: _draw(jax.random.fold_in(key, layer), policy))(keys)

    def apply(images: jax.Array, drawn: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return apply_operations(images, *drawn, fill), None

    # A loop, not unrolled, over what was drawn before: otherwise the CPU's compiler computes the first layer anew
    # wherever the second reads a pixel, and the draws for every pixel.
    return lax.scan(apply, images, jax.vmap(draw)(jnp.arange(policy.layers)))[0]


def apply_operations(images: jax.Array, operation: jax.Array, argument: jax.Array, fill: Sequence[int]) -> jax.Array:
    """One operation on each image: (N, H, W, C) uint8 → the same.

    Args:
        images: (N, H, W, C) uint8, C 1 or 3.
        operation: (N,) int32, index into `OPERATIONS`; `IDENTITY` for none.
        argument: (N,) float32. Rotate: degrees anticlockwise; Posterize: bits to keep; Solarize: threshold;
            SolarizeAdd: what is added; the enhancements: factor; shears: tangent; translations: share of the side.
        fill: grey level of each channel that comes in at the sides.
    """

    def where(name: str, otherwise: float) -> jax.Array:
        return jnp.where(operation == OPERATIONS.index(name), argument, otherwise)

    images = pillow_arithmetic.look_up(images, _tables(images, operation, argument))
    images = _enhance(images, operation, argument)
    return move(
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
        'ShearX': MOST_SHEAR * signed,
        'ShearY': MOST_SHEAR * signed,
        'TranslateX': MOST_TRANSLATION * signed,
        'TranslateY': MOST_TRANSLATION * signed,
    }
    return jnp.select([operation == OPERATIONS.index(name) for name in by_name], list(by_name.values()), 0.0)


def _tables(images: jax.Array, operation: jax.Array, argument: jax.Array) -> jax.Array:
    """What each grey level becomes: (N, C, 256) int32."""
    level = jnp.arange(256)[None, None]
    operation, argument = operation[:, None, None], argument[:, None, None]
    threshold = argument.astype(jnp.int32)
    counts = pillow_arithmetic.histogram(images)
    step_of_bits = jnp.left_shift(1, jnp.clip(8 - threshold, 0, 8))
    by_name = {
        'AutoContrast': pillow_arithmetic.stretched(counts),
        'Equalize': pillow_arithmetic.equalized(counts),
        'Invert': 255 - level,
        'Posterize': level // step_of_bits * step_of_bits,
        'Solarize': jnp.where(level < threshold, level, 255 - level),
        'SolarizeAdd': jnp.where(level < 128, jnp.minimum(level + threshold, 255), level),
    }
    shape = (images.shape[0], images.shape[3], 256)
    return jnp.select(
        [jnp.broadcast_to(operation == OPERATIONS.index(name), shape) for name in by_name],
        [jnp.broadcast_to(table, shape).astype(jnp.int32) for table in by_name.values()],
        jnp.broadcast_to(level, shape),
    )


def _enhance(images: jax.Array, operation: jax.Array, argument: jax.Array) -> jax.Array:
    """The images that drew one of `ImageEnhance`'s four, blended; the others as they are."""
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
