"""UPerNet (arXiv:1807.10221) on a ConvNeXt backbone: semantic segmentation, as in mmsegmentation."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from convnext_jax.errors import UserError
from convnext_jax.models.backbone import Backbone
from convnext_jax.models.batch_norm import BatchNorm
from convnext_jax.models.execution import Execution
from convnext_jax.models.extent import Extent, bin_weights, resize_part
from convnext_jax.models.layers import Linear
from convnext_jax.models.parameters import AnyArray, get_parameters
from convnext_jax.models.trunk import check_key
from convnext_jax.models.variants import Variant

POOL_SCALES = (1, 2, 3, 6)
STAGES = ('stage1', 'stage2', 'stage3', 'stage4')
AUXILIARY_STAGE = 2
"""Index in `STAGES` of the map from which the auxiliary head predicts."""


class HeadLogits(NamedTuple):
    """The logits of both heads, before they are enlarged to the size of the images.

    Attributes:
        main: (N, rows, columns, num_classes) float32, at the resolution of stage 1.
        auxiliary: (N, rows, columns, num_classes) float32 at the resolution of stage 3; None without auxiliary head.
    """

    main: Float[Array, 'n rows columns classes']
    auxiliary: Float[Array, 'n rows3 columns3 classes'] | None


class ConvBlock(nnx.Module):
    """Convolution without bias → BatchNorm → ReLU: (N, H, W, in) → (N, H, W, out) of `dtype`.

    The convolution has stride 1 and zero padding that preserves H and W; `size`, the side of its kernel, is odd.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int, *, dtype: DTypeLike, key: Key[Array, '']):
        shape = (size, size, in_channels, out_channels)
        std = math.sqrt(2 / (size**2 * out_channels))  # Kaiming initialisation by fan-out, as in mmsegmentation
        self.kernel = nnx.Param(std * jax.random.normal(key, shape), decays=True)
        self.norm = BatchNorm(out_channels)
        self.dtype = dtype

    def __call__(self, x: Float[Array, 'n h w in'], *, training: bool) -> Float[Array, 'n h w out']:
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel.astype(self.dtype),
            window_strides=(1, 1),
            padding='SAME',
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )
        return jax.nn.relu(self.norm(y, training=training))


class DecodeHead(nnx.Module):
    """Pyramid pooling of the last map, a feature pyramid over all maps, and a classifier of positions.

    Attributes:
        pooling: one block for each scale of the pyramid pooling.
        bottleneck: block over the last map and the results of `pooling`.
        lateral_convs, fpn_convs: one block for each map except the last.
        fpn_bottleneck: block over all levels of the feature pyramid.
        classifier: linear layer from `channels` to classes.
        pool_scales: number of bins along each axis, for each scale of the pyramid pooling.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        num_classes: int,
        *,
        pool_scales: tuple[int, ...],
        dropout_rate: float,
        dtype: DTypeLike,
        key: Key[Array, ''],
    ):
        keys = iter(jax.random.split(key, 3 + len(pool_scales) + 2 * (len(in_channels) - 1)))

        def block(inputs: int, size: int) -> ConvBlock:
            return ConvBlock(inputs, channels, size, dtype=dtype, key=next(keys))

        *lower, last = in_channels
        self.pooling = nnx.List([block(last, 1) for _ in pool_scales])
        self.bottleneck = block(last + len(pool_scales) * channels, 3)
        self.lateral_convs = nnx.List([block(inputs, 1) for inputs in lower])
        self.fpn_convs = nnx.List([block(channels, 3) for _ in lower])
        self.fpn_bottleneck = block(len(in_channels) * channels, 3)
        self.classifier = _classifier(channels, num_classes, key=next(keys))
        self.pool_scales = pool_scales
        self.dropout_rate = dropout_rate

    def __call__(
        self,
        maps: Sequence[Float[Array, 'n _ _ _']],
        keys: Key[Array, ' n'] | None,
        extents: Sequence[Extent] | None = None,
    ) -> Float[Array, 'n rows columns classes']:
        """The logits at the resolution of the first map, float32.

        Args:
            maps: feature maps in the order of decreasing resolution.
            keys: in training, (N,) random keys, one for each image; None for inference.
            extents: the part of each map that is not padding; None for maps without padding.
        """
        training = keys is not None
        parts: Sequence[Extent | None] = [None] * len(maps) if extents is None else extents
        laterals = [conv(x, training=training) for conv, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        laterals.append(self._pyramid_pooling(maps[-1], parts[-1], training=training))
        for level in reversed(range(len(laterals) - 1)):
            size = laterals[level].shape[1:3]
            laterals[level] += _resize_within(laterals[level + 1], size, parts[level + 1], parts[level])
        levels = [
            conv(_keep(x, part), training=training)
            for conv, x, part in zip(self.fpn_convs, laterals[:-1], parts[:-1], strict=True)
        ]
        levels.append(laterals[-1])
        size = levels[0].shape[1:3]
        resized = [_resize_within(x, size, part, parts[0]) for x, part in zip(levels, parts, strict=True)]
        fused = self.fpn_bottleneck(_keep(jnp.concatenate(resized, -1), parts[0]), training=training)
        return self.classifier(_drop_channels(fused, self.dropout_rate, keys))

    def _pyramid_pooling(
        self, x: Float[Array, 'n h w c'], extent: Extent | None, *, training: bool
    ) -> Float[Array, 'n h w channels']:
        parts = [x]
        for scale, conv in zip(self.pool_scales, self.pooling, strict=True):
            pooled = conv(adaptive_average_pool(x, scale, extent), training=training)
            bins = None if extent is None else Extent(jnp.full_like(extent.sizes, scale))
            parts.append(_resize_within(pooled, x.shape[1:3], bins, extent))
        return self.bottleneck(_keep(jnp.concatenate(parts, -1), extent), training=training)


class AuxiliaryHead(nnx.Module):
    """A block and a classifier of positions, for an additional loss in training (FCN, arXiv:1411.4038)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        *,
        dropout_rate: float,
        dtype: DTypeLike,
        key: Key[Array, ''],
    ):
        conv_key, classifier_key = jax.random.split(key)
        self.conv = ConvBlock(in_channels, channels, 3, dtype=dtype, key=conv_key)
        self.classifier = _classifier(channels, num_classes, key=classifier_key)
        self.dropout_rate = dropout_rate

    def __call__(self, x: Float[Array, 'n h w c'], keys: Key[Array, ' n'] | None) -> Float[Array, 'n h w classes']:
        """The logits at the resolution of x, float32; `keys` as for `DecodeHead`."""
        x = self.conv(x, training=keys is not None)
        return self.classifier(_drop_channels(x, self.dropout_rate, keys))


