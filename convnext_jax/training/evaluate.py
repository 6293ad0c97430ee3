"""Evaluates a run of ours from its workdir, or anybody's weights, on splits of a config's data or of others."""

import csv
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from convnext_jax.data.labelled_images import EvalImages
from convnext_jax.data.pipeline import Share, eval_batches, to_devices
from convnext_jax.data.sources import Source, open_source, with_classes_of_model
from convnext_jax.errors import UserError
from convnext_jax.evaluation import add_up, class_accuracies, make_eval_step, summary
from convnext_jax.interop import ImageProcessor
from convnext_jax.models import ConvNeXt, Parameters, get_parameters
from convnext_jax.training.checkpoint import DamagedCheckpoint, read_about, restore_parameters, saved_steps
from convnext_jax.training.distributed import is_first, local_rows, spread
from convnext_jax.training.setup import evaluation_model
from convnext_jax.training.sharding import batch_sharding, make_mesh, replicated
from convnext_jax.training.stop import Stop
from convnext_jax.training.watch import Patience
from convnext_jax.training.weights import (
    check_single_label,
    config_processor,
    newest_checkpoint,
    read_weights,
    weights_field,
)

Result = dict[str, float | int | str]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How to evaluate, where it is not as the run or the weights say.

    Attributes:
        splits: ('NAME', 'SPLIT') of data sets in the config's `data.dir`; empty for the config's own.
        resolution: side of the images in pixels.
        crop_pct: as in the config.
        flip: average the logits with those of the mirrored image.
        per_class: CSV file for the accuracy of each class.
    """

    splits: tuple[tuple[str, str], ...] = ()
    resolution: int | None = None
    crop_pct: float | None = None
    flip: bool = False
    per_class: Path | None = None


def evaluate_run(
    workdir: Path, config: ConfigDict, params: str, step: int | None, protocol: Protocol
) -> Iterator[Result]:
    """Metrics over each split, as soon as they are there. Labels are matched to the run's classes by name.

    Args:
        workdir: of a run of ours, which may be running.
        config: the run's, or with other values of the fields in `config.EVALUATION`.
        params: 'raw' or 'ema'.
        step: of the checkpoint; None for the newest.
        protocol: what differs from the run's own evaluations.

    Raises:
        UserError: no such run, step, weights or split, or the checkpoint is damaged.
    """
    directory, newest = newest_checkpoint(workdir)
    steps = saved_steps(directory)
    if step is not None and step not in steps:
        raise UserError(f'{workdir} has no checkpoint of step {step}, only of {steps}')
    step = newest if step is None else step
    model = evaluation_model(config)
    mesh = make_mesh()
    like = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=replicated(mesh))
        for name, array in get_parameters(model).items()
    }
    try:
        parameters = restore_parameters(directory, step, weights_field(params), like)
    except DamagedCheckpoint as error:
        raise UserError(f'checkpoint {step} of {workdir} is damaged: {error}') from error
    class_names = read_about(directory, step)['data']['class names']
    about = {'model': config.model.name, 'params': params, 'step': step}
    for result in _evaluate(config, model, parameters, class_names, config_processor(config), mesh, protocol):
        yield about | result


def evaluate_weights(config: ConfigDict, where: str, params: str, protocol: Protocol) -> Iterator[Result]:
    """Metrics of anybody's weights over each split, as soon as they are there.

    Images are prepared as the weights' folder says; if it says nothing, as the config says. Labels are matched to the
    weights' classes by name; where they have no names, a warning says that positions are trusted.

    Args:
        config: of which the data and the batch size count.
        where, params: as `read_weights`.
        protocol: what differs from that.

    Raises:
        UserError: as `read_weights` and `check_single_label`, no such split, or the model lacks a class of the data.
    """
    pretrained = read_weights(where, params)
    check_single_label(pretrained, where)
    processor = pretrained.processor or config_processor(config)
    mesh = make_mesh()
    parameters = {name: spread(x, replicated(mesh)) for name, x in get_parameters(pretrained.model).items()}
    about = {'weights': where, 'layout': pretrained.layout, 'params': params}
    names = pretrained.class_names
    for result in _evaluate(config, pretrained.model, parameters, names, processor, mesh, protocol):
        yield about | result


def _evaluate(
    config: ConfigDict,
    model: ConvNeXt,
    parameters: Parameters,
    class_names: Sequence[str] | None,
    processor: ImageProcessor,
    mesh: jax.sharding.Mesh,
    protocol: Protocol,
) -> Iterator[Result]:
    if protocol.per_class:
        _write_per_class(protocol.per_class, [])  # what cannot be written fails before the work is done
    splits = protocol.splits or ((config.data.name, config.data.eval_split),)
    sources = [_open(name, config.data.dir, split, class_names, parameters['head.bias'].size) for name, split in splits]
    changes = {'size': protocol.resolution, 'crop_pct': protocol.crop_pct}
    processor = dataclasses.replace(processor, **{field: x for field, x in changes.items() if x is not None})
    mean, std = processor.mean_and_std_of_255()
    per_device = max(config.batch_size // config.accumulation_steps // mesh.size, 1)
    batch_size = per_device * mesh.size
    share = Share(batch_size, local_rows(batch_sharding(mesh), batch_size))
    tables = []
    for (name, split), source in zip(splits, sources, strict=True):
        images = EvalImages(
            source,
            processor.size,
            len(processor.mean),
            crop_pct=processor.crop_pct,
            squash=processor.squash,
            resample=processor.resample,
        )
        patience = Patience(config.data.patience_seconds, Stop(), lambda at=f'{name} {split}': at)
        batches = eval_batches(images, share, patience)
        step = jax.jit(
            make_eval_step(model, mean, std, judged=source.judged, flip=protocol.flip), out_shardings=replicated(mesh)
        )
        sums = add_up(step, {'': parameters}, to_devices(batches, batch_sharding(mesh)))['']
        tables.append((name, split, source, class_accuracies(sums)))
        yield {'data': name, 'split': split, 'images': int(sums['count']), **summary(sums)}
    if protocol.per_class:
        _write_per_class(protocol.per_class, tables)


def _open(name: str, directory: str, split: str, class_names: Sequence[str] | None, outputs: int) -> Source:
    """A split with the labels of the model's outputs."""
    try:
        source, note = with_classes_of_model(open_source(name, directory, split), class_names, outputs)
    except UserError as error:
        raise UserError(f'{name} {split}: {error}') from error
    if note and is_first():
        warnings.warn(f'{name} {split}: {note}', stacklevel=2)
    return source


def _write_per_class(path: Path, tables: list[tuple[str, str, Source, list[float | None]]]) -> None:
    if not is_first():
        return
    try:
        # Class names come from folders: their bytes, UTF-8 or not, are written as they are.
        with path.open('w', newline='', encoding='utf-8', errors='surrogateescape') as file:
            writer = csv.writer(file)
            writer.writerow(['data', 'split', 'label', 'class', 'top1'])
            for name, split, source, accuracies in tables:
                for label, class_name in enumerate(source.class_names):
                    writer.writerow([name, split, label, class_name, accuracies[label]])
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror}') from error
