"""ConvNeXt V1 and V2 as classifiers."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from convnext_jax.errors import UserError
from convnext_jax.models.activation import gelu
from convnext_jax.models.execution import Execution, ExecutionOptions
from convnext_jax.models.layers import Linear
from convnext_jax.models.norms import create_norm
from convnext_jax.models.parameters import AnyArray
from convnext_jax.models.trunk import Trunk, check_key
from convnext_jax.models.variants import Variant, get_variant

AFTER_TRUNK = ('norm.scale', 'norm.bias', 'hidden.kernel', 'hidden.bias', 'head.kernel', 'head.bias')
"""Names of the parameters that a classifier may have after the trunk."""


class Tokens(NamedTuple):
    """Feature vectors of images: of a whole image, and of its patches.

    Attributes:
        pooled: (N, C) float32, the norm of the average of the last feature map.
        patches: (N, H // stride, W // stride, C), the norm of the last feature map.
    """

    pooled: Float[Array, 'n channels']
    patches: Float[Array, 'n rows columns channels']


class ConvNeXt(Trunk):
    """The classifier: trunk, global average pooling, LayerNorm and a linear head.

    `variant` may move the norm before the pooling, or add a hidden layer before the head. With `num_classes=0` there
    is no head, and the model returns the feature vector that a head would get.

    The arguments have the meaning that they have in `create_model`, except that `variant` and `execution` are objects.

    Attributes:
        stem, stages, norm, hidden, head: the parts, in the order in which they run; `hidden` is a linear layer with a
            GELU, or None; `head` may be None.

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
        layer_norm_eps: float | None = None,
        in_channels: int = 3,
        execution: Execution = Execution(),
    ):
        check_key(key, ((),))
        if num_classes < 0:
            raise UserError(f'num_classes must be at least 0, not {num_classes}')
        if layer_norm_eps is not None and not layer_norm_eps > 0:
            raise UserError(f'layer_norm_eps must be above 0, not {layer_norm_eps}')
        trunk_key, head_key = jax.random.split(key)
        super().__init__(
            variant, key=trunk_key, in_channels=in_channels, drop_path_rate=drop_path_rate, execution=execution
        )
        width, hidden = variant.widths[-1], variant.head_hidden
        self.norm = create_norm(variant, width, epsilon=layer_norm_eps)
        # The head is 0.01 % of the computation, so it is always computed in float32, not in `execution.dtype`.
        self.hidden = Linear(width, hidden, key=jax.random.fold_in(head_key, 0)) if hidden else None
        self.head = Linear(hidden or width, num_classes, key=head_key) if num_classes else None
        if self.head is not None:
            self.head.kernel[...] *= head_init_scale

    @property
    def num_classes(self) -> int:
        """Number of outputs of the head; 0 if there is none."""
        return 0 if self.head is None else self.head.bias.shape[0]

    def __call__(
        self, images: Float[AnyArray, 'n h w c'], *, key: Key[Array, '*n'] | None = None
    ) -> Float[Array, 'n classes']:
        """Class logits, (N, num_classes) float32; arguments and errors as for `features`."""
        x = self.head_input(images, key=key)
        return x if self.head is None else self.head(x)

    def head_input(
        self, images: Float[AnyArray, 'n h w c'], *, key: Key[Array, '*n'] | None = None
    ) -> Float[Array, 'n channels']:
        """The input of the head, (N, C) float32; arguments and errors as for `features`."""
        if self.variant.head_norm_first:
            last = list(self.features(images, key=key).values())[-1]
            x = self.norm(last).mean((1, 2), dtype=jnp.float32)
        else:
            x = self.norm(self.pooled(images, key=key))
        return x if self.hidden is None else gelu(self.hidden.product(x), self.hidden.bias[...])

    def tokens(self, images: Float[AnyArray, 'n h w c']) -> Tokens:
        """Feature vectors of the images and of their patches, for inference; both are normalised by the last norm.

        They are the `pooler_output` and the patch tokens of DINOv3 in transformers. Arguments and errors as for
        `features`.
        """
        last = list(self.features(images).values())[-1]
        return Tokens(self.norm(last.mean((1, 2), dtype=jnp.float32)), self.norm(last))


def create_model(
    name: str | Variant,
    *,
    key: Key[Array, ''],
    num_classes: int = 1000,
    drop_path_rate: float = 0.0,
    layer_scale_init: float | None = None,
    head_init_scale: float = 1.0,
    layer_norm_eps: float | None = None,
    in_channels: int = 3,
    patch_size: int | None = None,
    **options: Unpack[ExecutionOptions],
) -> ConvNeXt:
    """A newly initialised classifier.

    It supports reverse-mode differentiation (`jax.grad`, `jax.vjp`), but not forward mode (`jax.jvp`).

    Args:
        name: one of `list_models()`, or a `Variant`.
        key: random key of the initialisation, as from `jax.random.key`.
        num_classes: number of outputs of the head; 0 for no head.
        drop_path_rate: drop rate of the last block, in [0, 1); it applies when the model is called with a key.
        layer_scale_init: initial value of the layer scale, 0 for no layer scale; by default the variant's value.
        head_init_scale: factor on the initial kernel of the head; the original fine-tuning recipes use 0.001.
        layer_norm_eps: epsilon of the last norm, by default the variant's; Hugging Face's models use 1e-12.
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
