"""ConvNeXt V1 and V2 as backbones: feature maps for detection, segmentation and other dense tasks."""

from collections.abc import Iterable

from flax import nnx
from jaxtyping import Array, Float, Key

from convnext_jax.errors import UserError
from convnext_jax.models.execution import Execution
from convnext_jax.models.extent import Extent
from convnext_jax.models.layers import LayerNorm
from convnext_jax.models.parameters import AnyArray
from convnext_jax.models.trunk import Trunk
from convnext_jax.models.variants import Variant


class Backbone(Trunk):
    """A trunk with a LayerNorm on each feature map that it returns, as in Hugging Face's ConvNextBackbone.

    Args:
        variant: the architecture.
        key: random key of the initialisation.
        out_features: names of the returned feature maps, such as ('stage2', 'stage4'); by default all stages.
        output_stride, in_channels, drop_path_rate, execution: as for `Trunk`.

    Attributes:
        norms: name of a feature map → its LayerNorm.
        out_features: names of the returned feature maps, from the stem to the last stage.

    Raises:
        UserError: `out_features` is empty or contains an unknown name, or `Trunk` rejects a value.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        key: Key[Array, ''],
        out_features: Iterable[str] | None = None,
        output_stride: int | None = None,
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        execution: Execution = Execution(),
    ):
        super().__init__(
            variant,
            key=key,
            in_channels=in_channels,
            drop_path_rate=drop_path_rate,
            output_stride=output_stride,
            execution=execution,
        )
        if out_features is None:
            out_features = [name for name in self.channels if name != 'stem']
        chosen = tuple(out_features) if isinstance(out_features, Iterable) else ()
        if not chosen or isinstance(out_features, str) or not all(name in tuple(self.channels) for name in chosen):
            raise UserError(f'out_features must be one or more of {tuple(self.channels)}, not {out_features!r}')
        self.out_features = tuple(name for name in self.channels if name in chosen)
        self.norms = nnx.Dict({name: LayerNorm(self.channels[name]) for name in self.out_features})

    def __call__(
        self,
        images: Float[AnyArray, 'n h w c'],
        *,
        key: Key[Array, '*n'] | None = None,
        extent: Extent | None = None,
    ) -> dict[str, Float[Array, 'n rows columns channels']]:
        """Name → normalised feature map, (N, H // stride, W // stride, C).

        Args:
            images, key: as for `features`.
            extent: the part of each image that is not padding; the maps are arbitrary outside the parts that `extents`
                returns for it. None for images without padding.

        Raises:
            UserError: as for `features`.
        """
        maps = self.features(images, key=key, visible=extent)
        return {name: self.norms[name](maps[name]) for name in self.out_features}
