"""Mixup (arXiv:1710.09412) and cutmix (arXiv:1905.04899) of neighbours in the batch, on the device, by key."""

import jax
import jax.numpy as jnp

from convnext_jax.errors import UserError


def mix(
    images: jax.Array,
    targets: jax.Array,
    key: jax.Array,
    *,
    mixup: float,
    cutmix: float,
    mode: str,
    on: jax.Array | bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Mixes each image with its neighbour: row 0 with 1, 2 with 3 and so on, so that both lie on one device.

    Where both kinds are on, each batch or image takes one of them by even odds.

    Args:
        images: (N, H, W, C), N even.
        targets: (N, classes), smoothed.
        key: of the whole batch.
        mixup, cutmix: α of the Beta(α, α) that the share λ of the image itself is drawn from; 0 for never.
        mode: one λ, kind and box for the whole 'batch', or for each image its own: 'elem', as timm calls it.
        on: False leaves all as it is.

    Returns:
        Images and targets. In cutmix λ is the share of the area that the image keeps after the box is cut off at the
        sides.

    Raises:
        UserError: an odd batch, or an unknown mode.
    """
    if len(images) % 2:
        raise UserError(f'mixup and cutmix take pairs: batch_size={len(images)} must be even')
    if mode not in ('batch', 'elem'):
        raise UserError(f"mix.mode must be 'batch' or 'elem', not '{mode}'")
    draws = 1 if mode == 'batch' else len(images)
    kind_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 4)
    cuts = jax.random.bernoulli(kind_key, 0.5 if mixup and cutmix else float(bool(cutmix)), (draws,))
    share = jnp.where(
        cuts,
        jax.random.beta(cutmix_key, cutmix or 1.0, cutmix or 1.0, (draws,)),
        jax.random.beta(mixup_key, mixup or 1.0, mixup or 1.0, (draws,)),
    )
    inside = _boxes(box_key, share, *images.shape[1:3])
    kept = 1 - inside.mean((1, 2), dtype=jnp.float32)
    by_pixel = jnp.where(on, jnp.where(cuts[:, None, None], 1 - inside, share[:, None, None]), 1.0)
    by_target = jnp.where(on, jnp.where(cuts, kept, share), 1.0)
    return (
        _with_neighbours(images, by_pixel[:, :, :, None]),
        _with_neighbours(targets, by_target[:, None]),
    )


def _with_neighbours(rows: jax.Array, share: jax.Array) -> jax.Array:
    """share · row + (1 − share) · its neighbour; `share` is broadcast over (N, …)."""
    neighbours = rows.reshape(-1, 2, *rows.shape[1:])[:, ::-1].reshape(rows.shape)
    return share * rows + (1 - share) * neighbours


def _boxes(key: jax.Array, share: jax.Array, height: int, width: int) -> jax.Array:
    """(draws, H, W) float32: 1 in a box of 1 − share of the area about a random middle, cut off at the sides."""
    row_key, column_key = jax.random.split(key)
    side = jnp.sqrt(1 - share)

    def along(key: jax.Array, length: int) -> jax.Array:
        size = jnp.floor(length * side)
        middle = jax.random.randint(key, share.shape, 0, length)
        first = (middle - size // 2)[:, None]
        place = jnp.arange(length)[None]
        return (place >= first) & (place < first + size[:, None])

    return (along(row_key, height)[:, :, None] & along(column_key, width)[:, None]).astype(jnp.float32)
