"""Padded images: inside the images, the feature maps of a network do not depend on the padding.

Convolutions read zeros beyond the border of an image. If every feature map is set to 0 at the positions of padding,
each image of a batch gets the values that it would get alone, and one compiled program serves images of all sizes.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Extent:
    """The part of each image, or of its feature map, that is not padding. It begins at the first row and column.

    Attributes:
        sizes: (N, 2) int32, height and width of this part, at least 1.
        statistics: GRN computes its norms over this part of each image; as in `masked.Visible`.
    """

    sizes: Int[Array, 'n 2']
    statistics: ClassVar[str] = 'image'

    def positions(self, x: Shaped[Array, 'n h w c']) -> Bool[Array, 'n h w 1']:
        """Which positions of x are not padding: (N, H, W, C) → (N, H, W, 1) bool."""
        rows, columns = (jnp.arange(side) for side in x.shape[1:3])
        heights, widths = self.sizes[:, :1], self.sizes[:, 1:]
        return ((rows < heights)[:, :, None] & (columns < widths)[:, None, :])[..., None]

    def keep(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n h w c']:
        """x with 0 at the positions of padding: (N, H, W, C) → (N, H, W, C)."""
        return jnp.where(self.positions(x), x, 0)

    def divided(self, factor: int) -> 'Extent':
        """The extent of a map that has one position for `factor` × `factor` positions of this one."""
        return Extent(self.sizes // factor)

    def halved_up(self) -> 'Extent':
        """The extent of a map that has one position for 2 × 2 positions of this one, rounded up."""
        return Extent(-(-self.sizes // 2))


def source_positions(positions: Int[Array, ' n'], old: Int[Array, ''], new: Int[Array, '']) -> Float[Array, ' n']:
    """The places on an axis from which a bilinear resize reads: (N,) int32 positions → (N,) float32.

    `old` and `new` are the length of the axis before and after the resize, as in `bilinear_weights`.
    """
    scale = old.astype(jnp.float32) / new
    return jnp.clip(scale * (positions + 0.5) - 0.5, 0, old - 1)


def bilinear_weights(
    positions: Int[Array, ' n'], old: Int[Array, ''], new: Int[Array, ''], length: int
) -> Float[Array, 'n {length}']:
    """The weights of a bilinear resize along one axis, as in `interpolate(…, align_corners=False)` of PyTorch.

    Args:
        positions: (N,) int32, positions on the resized axis.
        old, new: int32, the length of the axis before and after the resize, without padding.
        length: the length of the axis before the resize, with padding.

    Returns:
        (N, length) float32, the weight of each position before the resize; 0 for padding.
    """
    source = source_positions(positions, old, new)
    return jnp.maximum(1 - jnp.abs(source[:, None] - jnp.arange(length)), 0)


def resize_part(
    x: Float[Array, 'n h w c'], old: Extent, new: Extent, size: tuple[int, ...]
) -> Float[Array, 'n rows columns c']:
    """A bilinear resize of each image without its padding; the values of padding in the result are arbitrary.

    Args:
        x: (N, H, W, C) float.
        old, new: the parts of the images before and after the resize.
        size: height and width of the result with padding.

    Returns:
        (N, rows, columns, C) of x's dtype.
    """
    rows, columns = (
        jax.vmap(bilinear_weights, (None, 0, 0, None))(
            jnp.arange(size[axis]), old.sizes[:, axis], new.sizes[:, axis], x.shape[1 + axis]
        )
        for axis in (0, 1)
    )
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum('nih,njw,nhwc->nijc', rows, columns, x.astype(jnp.float32), precision=highest).astype(x.dtype)


def bin_weights(lengths: Int[Array, ' n'], bins: int, padded: int) -> Float[Array, 'n {bins} {padded}']:
    """The weight of each position in the mean of each bin of `AdaptiveAvgPool2d`, (N, bins, padded) float32.

    Args:
        lengths: (N,) int32, lengths of an axis without padding.
        bins: number of bins.
        padded: length of the axis with padding.
    """
    numbers, lengths = jnp.arange(bins)[:, None], lengths[:, None, None]
    start, stop = numbers * lengths // bins, -(-(numbers + 1) * lengths // bins)
    positions = jnp.arange(padded)
    return ((positions >= start) & (positions < stop)) / (stop - start).astype(jnp.float32)
