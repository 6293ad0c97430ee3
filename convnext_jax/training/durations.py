"""Durations: the length of a run and of its parts, in optimizer steps."""

import dataclasses

from ml_collections import ConfigDict

from convnext_jax.data.pipeline import steps_per_epoch
from convnext_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Durations:
    """The length of a run, of an epoch and of the warm-up, and the interval of evaluations, in optimizer steps."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    eval_every_steps: int

    def epoch(self, step: int) -> float:
        """The number of passes over the training split after `step` steps."""
        return step / self.steps_per_epoch


def make_durations(config: ConfigDict, images: int) -> Durations:
    """Converts the epochs of a config into steps.

    Args:
        config: the config of the experiment.
        images: number of training images.

    Raises:
        UserError: the training split is smaller than a batch, or the run is not longer than its warm-up.
    """
    epoch = steps_per_epoch(images, config.batch_size)
    total = config.steps or round(config.epochs * epoch)
    durations = Durations(
        steps_per_epoch=epoch,
        total_steps=total,
        warmup_steps=config.optimizer.warmup_steps or round(config.optimizer.warmup_epochs * epoch),
        eval_every_steps=config.eval_every_steps or max(round(config.eval_every_epochs * epoch), 1),
    )
    if durations.total_steps <= durations.warmup_steps:
        raise UserError(
            f'the run has {durations.total_steps} steps, and the warm-up alone takes {durations.warmup_steps}: '
            'raise epochs (or steps), or lower optimizer.warmup_epochs (or optimizer.warmup_steps)'
        )
    return durations
