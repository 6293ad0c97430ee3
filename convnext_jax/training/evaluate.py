"""Evaluates a run of ours from its workdir, or anybody's weights on a config's data."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from convnext_jax.config import read_config
from convnext_jax.data.pipeline import Share, eval_batches, to_devices
from convnext_jax.data.sources import open_source
from convnext_jax.errors import UserError
from convnext_jax.evaluation import evaluate, make_eval_step
from convnext_jax.interop import ImageProcessor
from convnext_jax.models import ConvNeXt, Parameters, get_parameters
from convnext_jax.training.checkpoint import DamagedCheckpoint, restore_parameters, saved_steps
from convnext_jax.training.setup import abstract_model
from convnext_jax.training.sharding import batch_sharding, make_mesh, replicated
from convnext_jax.training.weights import config_processor, newest_checkpoint, read_weights, weights_field
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
    metrics = _evaluate(config, model, parameters, config_processor(config), mesh)
    return {'model': config.model.name, 'params': params, 'step': step, 'split': config.data.eval_split, **metrics}


def evaluate_weights(config: ConfigDict, where: str, params: str) -> dict[str, float | int | str]:
    """Top-1, top-5 and loss of anybody's weights over the config's evaluation split.

    Images are prepared as the weights' folder says; if it says nothing, as the config says.

    Args:
        config: of which the data and the batch size count.
        where, params: as `read_weights`.

    Raises:
        UserError: as `read_weights`, or the data set has more classes than the head.
    """
    pretrained = read_weights(where, params)
    processor = pretrained.processor or config_processor(config)
    mesh = make_mesh(-1)
    parameters = jax.device_put(get_parameters(pretrained.model), replicated(mesh))
    metrics = _evaluate(config, pretrained.model, parameters, processor, mesh)
    return {'weights': where, 'layout': pretrained.layout, 'split': config.data.eval_split, **metrics}


def _evaluate(
    config: ConfigDict,
    model: ConvNeXt,
    parameters: Parameters,
    processor: ImageProcessor,
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    source = open_source(config.data.name, config.data.dir, config.data.eval_split)
    classes = parameters['head.bias'].size
    if len(source.class_names) > classes:
        raise UserError(f'{config.data.name} has {len(source.class_names)} classes, and the head {classes}')
    per_device = max(config.batch_size // config.accumulation_steps // mesh.size, 1)
    batches = eval_batches(
        source,
        Share(per_device * mesh.size, jax.process_index(), jax.process_count()),
        image_size=processor.size,
        channels=len(processor.mean),
        crop_pct=processor.crop_pct,
        squash=processor.squash,
        resample=processor.resample,
    )
    mean, std = processor.mean_and_std_of_255()
    return evaluate(
        jax.jit(make_eval_step(model, mean, std)), {'': parameters}, to_devices(batches, batch_sharding(mesh))
    )
