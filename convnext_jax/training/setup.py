"""From a config to the parts of a run: paths, model, plan of steps."""

import dataclasses
import os
import tempfile

import jax
from flax import nnx
from ml_collections import ConfigDict

from convnext_jax.data.pipeline import steps_per_epoch
from convnext_jax.errors import UserError
from convnext_jax.paths import local_path, plain_path
from convnext_jax.tasks import make_task


def settle_paths(config: ConfigDict) -> None:
    """Makes the paths of this machine in a config absolute, so that they mean the same from any folder.

    A bucket, a hub id and '' stay as they are.

    Raises:
        UserError: a `~` cannot be expanded.
    """
    if config.data.dir:
        config.data.dir = str(local_path(config.data.dir).absolute())
    weights = config.init.weights
    if weights and os.path.exists(local_path(weights)):  # False of a name that no file can have
        config.init.weights = str(local_path(weights).absolute())
    cache = config.compilation_cache_dir
    if cache and '://' not in cache:
        config.compilation_cache_dir = str(local_path(cache).absolute())


def cache_compiled(directory: str) -> None:
    """Keeps the programs that take over a second to compile in a folder, for the next start; '' changes nothing.

    To be called before anything is compiled.

    Raises:
        UserError: the folder cannot be written.
    """
    if not directory:
        return
    if '://' not in directory:  # of what lies in a cloud, JAX warns by itself
        folder = local_path(directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f'compilation_cache_dir={directory} cannot be written: {error.strerror}') from error
        directory = str(plain_path(folder))
    jax.config.update('jax_compilation_cache_dir', directory)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The durations of a run, in optimizer steps."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    eval_every_steps: int

    def epoch(self, step: int) -> float:
        """Passes over the training split after so many steps."""
        return step / self.steps_per_epoch


def make_plan(config: ConfigDict, images: int) -> Plan:
    """Durations in steps, for a training split of so many images.

    Raises:
        UserError: the run would be empty, or all warm-up.
    """
    epoch = steps_per_epoch(images, config.batch_size)
    total = config.steps or round(config.epochs * epoch)
    plan = Plan(
        steps_per_epoch=epoch,
        total_steps=total,
        warmup_steps=config.optimizer.warmup_steps or round(config.optimizer.warmup_epochs * epoch),
        eval_every_steps=max(round(config.eval_every_epochs * epoch), 1),
    )
    if plan.total_steps <= plan.warmup_steps:
        raise UserError(
            f'{plan.total_steps} steps are not more than the warm-up of {plan.warmup_steps}: '
            'raise epochs (or steps), or lower optimizer.warmup_epochs (or optimizer.warmup_steps)'
        )
    return plan


def abstract_model(config: ConfigDict) -> nnx.Module:
    """The network of the config's task, with shapes in place of arrays; the argument as of `Task.build`."""
    task = make_task(config)
    return jax.eval_shape(lambda key: task.build(key), jax.random.key(0))
