"""The stems: the layers from the image to the first stage. Their stride is the patch size, or 4 pixels."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from convnext_jax.models.activation import ACTIVATION_FUNCTIONS
from convnext_jax.models.execution import Execution
from convnext_jax.models.extent import Extent
from convnext_jax.models.layers import PatchConv, normal
from convnext_jax.models.norms import create_norm
from convnext_jax.models.variants import Variant


class PatchStem(nnx.Module):
    """The patch embedding: (N, H, W, in) → (N, H // patch_size, W // patch_size, C)."""

    def __init__(self, in_channels: int, *, variant: Variant, execution: Execution, key: Key[Array, '']):
        channels = variant.widths[0]
        self.conv = PatchConv(in_channels, channels, variant.patch_size, dtype=execution.dtype, key=key)
        self.norm = create_norm(variant, channels) if variant.stem_norm else None

    def __call__(self, x: Float[Array, 'n h w in'], extent: Extent | None = None) -> Float[Array, 'n rows columns c']:
        """The output. `extent`, the part of x that is not padding, is not needed: its patches contain no padding."""
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)

    def extent(self, extent: Extent) -> Extent:
        """The part of the output that is not padding, from the same part of the input."""
        return extent.divided(len(self.conv.kernel))


class HalvingConv(nnx.Module):
    """A 3×3 convolution of stride 2 with a padding of 1: (N, H, W, in) → (N, ⌈H / 2⌉, ⌈W / 2⌉, out)."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype: DTypeLike, key: Key[Array, '']):
        self.kernel = nnx.Param(normal(key, (3, 3, in_channels, out_channels)), decays=True)
        self.bias = nnx.Param(jnp.zeros(out_channels, jnp.float32))
        self.dtype = dtype

    def product(self, x: Float[Array, 'n h w in']) -> Float[Array, 'n rows columns out']:
        """The convolution without the bias."""
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            window_strides=(2, 2),
            padding=((1, 1), (1, 1)),
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )

    def __call__(self, x: Float[Array, 'n h w in']) -> Float[Array, 'n rows columns out']:
        return (self.product(x) + self.bias[...]).astype(self.dtype)


class OverlapStem(nnx.Module):
    """Two 3×3 convolutions of stride 2, and a norm: (N, H, W, in) → (N, ⌈H / 4⌉, ⌈W / 4⌉, C).

    If `variant.stem` is 'overlap_act', an activation follows the first convolution.
    """

    def __init__(self, in_channels: int, *, variant: Variant, execution: Execution, key: Key[Array, '']):
        first_key, second_key = jax.random.split(key)
        between, dtype = variant.stem_channels, execution.dtype
        self.first_conv = HalvingConv(in_channels, between, dtype=dtype, key=first_key)
        self.second_conv = HalvingConv(between, variant.widths[0], dtype=dtype, key=second_key)
        self.norm = create_norm(variant, variant.widths[0])
        self.activation = variant.activation if variant.stem == 'overlap_act' else None

    def __call__(self, x: Float[Array, 'n h w in'], extent: Extent | None = None) -> Float[Array, 'n rows columns c']:
        """The output. `extent` is the part of x that is not padding (x is 0 in the padding); None for no padding."""
        if self.activation is None:
            x = self.first_conv(x)
        else:
            x = ACTIVATION_FUNCTIONS[self.activation](self.first_conv.product(x), self.first_conv.bias[...])
        if extent is not None:
            x = extent.halved_up().keep(x)
        return self.norm(self.second_conv(x))

    def extent(self, extent: Extent) -> Extent:
        """The part of the output that is not padding, from the same part of the input."""
        return extent.halved_up().halved_up()


def create_stem(
    in_channels: int, *, variant: Variant, execution: Execution, key: Key[Array, '']
) -> PatchStem | OverlapStem:
    """The newly initialised stem of the architecture."""
    stem = PatchStem if variant.stem == 'patch' else OverlapStem
    return stem(in_channels, variant=variant, execution=execution, key=key)
