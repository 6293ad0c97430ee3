"""The classes of all pixels of whole images, predicted in overlapping windows, as in mmsegmentation."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from convnext_jax.data.augment import normalize
from convnext_jax.models import UPerNet
from convnext_jax.models.layers import FSDP_AXIS, device_axes

ROWS = 32
"""Number of rows of an image whose classes are computed at once from the logits of the resized image."""
NOT_FINITE = 255
"""Class of pixels whose logits are NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class SlidingWindows:
    """Predicts the class of each pixel of an image of any size.

    The network computes the logits of square windows that cover the resized image. The last window of each row and
    column is moved back so that it ends at the border. Where windows overlap, their logits are averaged. The logits are
    then enlarged or reduced to the size of the original image (bilinear), and each pixel gets the class with the
    largest logit. With `flip`, it gets the class with the largest sum of two softmax values: of the image, and of its
    mirror image.

    An image that is smaller than a window is normalised and then padded with zeros. In mmsegmentation, the network gets
    the image without padding. The logits of a whole image take 4 · height · width · classes bytes on the
    device, and twice as many with `flip`.

    Attributes:
        mean, std: mean and standard deviation of each channel, for pixel values in [0, 1].
        crop: side of the windows in pixels.
        stride: distance between neighbouring windows in pixels, at most `crop`.
        flip: whether to predict the mirror image as well.
    """

    mean: Sequence[float]
    std: Sequence[float]
    crop: int
    stride: int
    flip: bool = False

    def classes(
        self,
        model: UPerNet,
        image: UInt8[Array, 'rows columns c'],
        size: Int[Array, '2'],
        original_size: Int[Array, '2'],
        shape: tuple[int, ...],
    ) -> UInt8[Array, 'h w']:
        """The class of each pixel of the original image, or `NOT_FINITE`; the values of padding are arbitrary.

        Args:
            model: the network, for inference.
            image: the resized image, padded at the bottom and at the right.
            size: (2,) int32, height and width of the resized image without padding; (0, 0) for no image.
            original_size: (2,) int32, height and width of the original image.
            shape: (h, w), the size of the result, at least `original_size`.

        Returns:
            (h, w) uint8.
        """
        below, right = (max(self.crop - side, 0) for side in image.shape[:2])
        image = jnp.pad(normalize(image[None], self.mean, self.std)[0], ((0, below), (0, right), (0, 0)))
        rows, columns = (jnp.arange(side) for side in image.shape[:2])
        image = jnp.where(((rows[:, None] < size[0]) & (columns < size[1]))[..., None], image, 0)
        logits = self._logits(model, image, size)
        mirrored = None
        if self.flip:  # the mirror image has the same padding: it begins at column 0
            mirrored = self._logits(model, jnp.roll(image[:, ::-1], size[1], axis=1), size)
        columns = jnp.arange(shape[1])

        def add_rows(strip: Int[Array, ''], classes: UInt8[Array, '_ w']) -> UInt8[Array, '_ w']:
            rows = ROWS * strip + jnp.arange(ROWS)
            values = _resized(logits, size, original_size, rows, columns)
            if mirrored is not None:
                others = _resized(mirrored, size, original_size, rows, original_size[1] - 1 - columns)
                values = jax.nn.softmax(values) + jax.nn.softmax(others)
            best = jnp.where(jnp.isfinite(values.max(-1)), values.argmax(-1), NOT_FINITE).astype(jnp.uint8)
            return jax.lax.dynamic_update_slice(classes, best, (ROWS * strip, 0))

        strips = -(-original_size[0] // ROWS)
        classes = jnp.zeros((-(-shape[0] // ROWS) * ROWS, shape[1]), jnp.uint8)
        return jax.lax.fori_loop(0, strips, add_rows, classes)[: shape[0]]

    def _logits(
        self, model: UPerNet, image: Float[Array, 'h w c'], size: Int[Array, '2']
    ) -> Float[Array, 'h w classes']:
        """The logits of each pixel, averaged over all windows that contain it; 0 outside all windows."""
        last = jnp.maximum(size - self.crop, 0)  # position of the last window
        grid = (last + self.stride - 1) // self.stride + 1
        windows = jnp.where((size > 0).all(), grid.prod(), 0)
        # All devices that share the shards of a parameter must gather them equally often.
        steps = jax.lax.pmax(windows, FSDP_AXIS) if FSDP_AXIS in device_axes() else windows

        def add_window(number: Int[Array, ''], sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            position = jnp.stack([number // grid[1], number % grid[1]]) * self.stride
            top, left = jnp.minimum(position, last)
            window = jax.lax.dynamic_slice(image, (top, left, 0), (self.crop, self.crop, image.shape[2]))
            added = model(window[None])[0], jnp.ones((self.crop, self.crop, 1))

            def add(total: jax.Array, new: jax.Array) -> jax.Array:
                old = jax.lax.dynamic_slice(total, (top, left, 0), new.shape)
                return jax.lax.dynamic_update_slice(total, old + jnp.where(number < windows, new, 0), (top, left, 0))

            return add(sums[0], added[0]), add(sums[1], added[1])

        sides = image.shape[:2]
        zeros = jnp.zeros((*sides, model.num_classes)), jnp.zeros((*sides, 1))
        logits, counts = jax.lax.fori_loop(0, steps, add_window, zeros)
        return logits / jnp.maximum(counts, 1)


def _resized(
    image: Float[Array, 'h w c'],
    size: Int[Array, '2'],
    new_size: Int[Array, '2'],
    rows: Int[Array, ' r'],
    columns: Int[Array, ' s'],
) -> Float[Array, 'r s c']:
    """Some rows and columns of the image after a bilinear resize, as `interpolate(…, align_corners=False)` in PyTorch.

    Args:
        image: (H, W, C) float32, padded at the bottom and at the right.
        size: (2,) int32, height and width without padding.
        new_size: (2,) int32, height and width after the resize.
        rows, columns: the rows and columns of the resized image to compute.
    """
    above, below, down = _neighbours(rows, size[0], new_size[0])
    before, after, across = _neighbours(columns, size[1], new_size[1])
    down, across = down[:, None, None], across[:, None]
    lines = (1 - down) * image[above] + down * image[below]
    return (1 - across) * lines[:, before] + across * lines[:, after]


def _neighbours(
    positions: Int[Array, ' n'], length: Int[Array, ''], new_length: Int[Array, '']
) -> tuple[Int[Array, ' n'], Int[Array, ' n'], Float[Array, ' n']]:
    """The two neighbours on an axis of `length` of positions on the resized axis, and the weight of the second."""
    scale = length.astype(jnp.float32) / new_length
    source = jnp.clip(scale * (positions + 0.5) - 0.5, 0, length - 1)
    first = jnp.floor(source).astype(jnp.int32)
    return first, jnp.minimum(first + 1, length - 1), source - first
