"""The features of images that probes and `embed` use."""

from jaxtyping import Array, Float

from convnext_jax.models import ConvNeXt
from convnext_jax.models.parameters import AnyArray
from convnext_jax.models.trunk import Trunk


def pooled_features(model: Trunk, images: Float[AnyArray, 'n h w c'], *, norm: bool) -> Float[Array, 'n channels']:
    """The average of the last feature map. If `norm`, the last norm of a classifier is applied to it.

    Args:
        model: a classifier or an encoder, for inference.
        images: (N, H, W, C) float, normalised.
        norm: whether to apply the last norm of a classifier; False if this norm was not trained. Encoders have none.

    Returns:
        (N, channels) float32.
    """
    features = model.pooled(images)
    return model.norm(features) if norm and isinstance(model, ConvNeXt) else features