class UPerNet(nnx.Module):
    """A network for semantic segmentation: ConvNeXt backbone, UPerNet head, and an auxiliary head for training.

        model = UPerNet(get_variant('convnext_tiny'), num_classes=150, key=jax.random.key(0))
        logits = model(images)  # (N, H, W, 3) → (N, H, W, 150)

    A call with a key is a training step of the network: `BatchNorm` layers use the statistics of the batch and update
    their running statistics (see `get_statistics`).

    Args:
        variant: architecture of the backbone, with four stages.
        key: random key of the initialisation.
        num_classes: number of classes.
        channels: channels of the blocks of the head.
        pool_scales: scales of the pyramid pooling.
        auxiliary_channels: channels of the auxiliary head; 0 for no auxiliary head.
        dropout_rate: rate at which channels are dropped before the classifiers in training.
        output_stride, in_channels, drop_path_rate, execution: as for `Backbone`.

    Attributes:
        backbone, decode_head, auxiliary_head: the parts; `auxiliary_head` may be None.

    Raises:
        UserError: a value is out of its range.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        key: Key[Array, ''],
        num_classes: int = 150,
        channels: int = 512,
        pool_scales: tuple[int, ...] = POOL_SCALES,
        auxiliary_channels: int = 256,
        dropout_rate: float = 0.0,
        output_stride: int | None = None,
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        execution: Execution = Execution(),
    ):
        check_key(key, ((),))
        if len(variant.depths) != len(STAGES):
            raise UserError(f'UPerNet needs a backbone of four stages, not {len(variant.depths)}')
        if num_classes < 1 or channels < 1 or auxiliary_channels < 0:
            raise UserError(
                'UPerNet needs num_classes and channels of at least 1 and auxiliary_channels of at least 0, not '
                f'{num_classes}, {channels} and {auxiliary_channels}'
            )
        if not pool_scales or min(pool_scales) < 1:
            raise UserError(f'pool_scales must be one or more numbers of at least 1, not {pool_scales}')
        if not 0 <= dropout_rate < 1:
            raise UserError(f'dropout_rate must be in [0, 1), not {dropout_rate}')
        backbone_key, decode_key, auxiliary_key = jax.random.split(key, 3)
        self.backbone = Backbone(
            variant,
            key=backbone_key,
            out_features=STAGES,
            output_stride=output_stride,
            in_channels=in_channels,
            drop_path_rate=drop_path_rate,
            execution=execution,
        )
        self.decode_head = DecodeHead(
            variant.widths,
            channels,
            num_classes,
            pool_scales=tuple(pool_scales),
            dropout_rate=dropout_rate,
            dtype=execution.dtype,
            key=decode_key,
        )
        if auxiliary_channels == 0:
            self.auxiliary_head = None
        else:
            self.auxiliary_head = AuxiliaryHead(
                variant.widths[AUXILIARY_STAGE],
                auxiliary_channels,
                num_classes,
                dropout_rate=dropout_rate,
                dtype=execution.dtype,
                key=auxiliary_key,
            )

    @property
    def variant(self) -> Variant:
        """The architecture of the backbone."""
        return self.backbone.variant

    @property
    def in_channels(self) -> int:
        """The number of channels of the images."""
        return self.backbone.in_channels

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return self.decode_head.classifier.bias.shape[0]

    def multiply_adds(self, image_size: int) -> int:
        """Multiply-adds of the convolutions and linear layers in the forward pass of a square image, with all heads."""
        map_sides = [image_size // stride for stride in self.variant.strides]
        sides = {'bottleneck': map_sides[-1], 'fpn_bottleneck': map_sides[0], 'classifier': map_sides[0]}
        sides |= {f'pooling.{i}': scale for i, scale in enumerate(self.decode_head.pool_scales)}
        for i, side in enumerate(map_sides[:-1]):
            sides |= {f'lateral_convs.{i}': side, f'fpn_convs.{i}': side}
        auxiliary_sides = dict.fromkeys(('conv', 'classifier'), map_sides[AUXILIARY_STAGE])
        total = self.variant.multiply_adds(image_size, 0, self.in_channels)
        for head, output_sides in ((self.decode_head, sides), (self.auxiliary_head, auxiliary_sides)):
            for name, x in get_parameters(head).items() if head else ():
                if name.endswith('.kernel'):
                    total += x.size * output_sides[name.removesuffix('.kernel')] ** 2
        return total

    def __call__(
        self,
        images: Float[AnyArray, 'n h w c'],
        *,
        key: Key[Array, '*n'] | None = None,
        sizes: Int[Array, 'n 2'] | None = None,
    ) -> Float[Array, 'n h w classes']:
        """The logits of each pixel, (N, H, W, num_classes) float32.

        Args:
            images, key: as for `head_logits`.
            sizes: for inference with padded images, as for `logits_within`; None for images without padding.

        Raises:
            UserError: as for `head_logits`.
        """
        if sizes is None:
            return resize(self.head_logits(images, key=key).main, images.shape[1:3])
        logits, extent = self.logits_within(images, sizes)
        return resize_part(logits, extent, Extent(sizes), images.shape[1:3])

    def logits_within(
        self, images: Float[AnyArray, 'n h w c'], sizes: Int[Array, 'n 2']
    ) -> tuple[Float[Array, 'n rows columns classes'], Extent]:
        """The logits of the main head for padded images, at the resolution at which they are computed.

        They are equal to the logits of the images without padding. An image with a side below the largest stride is
        extended with zeros to this length; these zeros count as a part of the image.

        Args:
            images: (N, H, W, in_channels) float, normalised, padded at the bottom and at the right.
            sizes: (N, 2) int32, height and width without padding.

        Returns:
            (N, rows, columns, num_classes) float32, and the part of it that is not padding.

        Raises:
            UserError: as for `Backbone.features`.
        """
        smallest = self.backbone.output_stride
        images = Extent(sizes).keep(jnp.asarray(images))
        below, right = (max(smallest - side, 0) for side in images.shape[1:3])
        images = jnp.pad(images, ((0, 0), (0, below), (0, right), (0, 0)))
        extent = Extent(jnp.maximum(sizes, smallest))
        maps = self.backbone(images, extent=extent)
        extents = self.backbone.extents(extent)
        logits = self.decode_head(list(maps.values()), None, [extents[name] for name in maps])
        return logits, extents[STAGES[0]]

    def head_logits(self, images: Float[AnyArray, 'n h w c'], *, key: Key[Array, '*n'] | None = None) -> HeadLogits:
        """The logits of both heads at the resolution at which they are computed.

        Args:
            images: (N, H, W, in_channels) float, normalised.
            key: in training, one random key, or (N,) keys, one for each image. None for inference.

        Raises:
            UserError: as for `Backbone.features`; or in training, the global batch has only one image.
        """
        if key is not None:
            check_key(key, ((), images.shape[:1]))
            key = jax.random.split(key, images.shape[0]) if key.ndim == 0 else key
        maps = list(self.backbone(images, key=key).values())
        main_keys, auxiliary_keys = self._dropout_keys(key)
        main = self.decode_head(maps, main_keys)
        if self.auxiliary_head is None:
            return HeadLogits(main, None)
        return HeadLogits(main, self.auxiliary_head(maps[AUXILIARY_STAGE], auxiliary_keys))

    def _dropout_keys(self, keys: Key[Array, ' n'] | None) -> tuple[Key[Array, ' n'] | None, Key[Array, ' n'] | None]:
        """The keys of both heads, which differ from those of the blocks: a block's key has its index folded in."""
        if keys is None:
            return None, None
        blocks = sum(self.variant.depths)
        main, auxiliary = (jax.vmap(jax.random.fold_in, (0, None))(keys, blocks + head) for head in (0, 1))
        return main, auxiliary


