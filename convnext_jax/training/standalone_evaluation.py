"""Evaluation of a checkpoint of a run, or of weights from other libraries, on one or more splits (eval.py)."""

import csv
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from convnext_jax.checkpoints.checkpoint import DamagedCheckpoint, read_about, restore_parameters, saved_steps
from convnext_jax.config import check_values
from convnext_jax.data.dataset import Dataset
from convnext_jax.data.pipeline import Share, eval_batches, prefetch_to_device
from convnext_jax.errors import UserError
from convnext_jax.interop import PretrainedUPerNet
from convnext_jax.models import Weights, get_weights
from convnext_jax.monitoring.stalls import StallMonitor
from convnext_jax.output import say
from convnext_jax.runtime.processes import is_main_process, local_batch_indices, make_global_array
from convnext_jax.runtime.stop import Stop
from convnext_jax.tasks import Evaluator, Measured, abstract_model, make_task
from convnext_jax.training.evaluation import compute_metrics, evaluate, make_eval_step
from convnext_jax.training.sharding import batch_sharding, make_mesh, replicated
from convnext_jax.training.weights import newest_checkpoint, read_weights, weights_field

Result = dict[str, float | int | str]


@dataclasses.dataclass(frozen=True)
class EvaluationProtocol:
    """How an evaluation differs from the one that the config describes.

    Attributes:
        splits: pairs (data set name, split) in `config.data.dir`; empty: `data.name` and `data.eval_split`.
        changes: config field → value, for example {'data.image_size': 288}.
        test_size: whether to use `Pretrained.test_processor`; only for `evaluate_weights`.
        table: CSV file for the rows of `Evaluator.table`; None to write none.
    """

    splits: tuple[tuple[str, str], ...] = ()
    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)
    test_size: bool = False
    table: Path | None = None


def evaluate_run(
    workdir: Path, config: ConfigDict, params: str, step: int | None, protocol: EvaluationProtocol
) -> Iterator[Result]:
    """Evaluates a checkpoint of a run, and yields the metrics of each split when they are ready.

    Args:
        workdir: the workdir of the run, which may still be training.
        config: the config of the run. The fields that `config.evaluation_fields` lists may have been changed.
        params: 'raw' or 'ema'.
        step: the step of the checkpoint; None for the newest checkpoint.
        protocol: the splits, and further changes of the config.

    Yields:
        The metrics with `model`, `params`, `step`, `data`, `split` and `images`.

    Raises:
        UserError: the run, the step, the weights or a split does not exist, or the checkpoint is damaged.
    """
    config, mesh = _changed(config, protocol), make_mesh()
    model = abstract_model(config)
    step, weights, facts = restore_weights(workdir, model, params, step, mesh)
    about: Result = {'model': config.model.name, 'params': params, 'step': step}
    for result in _evaluate(config, model, weights, facts, mesh, protocol):
        yield about | result


def restore_weights(
    workdir: Path, model: nnx.Module, params: str, step: int | None, mesh: jax.sharding.Mesh
) -> tuple[int, Weights, Mapping[str, Any]]:
    """Restores the weights of a checkpoint of a run.

    Args:
        workdir, params, step: as for `evaluate_run`.
        model: the network of the run; its arrays are not used.
        mesh: the device mesh, on which the weights are replicated.

    Returns:
        The step of the checkpoint, the weights by name, and `Dataset.facts` of the training data.

    Raises:
        UserError: the run, the step or the weights do not exist, or the checkpoint is damaged.
    """
    directory, newest = newest_checkpoint(workdir)
    steps = saved_steps(directory)
    if step is not None and step not in steps:
        raise UserError(f'{workdir} has no checkpoint of step {step}, only of {", ".join(map(str, steps))}')
    step = newest if step is None else step
    like = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=replicated(mesh))
        for name, array in get_weights(model).items()
    }
    try:
        weights = restore_parameters(directory, step, weights_field(params), like)
    except DamagedCheckpoint as error:
        raise UserError(f'checkpoint {step} of {workdir} is damaged ({error}): evaluate another step') from error
    return step, weights, read_about(directory, step)['data']


