"""ConvNeXt V1 and V2 on JAX: train, evaluate, resume, from a laptop's CPU to a TPU pod."""

from convnext_jax.interop import ImageProcessor, load_pretrained, save_pretrained
from convnext_jax.models import ConvNeXt, create_model, list_models

__all__ = ['ConvNeXt', 'ImageProcessor', 'create_model', 'list_models', 'load_pretrained', 'save_pretrained']
