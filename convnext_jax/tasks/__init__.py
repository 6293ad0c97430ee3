"""Tasks: what a run learns. Code for training imports from here only, not from the modules of this package."""

import importlib

import jax
from flax import nnx
from ml_collections import ConfigDict

from convnext_jax.errors import UserError
from convnext_jax.tasks.probes import PROBES, open_probe
from convnext_jax.tasks.task import (
    Batch,
    Evaluation,
    Evaluator,
    Headline,
    LabelledData,
    LoadedWeights,
    Loss,
    Measured,
    Task,
)

__all__ = [
    'PROBES',
    'Batch',
    'Evaluation',
    'Evaluator',
    'Headline',
    'LabelledData',
    'LoadedWeights',
    'Loss',
    'Measured',
    'Task',
    'abstract_model',
    'make_task',
    'open_probe',
    'task_class',
]

TASKS = {
    'classification': 'convnext_jax.tasks.classification:Classification',
    'fcmae': 'convnext_jax.tasks.fcmae:FCMAE',
    'segmentation': 'convnext_jax.tasks.segmentation:Segmentation',
}
"""Name → module and class, which are imported on first use."""


def make_task(config: ConfigDict) -> Task:
    """The task of a config.

    Raises:
        UserError: as for `task_class`.
    """
    return task_class(config.task)(config)


def task_class(name: str) -> type[Task]:
    """The class of the task with a name.

    Args:
        name: value of `config.task`.

    Raises:
        UserError: the task is unknown.
    """
    if name not in TASKS:
        raise UserError(f"there is no task '{name}': config.task must be one of {', '.join(TASKS)}")
    module, _, kind = TASKS[name].partition(':')
    return getattr(importlib.import_module(module), kind)


def abstract_model(config: ConfigDict) -> nnx.Module:
    """The network of a config, with `jax.ShapeDtypeStruct` instead of arrays."""
    return jax.eval_shape(make_task(config).build, jax.random.key(0))
