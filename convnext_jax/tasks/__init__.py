"""What a run can learn. Training code imports this front and no module below it."""

from ml_collections import ConfigDict

from convnext_jax.tasks.classification import Classification
from convnext_jax.tasks.task import Batch, Evaluator, Headline, Loss, Measured, Task, Weights

__all__ = ['Batch', 'Evaluator', 'Headline', 'Loss', 'Measured', 'Task', 'Weights', 'make_task']


def make_task(config: ConfigDict) -> Task:
    """The task that a config describes."""
    return Classification(config)
