"""The messages at the start and at the end of a run."""

from pathlib import Path

import jax
from flax import nnx
from ml_collections import ConfigDict

from convnext_jax.checkpoints.workdir import CURVES
from convnext_jax.data.dataset import Dataset
from convnext_jax.data.loading import decoders
from convnext_jax.data.pipeline import fits_in_cache
from convnext_jax.models import get_parameters, parameter_roles
from convnext_jax.monitoring.records import read_records
from convnext_jax.runtime.process import describe_settings
from convnext_jax.tasks import Headline, make_task
from convnext_jax.training.durations import Durations
from convnext_jax.training.optimizer import peak_learning_rate
from convnext_jax.training.sharding import describe_mesh, fraction_per_device


def describe(
    config: ConfigDict,
    durations: Durations,
    mesh: jax.sharding.Mesh,
    model: nnx.Module,
    train_set: Dataset,
    eval_set: Dataset,
    workdir: Path,
) -> list[str]:
    """The messages at the start of a run: model, devices, steps, data, optimizer, settings, workdir."""
    size, data, optimizer = config.data.image_size, config.data, config.optimizer
    parameters = get_parameters(model)
    count = sum(array.size for array in parameters.values())
    multiply_adds = make_task(config).multiply_adds
    devices, epoch = jax.devices(), durations.steps_per_epoch
    share = fraction_per_device(mesh, parameter_roles(model), parameters)
    sharded = f', {share:.0%} of the parameters on each' if mesh.shape['fsdp'] > 1 else ''
    accumulation = f' in {config.accumulation_steps} accumulation steps' if config.accumulation_steps > 1 else ''
    processes, threads = decoders(0 if fits_in_cache(train_set) else data.workers)
    peak = peak_learning_rate(config)
    about = f'{train_set.about}, ' if train_set.about else ''
    decoding = (f'{processes} process(es) of ' if processes else '') + f'{threads} thread(s)'
    return [
        f'model      {config.model.name}: {count:,} parameters, {multiply_adds / 1e9:.3g} G multiply-adds at '
        f'{size}×{size}, {config.model.dtype}',
        f'devices    {len(devices)} × {devices[0].device_kind}, mesh {describe_mesh(mesh)}{sharded}, '
        f'{jax.process_count()} process(es)',
        f'steps      {durations.total_steps:,} of {config.batch_size} images{accumulation}, {epoch:,} per epoch',
        f'data       {data.name}: {data.train_split} {len(train_set):,}, {data.eval_split} {len(eval_set):,} images, '
        f'{about}decoded by {decoding}',
        f'optimizer  AdamW, learning rate {peak:.3g} after {durations.warmup_steps:,} warm-up steps, '
        f'{optimizer.schedule} to {optimizer.min_learning_rate:.3g}, weight decay {optimizer.weight_decay:.3g}, '
        f'EMA {config.ema.decay:g}',
        f'settings   {describe_settings()}',
        f'workdir    {workdir}',
    ]


def final_message(workdir: Path, config: ConfigDict, headline: Headline) -> str:
    """The message at the end of a run: its headline metric, the path of its curves, and the command to evaluate it."""
    results = [record for record in read_records(workdir) if record['split'] == config.data.eval_split]
    scores = ''
    if results:
        scores = f': {headline.describe(results[-1])} on {results[-1]["images"]:,} images'
    return f'finished{scores}. Curves: {workdir / CURVES}. Next: python -m convnext_jax eval --workdir={workdir}'
