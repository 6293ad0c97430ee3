"""ConvNeXt V1 and V2 as classifiers."""

import jax
import jax.numpy as jnp

from convnext_jax.errors import UserError
from convnext_jax.models.layers import LayerNorm, Linear
from convnext_jax.models.trunk import Trunk, check_key
from convnext_jax.models.variants import Variant, get_variant


class ConvNeXt(Trunk):
    """The classifier; see `create_model`.

    Attributes:
        stem, stages, norm, head: the parts, in the order of the data.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        num_classes: int,
        in_channels: int,
        drop_path_rate: float,
        head_init_scale: float,
        layer_norm_eps: float,
        remat: str,
        unroll: bool,
        pallas: bool,
        dtype: jnp.dtype | str,
        key: jax.Array,
    ):
        check_key(key, ((),))
        trunk_key, head_key = jax.random.split(key)
        super().__init__(
            variant,
            in_channels=in_channels,
            drop_path_rate=drop_path_rate,
            output_stride=variant.total_stride,
            remat=remat,
            unroll=unroll,
            pallas=pallas,
            dtype=dtype,
            key=trunk_key,
        )
        self.norm = LayerNorm(variant.widths[-1], epsilon=layer_norm_eps)
        # The head is a ten-thousandth of the work: it stays in float32 whatever the compute type.
        self.head = Linear(variant.widths[-1], num_classes, key=head_key)
        self.head.kernel[...] *= head_init_scale

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Class logits, (N, num_classes) float32; arguments and errors as `features`."""
        last = list(self.features(images, key=key).values())[-1]
        return self.head(self.norm(last.mean((1, 2), dtype=jnp.float32)))


def create_model(
    name: str | Variant,
    *,
    key: jax.Array,
    num_classes: int = 1000,
    drop_path_rate: float = 0.0,
    layer_scale_init: float | None = None,
    head_init_scale: float = 1.0,
    layer_norm_eps: float = 1e-6,
    in_channels: int = 3,
    patch_size: int | None = None,
    remat: str = 'dots',
    unroll: bool = False,
    pallas: bool = False,
    dtype: jnp.dtype | str = jnp.float32,
) -> ConvNeXt:
    """A freshly initialised model.

    Args:
        name: one of `list_models()`, or an architecture that is none of them.
        key: random key of the initialisation.
        num_classes: outputs of the head.
        drop_path_rate: drop rate of the last block, in [0, 1); it applies when the model is called with a key.
        layer_scale_init: first value of the layer scale, 0 for none; by default the variant's own.
        head_init_scale: factor on the head's first weights (0.001 when the originals fine-tune).
        layer_norm_eps: epsilon of the last norm; Hugging Face's models have 1e-12 there.
        in_channels: channels of the images.
        patch_size: kernel and stride of the stem in pixels; by default the variant's own.
        remat: what the blocks keep for the backward pass: 'none' is recomputed, all but 'dots' (matrix products,
            convolutions, means of norms; half the memory), or the 'full' block (a third of it, a third more work).
        unroll: compiles every block by itself, in place of one for each stage and a loop: about twice as long, for
            training 1 to 3 % faster on CPU (evaluation is slower) and, on TPU, with a quarter less memory.
        pallas: takes our kernel for the depthwise convolutions on TPU v5e, v5p and v6e (`depthwise_tpu.py`), where
            their shapes allow, and not the compiler's; on CPU and GPU it changes nothing. With several devices such
            a model must be called inside `jax.shard_map`. It has been run on no TPU.
        dtype: float type of matrix products and convolutions; parameters, their gradients, norms and logits are
            float32. Derivatives are in reverse mode: there is no `jax.jvp`.

    Raises:
        UserError: an unknown name, or a value out of its range.
    """
    if num_classes < 1:
        raise UserError(f'num_classes must be at least 1, not {num_classes}')
    if not layer_norm_eps > 0:
        raise UserError(f'layer_norm_eps must be above 0, not {layer_norm_eps}')
    return ConvNeXt(
        get_variant(name).replace(patch_size=patch_size, layer_scale_init=layer_scale_init),
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path_rate=drop_path_rate,
        head_init_scale=head_init_scale,
        layer_norm_eps=layer_norm_eps,
        remat=remat,
        unroll=unroll,
        pallas=pallas,
        dtype=dtype,
        key=key,
    )
