"""Import and export of weights and image processors of Hugging Face, timm and the original repositories."""

from convnext_jax.interop.backbone import create_backbone
from convnext_jax.interop.licence import Licence
from convnext_jax.interop.pretrained import (
    Pretrained,
    PretrainedModel,
    as_classifier,
    load_pretrained,
    read_model,
    read_pretrained,
    save_pretrained,
)
from convnext_jax.interop.pretrained_upernet import PretrainedUPerNet, read_upernet
from convnext_jax.interop.processor import ImageProcessor

__all__ = [
    'ImageProcessor',
    'Licence',
    'Pretrained',
    'PretrainedModel',
    'PretrainedUPerNet',
    'as_classifier',
    'create_backbone',
    'load_pretrained',
    'read_model',
    'read_pretrained',
    'read_upernet',
    'save_pretrained',
]
