"""ConvNeXt V1 and V2 on JAX: train, fine-tune, evaluate and export, from a laptop's CPU to a TPU pod."""

from convnext_jax import errors, interop, models
from convnext_jax.interop import ImageProcessor, create_backbone, load_pretrained, save_pretrained
from convnext_jax.models import Backbone, ConvNeXt, UPerNet, create_model, list_models

__version__ = '0.1.0'

__all__ = [
    'Backbone',
    'ConvNeXt',
    'ImageProcessor',
    'UPerNet',
    'create_backbone',
    'create_model',
    'errors',
    'interop',
    'list_models',
    'load_pretrained',
    'models',
    'save_pretrained',
]
