"""How long a run takes, in optimizer steps."""

import dataclasses

from ml_collections import ConfigDict

from convnext_jax.data.pipeline import steps_per_epoch
from convnext_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Durations:
    """The durations of a run, in optimizer steps."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    eval_every_steps: int

    def epoch(self, step: int) -> float:
        """Passes over the training split after `step` steps."""
        return step / self.steps_per_epoch


def make_durations(config: ConfigDict, images: int) -> Durations:
    """Durations in steps, for a training split of `images` images.

    Raises:
        UserError: the run would be empty, or all warm-up.
    """
    epoch = steps_per_epoch(images, config.batch_size)
    total = config.steps or round(config.epochs * epoch)
    durations = Durations(
        steps_per_epoch=epoch,
        total_steps=total,
        warmup_steps=config.optimizer.warmup_steps or round(config.optimizer.warmup_epochs * epoch),
        eval_every_steps=max(round(config.eval_every_epochs * epoch), 1),
    )
    if durations.total_steps <= durations.warmup_steps:
        raise UserError(
            f'{durations.total_steps} steps are not more than the warm-up of {durations.warmup_steps}: '
            'raise epochs (or steps), or lower optimizer.warmup_epochs (or optimizer.warmup_steps)'
        )
    return durations