def resize(x: Float[Array, 'n h w c'], size: tuple[int, ...]) -> Float[Array, 'n rows columns c']:
    """Bilinear interpolation to `size`, (rows, columns), as `interpolate(…, align_corners=False)` in PyTorch.

    Args:
        x: (N, H, W, C) float.
        size: the new height and width.

    Returns:
        (N, rows, columns, C) of x's dtype.
    """
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), 'linear', antialias=False)


def _resize_within(
    x: Float[Array, 'n h w c'], size: tuple[int, ...], old: Extent | None, new: Extent | None
) -> Float[Array, 'n rows columns c']:
    """`resize`, or `resize_part` if the parts that are not padding are given."""
    return resize(x, size) if old is None or new is None else resize_part(x, old, new, size)


def _keep(x: Float[Array, 'n h w c'], extent: Extent | None) -> Float[Array, 'n h w c']:
    return x if extent is None else extent.keep(x)


def adaptive_average_pool(
    x: Float[Array, 'n h w c'], bins: int, extent: Extent | None = None
) -> Float[Array, 'n bins bins c']:
    """The mean over each of `bins` × `bins` parts of the map, as `AdaptiveAvgPool2d` in PyTorch.

    Bin i of an axis of length n covers the positions from ⌊i · n / bins⌋ to ⌈(i + 1) · n / bins⌉, so the bins overlap
    if their number does not divide n.

    Args:
        x: (N, H, W, C) float.
        bins: number of bins along each axis.
        extent: the part of each map that is pooled; None for the whole map.

    Returns:
        (N, bins, bins, C) of x's dtype; the means are computed in float32.
    """
    wide, precision = x.astype(jnp.float32), jax.lax.Precision.HIGHEST
    if extent is not None:
        rows, columns = (bin_weights(extent.sizes[:, axis], bins, x.shape[1 + axis]) for axis in (0, 1))
        return jnp.einsum('nih,njw,nhwc->nijc', rows, columns, wide, precision=precision).astype(x.dtype)
    rows, columns = (_bin_weights(length, bins) for length in x.shape[1:3])
    return jnp.einsum('ih,jw,nhwc->nijc', rows, columns, wide, precision=precision).astype(x.dtype)


def _bin_weights(length: int, bins: int) -> np.ndarray:
    """The weight of each position in the mean of each bin: (bins, length) float32."""
    weights = np.zeros((bins, length), np.float32)
    for i in range(bins):
        start, stop = i * length // bins, -(-(i + 1) * length // bins)
        weights[i, start:stop] = 1 / (stop - start)
    return weights


def _classifier(channels: int, num_classes: int, *, key: Key[Array, '']) -> Linear:
    """A linear layer in float32 whose initial kernel has the standard deviation 0.01, as in mmsegmentation."""
    classifier = Linear(channels, num_classes, key=key)
    classifier.kernel[...] *= 0.5  # `Linear` has 0.02
    return classifier


def _drop_channels(x: Float[Array, 'n h w c'], rate: float, keys: Key[Array, ' n'] | None) -> Float[Array, 'n h w c']:
    """Sets channels of an image to 0 with probability `rate`, and divides the others by 1 − rate. Without keys: x."""
    if keys is None or rate == 0:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[-1:]))(keys)
    return (x * jnp.where(kept, 1 / (1 - rate), 0)[:, None, None]).astype(x.dtype)
