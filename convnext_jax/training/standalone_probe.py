"""Evaluation of the features of a run, or of weights from other libraries, by a probe (eval.py --probe)."""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from convnext_jax.config import check_values
from convnext_jax.interop import PretrainedModel, as_classifier
from convnext_jax.interop.processor import processor_for
from convnext_jax.models import get_weights, with_parameters
from convnext_jax.output import say
from convnext_jax.runtime.processes import make_global_array
from convnext_jax.tasks import abstract_model, make_task, open_probe
from convnext_jax.training.sharding import make_mesh, replicated
from convnext_jax.training.standalone_evaluation import Result, evaluate_split, restore_weights
from convnext_jax.training.weights import read_weights


@dataclasses.dataclass(frozen=True)
class ProbeProtocol:
    """How features are evaluated.

    Attributes:
        kind: one of `tasks.PROBES`.
        neighbours: the number of neighbours of the k-NN probe.
        size, crop_pct: replace these attributes of the `ImageProcessor`, unless None.
    """

    kind: str
    neighbours: int
    size: int | None = None
    crop_pct: float | None = None


def probe_run(workdir: Path, config: ConfigDict, params: str, step: int | None, protocol: ProbeProtocol) -> Result:
    """Evaluates the features of a checkpoint of a run.

    Args:
        workdir, config, params, step: as for `evaluate_run`.
        protocol: the probe.

    Returns:
        The metrics with `model`, `params`, `step`, `probe`, `data`, `train_split`, `train_images`, `split` and
        `images`.

    Raises:
        UserError: as for `restore_weights` and `open_probe`.
    """
    mesh, model = make_mesh(), abstract_model(config)
    step, weights, facts = restore_weights(workdir, model, params, step, mesh)
    pretrained = make_task(config).pretrained(with_parameters(model, weights), facts)
    return {'model': config.model.name, 'params': params, 'step': step} | _probe(config, pretrained, protocol)


def probe_weights(config: ConfigDict, where: str, params: str, protocol: ProbeProtocol) -> Result:
    """Evaluates the features of weights of another library or of a run.

    Args:
        config: gives the data, the batch size, and the preprocessing if none is stored with the weights.
        where, params: as for `read_weights`; weights without a head are accepted.
        protocol: the probe.

    Returns:
        The metrics with `weights`, `layout`, `params`, `probe`, `data`, `train_split`, `train_images`, `split` and
        `images`.

    Raises:
        UserError: as for `read_weights` and `open_probe`.
    """
    check_values(config)
    pretrained = read_weights(where, params)
    for note in pretrained.file_notes:
        say(note)
    if pretrained.licence:
        say(pretrained.licence.line)
    return {'weights': where, 'layout': pretrained.layout, 'params': params} | _probe(config, pretrained, protocol)


def _probe(config: ConfigDict, pretrained: PretrainedModel, protocol: ProbeProtocol) -> Result:
    pretrained = as_classifier(pretrained)
    task, mesh = make_task(config), make_mesh()
    processor = processor_for(pretrained.model.in_channels, pretrained.processor or task.processor)
    processor = dataclasses.replace(
        processor,
        size=processor.size if protocol.size is None else protocol.size,
        crop_pct=processor.crop_pct if protocol.crop_pct is None else protocol.crop_pct,
    )
    data = task.labelled_data
    dataset, probe = open_probe(
        protocol.kind, data, processor, norm=pretrained.has_norm, neighbours=protocol.neighbours
    )
    weights = {name: make_global_array(x, replicated(mesh)) for name, x in get_weights(pretrained.model).items()}
    images, measured = evaluate_split(config, pretrained.model, weights, mesh, dataset, probe, data.name)
    about: Result = {
        'probe': protocol.kind,
        'data': data.name,
        'train_split': data.train_split,
        'train_images': probe.train_images,
        'split': data.eval_split,
        'images': images - probe.train_images,
    }
    return about | probe.summary(measured[''])
