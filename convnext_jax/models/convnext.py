"""ConvNeXt V1 and V2 as classifiers."""

from typing import Unpack

import jax
from jaxtyping import Array, Float, Key

from convnext_jax.errors import UserError
from convnext_jax.models.execution import Execution, ExecutionOptions
from convnext_jax.models.layers import LayerNorm, Linear
from convnext_jax.models.parameters import AnyArray
from convnext_jax.models.trunk import Trunk, check_key
from convnext_jax.models.variants import Variant, get_variant


class ConvNeXt(Trunk):
    """The classifier: trunk, global average pooling, LayerNorm and a linear head.

    The arguments have the meaning that they have in `create_model`, except that `variant` and `execution` are objects.

    Attributes:
        stem, stages, norm, head: the parts, in the order in which they run.

    Raises:
        UserError: a value is out of its range, or `key` is not a key from `jax.random.key`.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        key: Key[Array, ''],
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        head_init_scale: float = 1.0,
        layer_norm_eps: float = 1e-6,
        in_channels: int = 3,
        execution: Execution = Execution(),
    ):
        check_key(key, ((),))
        if num_classes < 1:
            raise UserError(f'num_classes must be at least 1, not {num_classes}')
        if not layer_norm_eps > 0:
            raise UserError(f'layer_norm_eps must be above 0, not {layer_norm_eps}')
        trunk_key, head_key = jax.random.split(key)
        super().__init__(
            variant, key=trunk_key, in_channels=in_channels, drop_path_rate=drop_path_rate, execution=execution
        )
        self.norm = LayerNorm(variant.widths[-1], epsilon=layer_norm_eps)
        # The head is 0.01 % of the computation, so it is always computed in float32, not in `execution.dtype`.
        self.head = Linear(variant.widths[-1], num_classes, key=head_key)
        self.head.kernel[...] *= head_init_scale

    def __call__(
        self, images: Float[AnyArray, 'n h w c'], *, key: Key[Array, '*n'] | None = None
    ) -> Float[Array, 'n classes']:
        """Class logits, (N, num_classes) float32; arguments and errors as for `features`."""
        return self.head(self.norm(self.pooled(images, key=key)))


def create_model(
    name: str | Variant,
    *,
    key: Key[Array, ''],
    num_classes: int = 1000,
    drop_path_rate: float = 0.0,
    layer_scale_init: float | None = None,
    head_init_scale: float = 1.0,
    layer_norm_eps: float = 1e-6,
    in_channels: int = 3,
    patch_size: int | None = None,
    **options: Unpack[ExecutionOptions],
) -> ConvNeXt:
    """A newly initialised classifier.

    It supports reverse-mode differentiation (`jax.grad`, `jax.vjp`), but not forward mode (`jax.jvp`).

    Args:
        name: one of `list_models()`, or a `Variant`.
        key: random key of the initialisation, as from `jax.random.key`.
        num_classes: number of outputs of the head.
        drop_path_rate: drop rate of the last block, in [0, 1); it applies when the model is called with a key.
        layer_scale_init: initial value of the layer scale, 0 for no layer scale; by default the variant's value.
        head_init_scale: factor on the initial kernel of the head; the original fine-tuning recipes use 0.001.
        layer_norm_eps: epsilon of the last norm; Hugging Face's models use 1e-12.
        in_channels: channels of the images.
        patch_size: kernel size and stride of the stem in pixels; by default the variant's value.
        options: how the model is computed: the fields `dtype`, `remat`, `unroll` and `pallas` of `models.Execution`.

    Raises:
        TypeError: an unknown keyword.
        UserError: an unknown name, or a value out of its range.
    """
    return ConvNeXt(
        get_variant(name).replace(patch_size=patch_size, layer_scale_init=layer_scale_init),
        key=key,
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
        head_init_scale=head_init_scale,
        layer_norm_eps=layer_norm_eps,
        in_channels=in_channels,
        execution=Execution.from_keywords(create_model, options),
    )
