"""ConvNeXt V1 and V2 as backbones: feature maps for detection, segmentation and other dense tasks."""

from collections.abc import Iterable

import jax
from flax import nnx

from convnext_jax.errors import UserError
from convnext_jax.models.execution import Execution
from convnext_jax.models.layers import LayerNorm
from convnext_jax.models.trunk import Trunk
from convnext_jax.models.variants import Variant


class Backbone(Trunk):
    """Stem and stages, and a LayerNorm on each feature map it returns, as Hugging Face's ConvNextBackbone.

    Attributes:
        norms: name of a feature map → its LayerNorm.
        out_features: these names, in the order of the data; by default all stages.

    Raises:
        UserError: `out_features` names no feature map, or as `Trunk`.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        key: jax.Array,
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
            raise UserError(f'out_features must be a choice of {tuple(self.channels)}, not {out_features!r}')
        self.out_features = tuple(name for name in self.channels if name in chosen)
        self.norms = nnx.Dict({name: LayerNorm(self.channels[name]) for name in self.out_features})

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> dict[str, jax.Array]:
        """Name → normalised feature map (N, H / stride, W / stride, C); arguments and errors as `features`."""
        maps = self.features(images, key=key)
        return {name: self.norms[name](maps[name]) for name in self.out_features}