def evaluate_weights(config: ConfigDict, where: str, params: str, protocol: EvaluationProtocol) -> Iterator[Result]:
    """Evaluates weights of another library or of a run, and yields the metrics of each split when they are ready.

    Args:
        config: the config that gives the data and the batch size. Preprocessing that is stored with the weights takes
            precedence over it.
        where, params: as for `read_weights`.
        protocol: the splits, and further changes of the config.

    Yields:
        The metrics with `weights`, `layout`, `params`, `data`, `split` and `images`.

    Raises:
        UserError: as for `read_weights`, the weights are for another task, their classes do not fit a split, or their
            test size is unknown.
    """
    pretrained = read_weights(where, params)
    if protocol.test_size:
        test_processor = None if isinstance(pretrained, PretrainedUPerNet) else pretrained.test_processor
        if test_processor is None:
            raise UserError(f'--resolution=test: {where} states no test size; give a number of pixels')
        pretrained = pretrained._replace(processor=test_processor)
    for note in pretrained.file_notes:
        say(note)
    if pretrained.licence:
        say(pretrained.licence.line)
    config = _changed(make_task(config).config_for(pretrained, where), protocol)
    mesh = make_mesh()
    weights = {name: make_global_array(x, replicated(mesh)) for name, x in get_weights(pretrained.model).items()}
    about: Result = {'weights': where, 'layout': pretrained.layout, 'params': params}
    for result in _evaluate(config, pretrained.model, weights, pretrained.facts, mesh, protocol):
        yield about | result


def _changed(config: ConfigDict, protocol: EvaluationProtocol) -> ConfigDict:
    config = config.copy_and_resolve_references()
    for field, value in protocol.changes.items():
        try:
            config.update_from_flattened_dict({field: value})
        except KeyError as error:  # --flip, say, of a task that has no such field
            raise UserError(
                f'the task {config.task} cannot be evaluated like this: it has no config field {field}'
            ) from error
    check_values(config)
    return config


def _evaluate(
    config: ConfigDict,
    model: nnx.Module,
    weights: Weights,
    facts: Mapping[str, Any],
    mesh: jax.sharding.Mesh,
    protocol: EvaluationProtocol,
) -> Iterator[Result]:
    if protocol.table:
        _write_table(protocol.table, [])  # fails now, not after the evaluation, if the file cannot be written
    task = make_task(config)
    splits = protocol.splits or ((config.data.name, config.data.eval_split),)
    datasets = [task.open_split(name, split, facts) for name, split in splits]
    rows = []
    for (name, split), dataset in zip(splits, datasets, strict=True):
        evaluator = task.evaluator(dataset)
        images, measured = evaluate_split(config, model, weights, mesh, dataset, evaluator, f'{name} {split}')
        rows += [{'data': name, 'split': split, **row} for row in evaluator.table(measured[''])]
        yield {'data': name, 'split': split, **compute_metrics(evaluator, images, measured)}
    if protocol.table:
        if not rows:
            raise UserError(f'the task {config.task} has no results per class for {protocol.table}: drop --per_class')
        _write_table(protocol.table, rows)


def evaluate_split(
    config: ConfigDict,
    model: nnx.Module,
    weights: Weights,
    mesh: jax.sharding.Mesh,
    dataset: Dataset,
    evaluator: Evaluator,
    title: str,
) -> tuple[int, dict[str, Measured]]:
    """Evaluates weights on one data set, on all devices.

    Args:
        config: gives the batch size, and the time after which a stall of the input is reported.
        model: the network; its arrays are not used.
        weights: the weights by name, replicated on the mesh.
        mesh: the device mesh.
        dataset, evaluator: the examples and their evaluator.
        title: name of the data set in messages.

    Returns:
        The result of `evaluate`, with the measurements under the name ''.
    """
    per_device = max(config.batch_size // config.accumulation_steps // mesh.size, 1)
    batch_size = per_device * mesh.size
    share = Share(batch_size, local_batch_indices(batch_sharding(mesh), batch_size))
    stall_monitor = StallMonitor(config.data.patience_seconds, Stop(), functools.partial(str, title))
    batches = prefetch_to_device(eval_batches(dataset, share, stall_monitor), batch_sharding(mesh))
    step = jax.jit(make_eval_step(evaluator, model, mesh), out_shardings=replicated(mesh))
    return evaluate(step, {'': weights}, batches)


def _write_table(path: Path, rows: list[dict[str, object]]) -> None:
    if not is_main_process():
        return
    try:
        # surrogateescape: names of folders may contain bytes that are not UTF-8.
        with path.open('w', newline='', encoding='utf-8', errors='surrogateescape') as file:
            writer = csv.DictWriter(file, rows[0] if rows else [])
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror}') from error
