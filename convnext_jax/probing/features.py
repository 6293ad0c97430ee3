"""The features of images that probes and `embed` use."""

from jaxtyping import Array, Float

from convnext_jax.models import ConvNeXt
from convnext_jax.models.parameters import AnyArray
from convnext_jax.models.trunk import Trunk


def pooled_features(model: Trunk, images: Float[AnyArray, 'n h w c'], *, norm: bool) -> Float[Array, 'n channels']:
    """The average of the last feature map, or with `norm` the input of the head of a classifier.

    Args:
        model: a classifier or an encoder, for inference.
        images: (N, H, W, C) float, normalised.
        norm: whether to apply the layers of a classifier before its head, such as the last norm; False if they were
            not trained. Encoders have none.

    Returns:
        (N, channels) float32.
    """
    return model.head_input(images) if norm and isinstance(model, ConvNeXt) else model.pooled(images)
