"""Evaluates a run of ours from its workdir."""

from pathlib import Path

import jax

from convnext_jax.config import read_config
from convnext_jax.data.pipeline import Share, eval_batches, to_devices
from convnext_jax.data.sources import open_source
from convnext_jax.errors import UserError
from convnext_jax.evaluation import evaluate, make_eval_step
from convnext_jax.models import get_parameters
from convnext_jax.training.checkpoint import DamagedCheckpoint, restore_parameters, saved_steps
from convnext_jax.training.finetune import newest_checkpoint, weights_field
from convnext_jax.training.setup import abstract_model
from convnext_jax.training.sharding import batch_sharding, make_mesh, replicated
from convnext_jax.training.workdir import CONFIG


def evaluate_run(workdir: Path, params: str | None, step: int | None) -> dict[str, float | int | str]:
    """Top-1, top-5 and loss over the run's evaluation split.

    Args:
        workdir: of a run of ours, which may be running.
        params: 'raw' or 'ema'; None for the moving average if the run has one.
        step: of the checkpoint; None for the newest.

    Raises:
        UserError: no such run, step or weights, or the checkpoint is damaged.
    """
    config = read_config(workdir / CONFIG)
    params = params or ('ema' if config.ema.decay else 'raw')
    directory, newest = newest_checkpoint(workdir)
    steps = saved_steps(directory)
    if step is not None and step not in steps:
        raise UserError(f'{workdir} has no checkpoint of step {step}, only of {steps}')
    step = newest if step is None else step
    model = abstract_model(config)
    mesh = make_mesh(-1)
    like = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=replicated(mesh))
        for name, array in get_parameters(model).items()
    }
    try:
        parameters = restore_parameters(directory, step, weights_field(params), like)
    except DamagedCheckpoint as error:
        raise UserError(f'checkpoint {step} of {workdir} is damaged: {error}') from error
    source = open_source(config.data.name, config.data.dir, config.data.eval_split)
    per_device = max(config.batch_size // config.accumulation_steps // mesh.size, 1)
    batches = eval_batches(
        source,
        Share(per_device * mesh.size, jax.process_index(), jax.process_count()),
        image_size=config.data.image_size,
        channels=len(config.data.mean),
        crop_pct=config.data.crop_pct,
    )
    eval_step = jax.jit(make_eval_step(model, config.data.mean, config.data.std))
    metrics = evaluate(eval_step, {'': parameters}, to_devices(batches, batch_sharding(mesh)))
    return {'model': config.model.name, 'params': params, 'step': step, 'split': config.data.eval_split, **metrics}
