"""From a config to the parts of a run: paths, model, plan of steps."""

import dataclasses
import os
import tempfile

import jax
from ml_collections import ConfigDict

from convnext_jax.data.pipeline import steps_per_epoch
from convnext_jax.errors import UserError
from convnext_jax.models import ConvNeXt, Execution, Variant, get_variant
from convnext_jax.paths import local_path, plain_path


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


def build_variant(config: ConfigDict) -> Variant:
    """The architecture of the config's model."""
    layer_scale_init = None if config.model.layer_scale_init < 0 else config.model.layer_scale_init
    return get_variant(config.model.name).replace(
        patch_size=config.model.patch_size or None, layer_scale_init=layer_scale_init
    )


def build_execution(config: ConfigDict) -> Execution:
    """How the config's model is computed."""
    model = config.model
    return Execution(dtype=model.dtype, remat=model.remat, unroll=model.unroll, pallas=model.pallas)


def build_model(config: ConfigDict, key: jax.Array, execution: Execution | None = None) -> ConvNeXt:
    """The config's model, newly initialised; `execution` replaces the config's.

    Raises:
        UserError: as `create_model`, or the images are too small for it.
    """
    variant = build_variant(config)
    if config.data.image_size < variant.total_stride:
        raise UserError(
            f'data.image_size={config.data.image_size} is below the total stride {variant.total_stride} of '
            f'{config.model.name}: enlarge it, or lower model.patch_size={variant.patch_size}'
        )
    return ConvNeXt(
        variant,
        key=key,
        num_classes=config.model.num_classes,
        drop_path_rate=config.model.drop_path_rate,
        head_init_scale=config.model.head_init_scale,
        in_channels=len(config.data.mean),
        execution=execution or build_execution(config),
    )


def abstract_model(config: ConfigDict, execution: Execution | None = None) -> ConvNeXt:
    """The config's model with shapes instead of arrays."""
    return jax.eval_shape(lambda key: build_model(config, key, execution), jax.random.key(0))


def evaluation_model(config: ConfigDict) -> ConvNeXt:
    """The abstract model without Pallas kernels: `jax.jit`, which shards evaluation, cannot partition them."""
    return abstract_model(config, dataclasses.replace(build_execution(config), pallas=False))
