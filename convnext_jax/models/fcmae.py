"""The fully convolutional masked autoencoder of ConvNeXt V2's pre-training (arXiv:2301.00808, section 3)."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Key

from convnext_jax.errors import UserError
from convnext_jax.models.execution import Execution
from convnext_jax.models.layers import Linear
from convnext_jax.models.masked import Visible
from convnext_jax.models.parameters import AnyArray
from convnext_jax.models.trunk import Block, Trunk
from convnext_jax.models.variants import Variant

Leaf = TypeVar('Leaf')
DECODER_WIDTH = 512
DECODER = 'decoder.'
"""Prefix of the names of the decoder's parameters. The parameters of the encoder are named as in a classifier."""
PATCH_SIZE = 32
"""Side in pixels of a patch that the decoder predicts. Each position of the encoder's last map is one patch."""


class Decoder(nnx.Module):
    """Predicts the pixels of all patches from the encoder's map: a linear layer, a V2 block, a linear layer.

    Attributes:
        project: linear layer from the encoder's channels to the block's.
        mask_token: (DECODER_WIDTH,), a learned vector that is the input of the block at masked positions.
        block: a block of ConvNeXt V2.
        predict: linear layer from the block's channels to the pixels of a patch.
    """

    def __init__(self, width: int, channels: int, *, execution: Execution, key: Key[Array, '']):
        project_key, token_key, block_key, predict_key = jax.random.split(key, 4)
        dtype, variant = execution.dtype, Variant((1,), (DECODER_WIDTH,), grn=True, layer_scale_init=0)
        self.project = Linear(width, DECODER_WIDTH, dtype=dtype, key=project_key)
        self.mask_token = nnx.Param(0.02 * jax.random.normal(token_key, (DECODER_WIDTH,)))
        self.block = Block(DECODER_WIDTH, variant=variant, execution=execution, dilation=1, key=block_key)
        self.predict = Linear(DECODER_WIDTH, PATCH_SIZE**2 * channels, dtype=dtype, key=predict_key)

    def __call__(
        self, x: Float[Array, 'n rows columns width'], visible: Visible
    ) -> Float[Array, 'n rows columns pixels']:
        """The predicted pixels: (N, rows, columns, width) → (N, rows, columns, 32² · channels) float32."""
        x = self.project(x)
        token = jnp.broadcast_to(self.mask_token[...].astype(x.dtype), x.shape)
        x = jnp.where(visible.positions(x), x, token)
        return self.predict(self.block(x, jnp.float32(0), None)).astype(jnp.float32)


class MaskedAutoencoder(Trunk):
    """A trunk that encodes the visible patches of an image, and a decoder that predicts the masked ones.

    Args:
        variant: architecture of the encoder.
        key: random key for the parameters.
        in_channels, drop_path_rate, execution: as for `Trunk`.

    Raises:
        UserError: the total stride of the encoder is not 32, or as for `Trunk`.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        key: Key[Array, ''],
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        execution: Execution = Execution(),
    ):
        if variant.total_stride != PATCH_SIZE:
            raise UserError(f'FCMAE needs a backbone with a total stride of {PATCH_SIZE}, not {variant.total_stride}')
        trunk_key, decoder_key = jax.random.split(key)
        super().__init__(
            variant, key=trunk_key, in_channels=in_channels, drop_path_rate=drop_path_rate, execution=execution
        )
        self.decoder = Decoder(variant.widths[-1], in_channels, execution=execution, key=decoder_key)

    def __call__(
        self, images: Float[AnyArray, 'n h w c'], visible: Visible, *, key: Key[Array, '*n'] | None = None
    ) -> Float[Array, 'n rows columns pixels']:
        """Predicts the normalised pixels of all patches, in the order of `patches_of`.

        Args:
            images: (N, H, W, in_channels) float, normalised; H and W are multiples of 32, the side of a patch.
            visible: the visible patches.
            key: as for `features`.

        Returns:
            (N, H / 32, W / 32, 32² · in_channels) float32.

        Raises:
            UserError: as for `features`.
        """
        last = list(self.features(images, key=key, visible=visible).values())[-1]
        return self.decoder(last, visible)


def patches_of(images: Float[Array, 'n h w c']) -> Float[Array, 'n rows columns pixels']:
    """The pixels of each patch, row by row: (N, H, W, C) → (N, H / 32, W / 32, 32² · C)."""
    return rearrange(images, 'n (rows p) (columns q) c -> n rows columns (p q c)', p=PATCH_SIZE, q=PATCH_SIZE)


def images_of(patches: Float[Array, 'n rows columns pixels']) -> Float[Array, 'n h w c']:
    """The inverse of `patches_of`."""
    return rearrange(patches, 'n rows columns (p q c) -> n (rows p) (columns q) c', p=PATCH_SIZE, q=PATCH_SIZE)


def patch_statistics(
    patches: Float[Array, '*batch pixels'],
) -> tuple[Float[Array, '*batch 1'], Float[Array, '*batch 1']]:
    """Mean and standard deviation of the pixels of each patch: (…, P) → two arrays (…, 1)."""
    variance = patches.var(-1, ddof=1, keepdims=True)  # unbiased, as `torch.var` in the original
    return patches.mean(-1, keepdims=True), jnp.sqrt(variance + 1e-6)


def patch_errors(
    predicted: Float[Array, 'n rows columns pixels'], images: Float[Array, 'n h w c']
) -> Float[Array, 'n rows columns']:
    """The mean squared error of each patch. The target is the patch normalised to mean 0 and variance 1.

    Args:
        predicted: (N, rows, columns, P), from `MaskedAutoencoder`.
        images: (N, H, W, C).

    Returns:
        (N, rows, columns) float32.
    """
    patches = patches_of(images)
    mean, std = patch_statistics(patches)
    return jnp.square(predicted - (patches - mean) / std).mean(-1)


def reconstruct(
    predicted: Float[Array, 'n rows columns pixels'], images: Float[Array, 'n h w c'], visible: Visible
) -> Float[Array, 'n h w c']:
    """The images, with predictions in the masked patches: (N, H, W, C).

    The network predicts normalised pixels, so each patch gets the mean and standard deviation that it has in the image.
    """
    mean, std = patch_statistics(patches_of(images))
    return jnp.where(visible.positions(images), images, images_of(predicted * std + mean))


def split_decoder(weights: dict[str, Leaf]) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """Splits weights, or their shapes, into two parts: encoder and decoder. The second is {} without a decoder."""
    decoder = {name: x for name, x in weights.items() if name.startswith(DECODER)}
    return {name: x for name, x in weights.items() if name not in decoder}, decoder
