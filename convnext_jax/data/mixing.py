"""Mixup (arXiv:1710.09412) and cutmix (arXiv:1905.04899) of pairs of images of a batch, on the device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from convnext_jax.errors import UserError


def mix(
    images: Float[Array, 'n h w c'],
    targets: Float[Array, 'n classes'],
    key: Key[Array, ''],
    *,
    mixup: float,
    cutmix: float,
    mode: str,
    on: Bool[Array, ''] | bool = True,
) -> tuple[Float[Array, 'n h w c'], Float[Array, 'n classes']]:
    """Mixup or cutmix of neighbouring images: 0 with 1, 2 with 3, …, so that both are usually on one device.

    If both methods are enabled, each is chosen with probability ½.

    Args:
        images: (N, H, W, C) float, N even.
        targets: (N, classes) float, smoothed one-hot labels.
        key: random key of the whole batch.
        mixup, cutmix: α of the Beta(α, α) distribution of λ, the weight of the image itself; 0 disables the method.
        mode: 'batch' draws one λ, method and box for the whole batch, 'elem' (timm's name) one for each image.
        on: False leaves images and targets unchanged.

    Returns:
        Mixed images and targets. For cutmix the target's λ is the fraction of the area that the image keeps after the
        box is clipped at the border.

    Raises:
        UserError: N is odd, or the mode is unknown.
    """
    if len(images) % 2:
        raise UserError(f'mixup and cutmix need pairs of images: batch_size={len(images)} must be even')
    if mode not in ('batch', 'elem'):
        raise UserError(f"mix.mode must be 'batch' or 'elem', not '{mode}'")
    draws = 1 if mode == 'batch' else len(images)
    method_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 4)
    use_cutmix = jax.random.bernoulli(method_key, 0.5 if mixup and cutmix else float(bool(cutmix)), (draws,))
    weight = jnp.where(
        use_cutmix,
        jax.random.beta(cutmix_key, cutmix or 1.0, cutmix or 1.0, (draws,)),
        jax.random.beta(mixup_key, mixup or 1.0, mixup or 1.0, (draws,)),
    )
    inside = _boxes(box_key, weight, *images.shape[1:3])
    kept = 1 - inside.mean((1, 2), dtype=jnp.float32)
    pixel_weight = jnp.where(on, jnp.where(use_cutmix[:, None, None], 1 - inside, weight[:, None, None]), 1.0)
    target_weight = jnp.where(on, jnp.where(use_cutmix, kept, weight), 1.0)
    return (
        _with_neighbours(images, pixel_weight[:, :, :, None]),
        _with_neighbours(targets, target_weight[:, None]),
    )


def _with_neighbours(examples: jax.Array, weight: jax.Array) -> jax.Array:
    """weight · example + (1 − weight) · its neighbour; `weight` is broadcast to the shape of the examples, (N, …)."""
    neighbours = examples.reshape(-1, 2, *examples.shape[1:])[:, ::-1].reshape(examples.shape)
    return weight * examples + (1 - weight) * neighbours


def _boxes(
    key: Key[Array, ''], weight: Float[Array, ' draws'], height: int, width: int
) -> Float[Array, 'draws {height} {width}']:
    """Masks, (draws, H, W) float32: 1 in a box of area 1 − weight around a random centre, clipped at the border."""
    row_key, column_key = jax.random.split(key)
    side = jnp.sqrt(1 - weight)

    def along(key: jax.Array, length: int) -> jax.Array:
        size = jnp.floor(length * side)
        centre = jax.random.randint(key, weight.shape, 0, length)
        first = (centre - size // 2)[:, None]
        position = jnp.arange(length)[None]
        return (position >= first) & (position < first + size[:, None])

    return (along(row_key, height)[:, :, None] & along(column_key, width)[:, None]).astype(jnp.float32)
