"""Operations on the selected images of a batch. Their cost grows with the number of selected images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Num

CHUNKS = 8  # per batch: more chunks compute fewer images that are not selected, but start more kernels


def apply_to_selected(
    function: Callable[..., jax.Array], selected: Bool[Array, ' n'], images: Num[Array, 'n h w c'], *arguments: Array
) -> Num[Array, 'n h w c']:
    """The images, with `function` applied to the selected ones only.

    A loop passes chunks of the batch to `function`, selected images first, and ends after the last selected image. The
    last chunk may contain other images; their results are dropped.

    Args:
        function: maps images (M, H, W, C) and M values of each argument to images of this shape and dtype. Each result
            must depend only on its image and the values for this image.
        selected: (N,) bool.
        images: (N, H, W, C).
        arguments: arrays with one value for each image, (N, …).

    Returns:
        (N, H, W, C) of the images' dtype.
    """
    n = len(images)
    chunk = -(-n // CHUNKS)
    # Copies of the last image fill the last chunk. They are computed too, with equal results.
    order = jnp.pad(jnp.argsort(~selected), (0, -n % chunk), mode='edge')

    def is_open(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return state[0] < selected.sum()

    def apply(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first, images = state
        index = lax.dynamic_slice(order, (first,), (chunk,))
        part, *values = (array[index] for array in (images, *arguments))
        part = jnp.where(selected[index][:, None, None, None], function(part, *values), part)
        return first + chunk, images.at[index].set(part)

    return lax.while_loop(is_open, apply, (jnp.zeros((), order.dtype), images))[1]
