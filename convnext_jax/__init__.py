"""ConvNeXt V1 and V2 on JAX: train, evaluate, resume, from a laptop's CPU to a TPU pod."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convnext_jax.interop import ImageProcessor, create_backbone, load_pretrained, save_pretrained
    from convnext_jax.models import Backbone, ConvNeXt, create_model, list_models

__all__ = [
    'Backbone',
    'ConvNeXt',
    'ImageProcessor',
    'create_backbone',
    'create_model',
    'list_models',
    'load_pretrained',
    'save_pretrained',
]


def __getattr__(name: str) -> object:
    """Imports what is asked for: a command that starts JAX later, or not at all, need not wait for it."""
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    models = importlib.import_module('convnext_jax.models')
    return getattr(models, name, None) or getattr(importlib.import_module('convnext_jax.interop'), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
