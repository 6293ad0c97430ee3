"""What a run can learn. Training code imports this front and no module below it."""

from ml_collections import ConfigDict

from convnext_jax.tasks.classification import Classification
from convnext_jax.tasks.task import Batch, Headline, Loss, Task

__all__ = ['Batch', 'Headline', 'Loss', 'Task', 'make_task']


def make_task(config: ConfigDict) -> Task:
    """The task that a config describes."""
    return Classification(config)
