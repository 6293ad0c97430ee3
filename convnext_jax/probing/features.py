"""The features of images that probes and `embed` use."""

from jaxtyping import Array, Float

from convnext_jax.models import ConvNeXt
from convnext_jax.models.parameters import AnyArray
from convnext_jax.models.trunk import Trunk


def pooled_features(model: Trunk, images: Float[AnyArray, 'n h w c'], *, norm: bool) -> Float[Array, 'n channels']:
    """The input of a classifier's head, or for an encoder without a norm the average of its last feature map.

    Args:
        model: a classifier or an encoder, for inference.
        images: (N, H, W, C) float, normalised.
        norm: whether to apply the last norm of a classifier. False for a norm that was not trained.

    Returns:
        (N, channels) float32.
    """
    features = model.pooled(images)
    return model.norm(features) if norm and isinstance(model, ConvNeXt) else features
