"""The networks and their parameters. This package knows nothing about data, training or files."""

from convnext_jax.models.backbone import Backbone
from convnext_jax.models.convnext import AFTER_TRUNK, ConvNeXt, create_model
from convnext_jax.models.execution import Execution, ExecutionOptions
from convnext_jax.models.parameters import (
    Parameters,
    Role,
    Statistics,
    Weights,
    get_parameters,
    get_statistics,
    get_weights,
    parameter_roles,
    with_parameters,
)
from convnext_jax.models.upernet import UPerNet
from convnext_jax.models.variants import VARIANTS, Variant, get_variant, list_models

__all__ = [
    'AFTER_TRUNK',
    'VARIANTS',
    'Backbone',
    'ConvNeXt',
    'Execution',
    'ExecutionOptions',
    'Parameters',
    'Role',
    'Statistics',
    'UPerNet',
    'Variant',
    'Weights',
    'create_model',
    'get_parameters',
    'get_statistics',
    'get_variant',
    'get_weights',
    'list_models',
    'parameter_roles',
    'with_parameters',
]
