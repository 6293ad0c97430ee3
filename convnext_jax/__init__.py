"""ConvNeXt V1 and V2 on JAX: train, evaluate, resume, from a laptop's CPU to a TPU pod."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convnext_jax import errors, interop, models
    from convnext_jax.interop import ImageProcessor, create_backbone, load_pretrained, save_pretrained
    from convnext_jax.models import Backbone, ConvNeXt, create_model, list_models

__all__ = [
    'Backbone',
    'ConvNeXt',
    'ImageProcessor',
    'create_backbone',
    'create_model',
    'errors',
    'interop',
    'list_models',
    'load_pretrained',
    'models',
    'save_pretrained',
]


def __getattr__(name: str) -> object:
    """Imports what is asked for: a command that starts JAX later, or not at all, need not wait for it."""
    if name in ('errors', 'interop', 'models'):
        return importlib.import_module(f'convnext_jax.{name}')
    if name in ('Backbone', 'ConvNeXt', 'create_model', 'list_models'):
        return getattr(importlib.import_module('convnext_jax.models'), name)
    if name in __all__:
        return getattr(importlib.import_module('convnext_jax.interop'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return __all__
