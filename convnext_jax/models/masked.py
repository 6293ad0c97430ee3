"""Masked images: an encoder computes on the visible patches, and the pixels of the other patches have no effect.

If a dense convolution reads zeros at invisible positions and its results there are set to zero, the visible positions
get the results of a sparse convolution. No sparse kernels are needed. All other layers of a block compute each position
separately, so they run on the visible patches only, packed into a smaller array.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Key, Shaped

from convnext_jax.models.activation import gelu
from convnext_jax.models.extent import Extent
from convnext_jax.models.layers import device_axes
from convnext_jax.models.normal import widened
from convnext_jax.models.parameters import AnyArray
from convnext_jax.models.response_norm import relative_norms

GRN_STATISTICS = ('image', 'batch')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visible:
    """The visible patches of the images of a batch.

    Attributes:
        patches: (N, rows, columns) bool, True where a patch is visible.
        statistics: GRN computes its norms over the visible positions of each 'image', or of the whole 'batch' on all
            devices.
        max_visible: the maximum number of visible patches of an image; None if all patches may be visible.
    """

    patches: Bool[Array, 'n rows columns']
    statistics: str = dataclasses.field(default='image', metadata={'static': True})
    max_visible: int | None = dataclasses.field(default=None, metadata={'static': True})

    def positions(self, x: Shaped[Array, 'n h w c']) -> Bool[Array, 'n h w 1']:
        """Whether each position of x is visible: (N, H, W, C) → (N, H, W, 1) bool.

        H and W are multiples of the rows and the columns.
        """
        height, width = (side // patches for side, patches in zip(x.shape[1:3], self.patches.shape[1:], strict=True))
        return jnp.repeat(jnp.repeat(self.patches, height, axis=1), width, axis=2)[..., None]

    def keep(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n h w c']:
        """Sets x to 0 at the invisible positions, even if it is NaN there: (N, H, W, C) → (N, H, W, C)."""
        return jnp.where(self.positions(x), x, 0)

    @property
    def packed(self) -> 'Visible':
        """Which of the packed patches are visible, for an array from `pack`: `patches` is (N, max_visible, 1)."""
        patches = rearrange(self.patches, 'n r c -> n (r c)')
        return Visible(jnp.take_along_axis(patches, _order(self), axis=1)[..., None], self.statistics)


def _order(visible: Visible) -> jax.Array:
    """The patches of each image in their packed order, the visible ones first: (N, max_visible) int32."""
    patches = rearrange(visible.patches, 'n r c -> n (r c)')
    return jnp.argsort(~patches, axis=1, stable=True)[:, : visible.max_visible]


# JAX would compute the cotangent of a gather by a scatter, which is slow. No patch occurs twice, so `unpack` computes
# the cotangent of `pack`, and `pack` computes the cotangent of `unpack`.
@jax.custom_vjp
def pack(x: jax.Array, visible: Visible) -> jax.Array:
    """Stacks the visible patches of each image vertically, and masked patches below them up to `max_visible` patches.

    Args:
        x: (N, H, W, C).
        visible: the visible patches of x.

    Returns:
        (N, max_visible · height of a patch, width of a patch, C).
    """
    rows, columns = visible.patches.shape[1:]
    patches = rearrange(x, 'n (r h) (c w) d -> n (r c) h w d', r=rows, c=columns)
    patches = jnp.take_along_axis(patches, _order(visible)[..., None, None, None], axis=1)
    return rearrange(patches, 'n k h w d -> n (k h) w d')


@jax.custom_vjp
def unpack(x: jax.Array, visible: Visible) -> jax.Array:
    """The inverse of `pack`, with 0 at the invisible positions: (N, max_visible · h, w, C) → (N, H, W, C)."""
    rows, columns = visible.patches.shape[1:]
    is_visible = rearrange(visible.patches, 'n r c -> n (r c)')
    positions = jnp.maximum(jnp.cumsum(is_visible, axis=1) - 1, 0)
    patches = rearrange(x, 'n (k h) w d -> n k h w d', k=visible.max_visible or rows * columns)
    patches = jnp.take_along_axis(patches, positions[..., None, None, None], axis=1)
    patches = jnp.where(is_visible[..., None, None, None], patches, 0)
    return rearrange(patches, 'n (r c) h w d -> n (r h) (c w) d', r=rows, c=columns)


pack.defvjp(
    lambda x, visible: (pack(x, visible), visible),
    lambda visible, cotangent: (unpack(cotangent, visible), None),
)
unpack.defvjp(
    lambda x, visible: (unpack(x, visible), visible),
    lambda visible, cotangent: (visible.packed.keep(pack(cotangent, visible)), None),
)


def draw_patches(keys: Key[Array, ' n'], rows: int, columns: int, visible: int) -> Bool[Array, 'n {rows} {columns}']:
    """Draws exactly `visible` visible patches of each image from the key of the image.

    Args:
        keys: (N,), one for each image.
        rows, columns: number of patches along the sides of an image.
        visible: number of visible patches of an image.

    Returns:
        (N, rows, columns) bool.
    """
    scores = jax.vmap(lambda key: jax.random.uniform(key, (rows * columns,)))(keys)
    ranks = scores.argsort(-1).argsort(-1)
    return (ranks < visible).reshape(-1, rows, columns)


def masked_gelu_and_response_norm(
    x: Float[Array, 'n h w c'],
    bias: Float[AnyArray, ' c'],
    gamma: Float[AnyArray, ' c'],
    beta: Float[AnyArray, ' c'],
    visible: Visible | Extent,
) -> Float[Array, 'n h w c']:
    """`activation.gelu_and_response_norm` with norms over the visible positions only.

    Args:
        x: (N, H, W, C).
        bias, gamma, beta: (C,) float32.
        visible: the visible patches of x, or the part of x that is not padding.

    Returns:
        (N, H, W, C) of x's dtype; the values at invisible positions are undefined.
    """
    y = widened(visible.keep(gelu(x, bias)))
    if visible.statistics == 'image':
        squares = jnp.square(y).sum((1, 2), keepdims=True)
    else:
        squares = jnp.square(y).sum((0, 1, 2), keepdims=True)
        if axes := device_axes():
            squares = jax.lax.psum(squares, axes)
    return (y * relative_norms(squares) * gamma + beta + y).astype(x.dtype)
