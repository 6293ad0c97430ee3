"""The trunk of a ConvNeXt V1 (arXiv:2201.03545) or V2 (arXiv:2301.00808): stem, blocks, downsampling layers, stages.

All modules are Flax NNX modules, used as plain JAX pytrees.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from convnext_jax.errors import UserError
from convnext_jax.models.activation import ACTIVATION_FUNCTIONS, gelu_and_response_norm
from convnext_jax.models.depthwise import depthwise_conv
from convnext_jax.models.execution import Execution
from convnext_jax.models.extent import Extent
from convnext_jax.models.layers import (
    GRN,
    STATISTICS,
    Linear,
    PatchConv,
    SameConv,
    conv_layout,
    drop_path,
    normal,
)
from convnext_jax.models.masked import Visible, masked_gelu_and_response_norm, pack, unpack
from convnext_jax.models.norms import create_norm
from convnext_jax.models.parameters import AnyArray
from convnext_jax.models.stems import create_stem
from convnext_jax.models.variants import Variant


class Depthwise(nnx.Module):
    """A depthwise convolution, by default 7×7, with bias: (N, H, W, C) → (N, H, W, C) of `execution.dtype`."""

    def __init__(
        self, channels: int, *, kernel_size: int = 7, dilation: int, execution: Execution, key: Key[Array, '']
    ):
        self.kernel = nnx.Param(normal(key, (kernel_size, kernel_size, channels)), decays=True)
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.dilation = dilation
        self.execution = execution

    def __call__(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n h w c']:
        dtype, pallas = self.execution.dtype, self.execution.pallas
        y = depthwise_conv(x.astype(dtype), self.kernel[...], dilation=self.dilation, pallas=pallas)
        return (y + self.bias).astype(dtype)


class Block(nnx.Module):
    """Depthwise 7×7 → LayerNorm → Linear C→4C → GELU → [GRN] → Linear 4C→C → [layer scale] → drop path → + input.

    `variant` decides whether the parts in brackets exist, and may choose another norm or activation; `kernel_size` and
    `dilation` apply to the depthwise convolution.
    """

    def __init__(
        self,
        channels: int,
        *,
        variant: Variant,
        execution: Execution,
        kernel_size: int = 7,
        dilation: int,
        key: Key[Array, ''],
    ):
        keys = jax.random.split(key, 3)
        scale = variant.layer_scale_init
        self.depthwise = Depthwise(
            channels, kernel_size=kernel_size, dilation=dilation, execution=execution, key=keys[0]
        )
        self.norm = create_norm(variant, channels)
        self.pointwise1 = Linear(channels, 4 * channels, dtype=execution.dtype, key=keys[1])
        self.grn = GRN(4 * channels) if variant.grn else None
        self.pointwise2 = Linear(4 * channels, channels, dtype=execution.dtype, key=keys[2])
        self.layer_scale = nnx.Param(jnp.full(channels, scale, jnp.float32)) if scale else None
        self.activation = variant.activation
        self.execution = execution

    def __call__(
        self,
        x: Float[Array, 'n h w c'],
        drop_rate: Float[Array, ''],
        keys: Key[Array, ' n'] | None,
        visible: Visible | Extent | None = None,
    ) -> Float[Array, 'n h w c']:
        """The output, (N, H, W, C).

        Args:
            x: (N, H, W, C) float; with `visible`, 0 at the invisible positions.
            drop_rate: probability in [0, 1) with which an image's branch is dropped.
            keys: (N,) random keys, one for each image, or None to drop nothing.
            visible: the visible patches, or the part that is not padding; the output is 0 at the other positions. None
                for all.
        """
        run = self._checkpoint(Block.run) if self.execution.remat == 'full' else Block.run
        return run(self, x, drop_rate, keys, visible)

    def run(
        self,
        x: Float[Array, 'n h w c'],
        drop_rate: Float[Array, ''],
        keys: Key[Array, ' n'] | None,
        visible: Visible | Extent | None = None,
    ) -> Float[Array, 'n h w c']:
        """The computation of the block, which remat='full' wraps in `jax.checkpoint`."""
        expand, contract = Block.expand, Block.contract
        if self.execution.remat == 'dots':
            # Each of the two parts starts from the saved result of a convolution or matrix product, and ends with the
            # next matrix product. The backward pass recomputes the operations in between, but not this last product.
            policy = jax.checkpoint_policies.save_only_these_names(STATISTICS)
            expand, contract = (self._checkpoint(part, policy=policy) for part in (expand, contract))
        x = conv_layout(x)
        branch = self.depthwise(x)
        if visible is None:
            branch = contract(self, expand(self, branch))
        elif isinstance(visible, Extent):
            branch = visible.keep(contract(self, expand(self, branch), visible))
        else:
            branch = contract(self, expand(self, pack(branch, visible)), visible.packed)
            branch = unpack(branch, visible)
        if keys is not None:
            branch = drop_path(branch, drop_rate, keys)
        return conv_layout(x + branch)

    def _checkpoint(self, part: Callable, policy: Callable | None = None) -> Callable:
        # In a loop the compiler cannot merge the recomputation with the forward pass, so only unrolled blocks need
        # `prevent_cse`.
        return jax.checkpoint(part, policy=policy, prevent_cse=self.execution.unroll)

    def expand(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n h w 4*c']:
        """Norm and first linear layer without its bias: (N, H, W, C) → (N, H, W, 4C)."""
        return conv_layout(self.pointwise1.product(self.norm(x)))

    def contract(
        self, x: Float[Array, 'n h w hidden'], visible: Visible | Extent | None = None
    ) -> Float[Array, 'n h w c']:
        """Bias, activation, second linear layer and layer scale: (N, H, W, 4C) → (N, H, W, C)."""
        bias = self.pointwise1.bias[...]
        if self.grn is None:
            x = ACTIVATION_FUNCTIONS[self.activation](x, bias)
        elif visible is None:
            x = gelu_and_response_norm(x, bias, self.grn.gamma[...], self.grn.beta[...])
        else:
            x = masked_gelu_and_response_norm(x, bias, self.grn.gamma[...], self.grn.beta[...], visible)
        return self.pointwise2(x, scale=None if self.layer_scale is None else self.layer_scale[...])


class Downsample(nnx.Module):
    """Norm and 2×2 convolution of stride 2 between two stages: (N, H, W, in) → (N, H // 2, W // 2, out).

    Before a dilated stage the convolution has stride 1 and preserves H and W.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        variant: Variant,
        dilation: int,
        execution: Execution,
        key: Key[Array, ''],
    ):
        dtype = execution.dtype
        self.norm = create_norm(variant, in_channels)
        if dilation == 1:
            self.conv: PatchConv | SameConv = PatchConv(in_channels, out_channels, 2, dtype=dtype, key=key)
        else:
            # As in timm: the dilation of the previous stage, but at most 2.
            self.conv = SameConv(in_channels, out_channels, 2, dilation=min(dilation // 2, 2), dtype=dtype, key=key)

    def __call__(self, x: Float[Array, 'n h w in'], extent: Extent | None = None) -> Float[Array, 'n rows columns out']:
        """The output. `extent` is the part of x that is not padding; None for no padding."""
        x = self.norm(x)
        return self.conv(x if extent is None else extent.keep(x))

    def extent(self, extent: Extent) -> Extent:
        """The part of the output that is not padding, from the same part of the input."""
        return extent.divided(2) if isinstance(self.conv, PatchConv) else extent


class Stage(nnx.Module):
    """A downsampling layer, except in the first stage, and a series of equal blocks: (N, H, W, in) → (N, H', W', C).

    The parameters of the blocks are stacked along a leading axis, and `lax.scan` runs over this axis, so that 27 blocks
    compile as fast as one. With `execution.unroll` each block is compiled separately, from slices of these arrays.

    Attributes:
        drop_rates: drop rate of each block.
        dilation: dilation of the depthwise convolutions.
        execution: how the blocks are computed.
        first_block: index of the stage's first block in the whole model. A block's random keys are the images' keys
            with the block's index folded in (`jax.random.fold_in`).
    """

    def __init__(
        self,
        in_channels: int | None,
        channels: int,
        drop_rates: tuple[float, ...],
        *,
        kernel_size: int,
        dilation: int,
        first_block: int,
        variant: Variant,
        execution: Execution,
        key: Key[Array, ''],
    ):
        downsample_key, blocks_key = jax.random.split(key)
        if in_channels is None:
            self.downsample = None
        else:
            self.downsample = Downsample(
                in_channels, channels, variant=variant, dilation=dilation, execution=execution, key=downsample_key
            )

        def block(key: Key[Array, '']) -> Block:
            return Block(
                channels, variant=variant, execution=execution, kernel_size=kernel_size, dilation=dilation, key=key
            )

        self.blocks = jax.vmap(block)(jax.random.split(blocks_key, len(drop_rates)))
        self.drop_rates = drop_rates
        self.dilation = dilation
        self.execution = execution
        self.first_block = first_block

    def __call__(
        self, x: Float[Array, 'n h w in'], keys: Key[Array, ' n'] | None, visible: Visible | Extent | None = None
    ) -> Float[Array, 'n rows columns c']:
        """The output, (N, H', W', C).

        Args:
            x: (N, H, W, in) float; with `visible`, 0 at the invisible positions.
            keys: (N,) random keys, one for each image, or None.
            visible: the visible patches, or the part of x that is not padding; the output is 0 at the other positions.
                None for all.
        """
        if self.downsample is not None:
            if isinstance(visible, Extent):
                x = self.downsample(x, visible)
                visible = self.downsample.extent(visible)
            else:
                x = self.downsample(x)
            if visible is not None:
                x = visible.keep(x)

        def run(x, scanned):
            block, drop_rate, index = scanned
            block_keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, index)
            return block(x, drop_rate, block_keys, visible), None

        indices = self.first_block + jnp.arange(len(self.drop_rates))
        scanned = (self.blocks, jnp.asarray(self.drop_rates, jnp.float32), indices)
        return jax.lax.scan(run, x, scanned, unroll=self.execution.unroll)[0]


class Trunk(nnx.Module):
    """Stem and stages: the base class of the classifier and the backbone.

    Attributes:
        stem, stages: the parts, in the order in which they run.
        variant: the architecture.
        execution: how the network is computed.
        in_channels: channels of the images.
        drop_path_rate: drop rate of the last block, in [0, 1); the rates rise linearly from 0 at the first block.
        output_stride: the largest stride in pixels, by default the variant's; stages whose stride would be larger are
            dilated instead, as in timm.

    Raises:
        UserError: a value is out of its range, or `key` is not a key from `jax.random.key`.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        key: Key[Array, ''],
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        output_stride: int | None = None,
        execution: Execution = Execution(),
    ):
        check_key(key, ((),))
        output_stride = variant.total_stride if output_stride is None else output_stride
        if not 0 <= drop_path_rate < 1:
            raise UserError(f'drop_path_rate must be in [0, 1), not {drop_path_rate}')
        if in_channels < 1:
            raise UserError(f'in_channels must be at least 1, not {in_channels}')
        if not isinstance(output_stride, int) or output_stride not in variant.strides:
            raise UserError(f'output_stride must be one of {variant.strides}, not {output_stride}')
        stem_key, *stage_keys = jax.random.split(key, 1 + len(variant.depths))
        self.stem = create_stem(in_channels, variant=variant, execution=execution, key=stem_key)
        blocks = sum(variant.depths)
        rates = tuple(drop_path_rate * block / max(blocks - 1, 1) for block in range(blocks))
        stages = []
        for stage, (depth, width) in enumerate(zip(variant.depths, variant.widths, strict=True)):
            first = sum(variant.depths[:stage])
            stages.append(
                Stage(
                    variant.widths[stage - 1] if stage > 0 else None,
                    width,
                    rates[first : first + depth],
                    kernel_size=variant.kernel_sizes[stage],
                    dilation=max(variant.strides[stage] // output_stride, 1),
                    first_block=first,
                    variant=variant,
                    execution=execution,
                    key=stage_keys[stage],
                )
            )
        self.stages = nnx.List(stages)
        self.in_channels = in_channels
        self.drop_path_rate = drop_path_rate
        self.output_stride = output_stride
        self.variant = variant
        self.execution = execution

    @property
    def channels(self) -> dict[str, int]:
        """Name of a feature map → its number of channels."""
        return self._by_name(self.variant.widths[:1] + self.variant.widths)

    @property
    def strides(self) -> dict[str, int]:
        """Name of a feature map → its stride: the distance between neighbouring positions, in pixels of the image."""
        strides = (self.variant.patch_size, *self.variant.strides)
        return self._by_name(min(stride, self.output_stride) for stride in strides)

    def features(
        self,
        images: Float[AnyArray, 'n h w c'],
        *,
        key: Key[Array, '*n'] | None = None,
        visible: Visible | Extent | None = None,
    ) -> dict[str, Float[Array, 'n rows columns channels']]:
        """Name → feature map, (N, H // stride, W // stride, C) of `execution.dtype`: 'stem', 'stage1', …

        Args:
            images: (N, H, W, in_channels) float, normalised.
            key: in training, one random key, or (N,) keys, one for each image; the blocks that are dropped for an image
                depend on its key only. None for inference, which drops nothing.
            visible: the visible patches, or the part of each image that is not padding (see `extents`); the maps are 0
                elsewhere, and pixels elsewhere have no effect. None for all.

        Raises:
            UserError: the images have another rank or number of channels, or a side below the largest stride; `key` is
                not a key from `jax.random.key`, or its shape is neither () nor (N,); a side of the patches is not a
                multiple of the total stride, stages are dilated, or the stem mixes neighbouring patches.
        """
        self._check(images)
        images = jnp.asarray(images)
        if isinstance(visible, Visible):
            self._check_patches(images, visible)
        if visible is not None:
            images = visible.keep(images)
        if key is not None:
            check_key(key, ((), images.shape[:1]))
        if self.drop_path_rate == 0:
            key = None
        if key is not None and key.ndim == 0:
            key = jax.random.split(key, images.shape[0])
        if isinstance(visible, Extent):
            stem, extents = self.stem(images, visible), self.extents(visible)
            maps = [extents['stem'].keep(stem)]
            inputs = list(extents.values())[:-1]
        else:
            stem = self.stem(images)
            maps = [stem if visible is None else visible.keep(stem)]
            inputs = [visible] * len(self.stages)
        for stage, part in zip(self.stages, inputs, strict=True):
            maps.append(stage(maps[-1], key, part))
        return self._by_name(maps)

    def extents(self, images: Extent) -> dict[str, Extent]:
        """Name → the part of each feature map that is not padding.

        Args:
            images: the part of each image that is not padding, at least as large as the largest stride.
        """
        extents = [self.stem.extent(images)]
        for stage in self.stages:
            extents.append(extents[-1] if stage.downsample is None else stage.downsample.extent(extents[-1]))
        return self._by_name(extents)

    def pooled(
        self, images: Float[AnyArray, 'n h w c'], *, key: Key[Array, '*n'] | None = None
    ) -> Float[Array, 'n channels']:
        """The spatial average of the last feature map, (N, C) float32; arguments and errors as for `features`."""
        return list(self.features(images, key=key).values())[-1].mean((1, 2), dtype=jnp.float32)

    @staticmethod
    def _by_name(values: Iterable) -> dict:
        return {f'stage{stage}' if stage else 'stem': value for stage, value in enumerate(values)}

    def _check(self, images: AnyArray) -> None:
        if images.ndim != 4 or images.shape[3] != self.in_channels:
            raise UserError(f'images must have shape (N, H, W, {self.in_channels}), not {images.shape}')
        height, width = images.shape[1:3]
        if min(height, width) < self.output_stride:
            raise UserError(
                f'images of {height}×{width} pixels are smaller than the total stride of {self.output_stride}: '
                'enlarge them, or set a smaller patch_size'
            )

    def _check_patches(self, images: jax.Array, visible: Visible) -> None:
        (height, width), (rows, columns) = images.shape[1:3], visible.patches.shape[1:]
        stride = self.variant.total_stride
        if height % (rows * stride) or width % (columns * stride):
            raise UserError(
                f'{rows}×{columns} patches of images of {height}×{width}: a side of a patch must be a multiple of the '
                f'total stride of {stride}'
            )
        if self.output_stride != stride:
            raise UserError(f'a trunk of output_stride={self.output_stride} is dilated and cannot see patches alone')
        if self.variant.stem != 'patch':
            raise UserError(f"the stem '{self.variant.stem}' mixes neighbouring patches: masks need a patch stem")


def check_key(key: jax.Array, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Checks that `key` is a random key of one of these shapes.

    Raises:
        UserError: `key` is not a random key, or has another shape; the message says what to pass.
    """
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise UserError(f'key must be a key such as jax.random.key(0), not {type(key).__name__}')
    if key.shape not in shapes:
        raise UserError(f'key has shape {key.shape}: pass {" or ".join(map(str, shapes))}')
