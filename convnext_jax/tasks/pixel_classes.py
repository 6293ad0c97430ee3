"""The classes of all pixels of images, predicted from whole images or overlapping windows, as in mmsegmentation."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from convnext_jax.data.augment import normalize
from convnext_jax.models import UPerNet
from convnext_jax.models.extent import source_positions
from convnext_jax.models.layers import FSDP_AXIS, device_axes

ROWS = 32
"""Number of rows of an image whose classes are computed at once from the logits."""
NOT_FINITE = 255
"""Class of pixels whose logits are NaN or infinite."""


class View(NamedTuple):
    """An image at one of the sizes at which the network sees it.

    Attributes:
        image: the resized image, padded at the bottom and at the right.
        size: (2,) int32, height and width without padding; (0, 0) for no image.
    """

    image: UInt8[Array, 'rows columns c']
    size: Int[Array, '2']


RowReader = Callable[[Int[Array, ' r']], Float[Array, 'r w c']]
"""A function that returns the rows of an image with the given indices."""


@dataclasses.dataclass(frozen=True)
class PixelClasses:
    """Predicts the class of each pixel of an image of any size.

    The network computes the logits of one or more views of the image. It gets a view as a whole, or as square windows
    that cover it. The last window of each row and column is moved back so that it ends at the border. Where windows
    overlap, their logits are averaged. The logits are then resized to the size of the original image (bilinear), and
    each pixel gets the class with the largest logit. With `flip` or several views, it gets the class with the largest
    sum of softmax values over all views and their mirror images.

    With windows, the logits of a view take 4 · height · width · classes bytes on the device; without windows, a
    sixteenth of this. `flip` doubles it. The logits of all views are in memory at the same time.

    Attributes:
        mean, std: mean and standard deviation of each channel, for pixel values in [0, 1].
        crop: side of the windows in pixels; 0 for whole views.
        stride: distance between neighbouring windows in pixels, at most `crop`.
        flip: whether to predict the mirror images as well.
        may_be_small: whether a side of a view may be smaller than a window. The network then also gets the size of the
            view without padding, so that the padding has no effect. False is faster.
        shapes: for whole views: for each view, a list of shapes (height, width). The padded image is cropped to the
            first shape that contains the image without padding, so that landscape and portrait images need no square.
            Empty to use the whole padded image.
    """

    mean: Sequence[float]
    std: Sequence[float]
    crop: int = 0
    stride: int = 0
    flip: bool = False
    may_be_small: bool = True
    shapes: Sequence[Sequence[tuple[int, int]]] = ()

    def __call__(
        self, model: UPerNet, views: Sequence[View], original_size: Int[Array, '2'], shape: tuple[int, ...]
    ) -> UInt8[Array, 'h w']:
        """The class of each pixel of the original image, or `NOT_FINITE`; the values of padding are arbitrary.

        Args:
            model: the network, for inference.
            views: the image at one or more sizes.
            original_size: (2,) int32, height and width of the original image.
            shape: (h, w), the size of the result, at least `original_size`.

        Returns:
            (h, w) uint8.
        """
        shapes = self.shapes or [()] * len(views)
        logits = [self._logits(model, view, parts) for view, parts in zip(views, shapes, strict=True)]
        columns = jnp.arange(shape[1])

        def add_rows(strip: Int[Array, ''], classes: UInt8[Array, '_ w']) -> UInt8[Array, '_ w']:
            rows = ROWS * strip + jnp.arange(ROWS)
            values = []
            for view, readers in zip(views, logits, strict=True):
                values.append(_resized(readers[0], view.size, original_size, rows, columns))
                if self.flip:
                    mirrored = original_size[1] - 1 - columns
                    values.append(_resized(readers[1], view.size, original_size, rows, mirrored))
            scores = values[0] if len(values) == 1 else sum(map(jax.nn.softmax, values[1:]), jax.nn.softmax(values[0]))
            best = jnp.where(jnp.isfinite(scores.max(-1)), scores.argmax(-1), NOT_FINITE).astype(jnp.uint8)
            return jax.lax.dynamic_update_slice(classes, best, (ROWS * strip, 0))

        strips = -(-original_size[0] // ROWS)
        classes = jnp.zeros((-(-shape[0] // ROWS) * ROWS, shape[1]), jnp.uint8)
        return jax.lax.fori_loop(0, strips, add_rows, classes)[: shape[0]]

    def _logits(self, model: UPerNet, view: View, shapes: Sequence[tuple[int, int]]) -> list[RowReader]:
        """Functions that return rows of the logits of a view and, with `flip`, of the logits of its mirror image."""
        image, size = view
        below, right = (max(self.crop - side, 0) for side in image.shape[:2])
        image = jnp.pad(normalize(image[None], self.mean, self.std)[0], ((0, below), (0, right), (0, 0)))
        rows, columns = (jnp.arange(side) for side in image.shape[:2])
        image = jnp.where(((rows[:, None] < size[0]) & (columns < size[1]))[..., None], image, 0)
        images = image[None]
        if self.flip:  # the mirror image has the same padding: it begins at column 0
            images = jnp.stack([image, jnp.roll(image[:, ::-1], size[1], axis=1)])
        if self.crop:
            return [logits.__getitem__ for logits in self._logits_of_windows(model, images, size)]
        logits, part = _logits_of_whole_images(model, images, size, shapes)
        columns = jnp.arange(images.shape[2])
        return [lambda rows, x=x: _resized(x.__getitem__, part, size, rows, columns) for x in logits]

    def _logits_of_windows(
        self, model: UPerNet, images: Float[Array, 'n h w c'], size: Int[Array, '2']
    ) -> Float[Array, 'n h w classes']:
        """The logits of each pixel, averaged over all windows that contain it; 0 outside all windows.

        Args:
            model: the network.
            images: images with the same size.
            size: (2,) int32, their height and width without padding.
        """
        last = jnp.maximum(size - self.crop, 0)  # position of the last window
        grid = (last + self.stride - 1) // self.stride + 1
        windows = jnp.where((size > 0).all(), grid.prod(), 0)
        # All devices that share the shards of a parameter must gather them equally often.
        steps = jax.lax.pmax(windows, FSDP_AXIS) if FSDP_AXIS in device_axes() else windows
        sizes = jnp.broadcast_to(jnp.minimum(size, self.crop), (len(images), 2)) if self.may_be_small else None

        def add_window(number: Int[Array, ''], sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            position = jnp.stack([number // grid[1], number % grid[1]]) * self.stride
            top, left = jnp.minimum(position, last)
            window = (len(images), self.crop, self.crop, images.shape[3])
            logits = model(jax.lax.dynamic_slice(images, (0, top, left, 0), window), sizes=sizes)

            def add(total: jax.Array, new: jax.Array) -> jax.Array:
                old = jax.lax.dynamic_slice(total, (0, top, left, 0), new.shape)
                new = jnp.where(number < windows, new, 0)
                return jax.lax.dynamic_update_slice(total, old + new, (0, top, left, 0))

            return add(sums[0], logits), add(sums[1], jnp.ones((1, self.crop, self.crop, 1)))

        sides = images.shape[1:3]
        zeros = jnp.zeros((len(images), *sides, model.num_classes)), jnp.zeros((1, *sides, 1))
        logits, counts = jax.lax.fori_loop(0, steps, add_window, zeros)
        return logits / jnp.maximum(counts, 1)


def _logits_of_whole_images(
    model: UPerNet, images: Float[Array, 'n h w c'], size: Int[Array, '2'], shapes: Sequence[tuple[int, int]]
) -> tuple[Float[Array, 'n rows columns classes'], Int[Array, '2']]:
    """The logits of padded images, and the height and width of the logits that are not padding.

    Args:
        model: the network.
        images: images with the same size.
        size: (2,) int32, their height and width without padding.
        shapes: as for one view in `PixelClasses`.
    """
    sizes = jnp.broadcast_to(size, (len(images), 2))
    if len(shapes) < 2 or FSDP_AXIS in device_axes():  # devices that share shards must run the same branch
        logits, extent = model.logits_within(images, sizes)
        return logits, extent.sizes[0]
    padded = jax.eval_shape(lambda images, sizes: model.logits_within(images, sizes)[0], images, sizes).shape

    def run(shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        logits, extent = model.logits_within(images[:, : shape[0], : shape[1]], sizes)
        widths = [(0, new - old) for old, new in zip(logits.shape, padded, strict=True)]
        return jnp.pad(logits, widths), extent.sizes[0]

    fitting = jnp.stack([(size <= jnp.asarray(shape)).all() for shape in shapes])
    return jax.lax.switch(fitting.argmax(), [functools.partial(run, shape) for shape in shapes])


def _resized(
    read_rows: RowReader,
    size: Int[Array, '2'],
    new_size: Int[Array, '2'],
    rows: Int[Array, ' r'],
    columns: Int[Array, ' s'],
) -> Float[Array, 'r s c']:
    """Some rows and columns of the image after a bilinear resize, as `interpolate(…, align_corners=False)` in PyTorch.

    Args:
        read_rows: returns rows of the image, (rows, W, C) float32, padded at the right.
        size: (2,) int32, height and width without padding.
        new_size: (2,) int32, height and width after the resize.
        rows, columns: the rows and columns of the resized image to compute.
    """
    above, below, down = _neighbours(rows, size[0], new_size[0])
    before, after, across = _neighbours(columns, size[1], new_size[1])
    down, across = down[:, None, None], across[:, None]
    between = (1 - down) * read_rows(above) + down * read_rows(below)
    return (1 - across) * between[:, before] + across * between[:, after]


def _neighbours(
    positions: Int[Array, ' n'], length: Int[Array, ''], new_length: Int[Array, '']
) -> tuple[Int[Array, ' n'], Int[Array, ' n'], Float[Array, ' n']]:
    """For positions on a resized axis, their two neighbours on the original axis, and the weight of the second one."""
    source = source_positions(positions, length, new_length)
    first = jnp.floor(source).astype(jnp.int32)
    return first, jnp.minimum(first + 1, length - 1), source - first
