"""Weights to start from, evaluate or convert, from the checkpoint of a run or from files of another library."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convnext_jax.checkpoints.checkpoint import DamagedCheckpoint, read_about, restore_parameters, saved_steps
from convnext_jax.checkpoints.workdir import CHECKPOINTS, CONFIG, workdir_path
from convnext_jax.config import read_config
from convnext_jax.errors import UserError
from convnext_jax.interop import Licence, PretrainedModel, read_model
from convnext_jax.models import Weights, get_weights, with_parameters
from convnext_jax.runtime.processes import all_gather_objects, make_global_array
from convnext_jax.tasks import LoadedWeights, Task, abstract_model, make_task

STATE_FIELDS = {'raw': 'parameters', 'ema': 'ema'}


def read_weights(where: str, params: str, name: str | None = None) -> PretrainedModel:
    """Reads a model with its weights from the newest checkpoint of a run, or with `read_model`.

    Args:
        where: the workdir of a run, or anything that `read_model` accepts.
        params: 'raw' or 'ema'. In a file of another library, 'raw' is the entry 'model' or 'state_dict', and 'ema' the
            entry 'model_ema' or 'state_dict_ema'.
        name: as for `read_model`.

    A file without a head is accepted: the head then has one newly initialised output, see `Pretrained.has_head`.

    Raises:
        UserError: the weights do not exist or cannot be read.
    """
    field = weights_field(params)
    workdir = run_folder(where)
    if workdir is None:
        pretrained = read_model(where, name=name, entry=_entry(params), new_classes=1)
        return pretrained._replace(origin=f'the {params} weights of {where} ({pretrained.layout} layout)')
    config = read_config(workdir / CONFIG)
    step, weights = _newest_weights(workdir, field)
    model = with_parameters(abstract_model(config), weights)
    about = read_about(workdir / CHECKPOINTS, step)
    pretrained = make_task(config).pretrained(model, about['data'])
    notes = ['--params=ema uses the moving average'] if params == 'raw' and config.ema.decay else []
    origin = f'the {params} weights of {where}, step {step}'
    return pretrained._replace(notes=notes, origin=origin, licence=licence_of_run(about))


def licence_of_run(about: dict) -> Licence | None:
    """The licence of the weights that a run started from; `about` is the JSON saved with a checkpoint of the run."""
    return Licence(**about['licence']) if 'licence' in about else None


def load_weights(task: Task, initial: Weights, facts: Mapping[str, Any]) -> tuple[Weights, list[str], Licence | None]:
    """Loads the weights from which a run starts, as the `init` section of its config says.

    Args:
        task: chooses in `Task.initial_weights` which of the weights to use.
        initial: the newly initialised parameters and statistics of the run. The result has their names, shapes, dtypes
            and shardings.
        facts: `Dataset.facts` of the training split.

    Returns:
        The parameters and statistics by name, messages for the user, and the licence of the weights if it is known.

    Raises:
        UserError: as for `read_weights` and `Task.initial_weights`, or names or shapes differ. The message lists the
            differences.
    """
    where, params = task.config.init.weights, task.config.init.params
    if workdir := run_folder(where):
        trained, note, licence = _run_weights(workdir, where, params)
    else:
        stems = [x.shape[-2] for name, x in initial.items() if name in ('stem.conv.kernel', 'stem.first_conv.kernel')]
        trained, note, licence = _other_weights(where, params, in_channels=stems[0] if stems else None)
    loaded, more = task.initial_weights(initial, trained, facts)
    differences = [f'{name} is missing' for name in initial.keys() - loaded.keys()]
    differences += [f'{name} is unexpected' for name in loaded.keys() - initial.keys()]
    differences += [
        f'{name} is {loaded[name].shape}, not {initial[name].shape}'
        for name in initial.keys() & loaded.keys()
        if loaded[name].shape != initial[name].shape
    ]
    if differences:
        raise UserError(f'the weights of {where} do not fit the model: {"; ".join(sorted(differences))}')
    return {name: _with_sharding(loaded[name], x.sharding) for name, x in initial.items()}, [note, *more], licence


def _run_weights(workdir: Path, where: str, params: str) -> tuple[LoadedWeights, str, Licence | None]:
    """The weights of the newest checkpoint of a run, a message for the user, and the licence of the weights."""
    step, weights = _newest_weights(workdir, weights_field(params))
    about = read_about(workdir / CHECKPOINTS, step)
    note = f'starts from the {params} weights of {where}, step {step}'
    return LoadedWeights(weights, about['data'], where), note, licence_of_run(about)


def _other_weights(where: str, params: str, in_channels: int | None) -> tuple[LoadedWeights, str, Licence | None]:
    """The weights in a file of another library without newly initialised parameters, a message, and their licence."""
    weights_field(params)
    pretrained = read_model(where, entry=_entry(params), new_classes=1, in_channels=in_channels)
    weights = {name: x for name, x in get_weights(pretrained.model).items() if name not in pretrained.newly_initialised}
    licence = pretrained.licence
    if licence:
        licence = dataclasses.replace(licence, source=f'{licence.source} of {where}')
    note = f'starts from the {pretrained.layout} weights of {where}'
    return LoadedWeights(weights, pretrained.facts, where, pretrained), note, licence


def _with_sharding(value: jax.Array | np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """The value as a global array with a sharding.

    An array that already has the sharding is returned unchanged, because it may be distributed over processes.
    """
    if isinstance(value, jax.Array) and value.sharding == sharding:
        return value
    return make_global_array(value, sharding)


def run_folder(where: str) -> Path | None:
    """The workdir of the run that `where` names; None for other weights."""
    try:
        workdir = workdir_path(where)
        return workdir if (workdir / CHECKPOINTS).is_dir() else None
    except OSError:  # the name is too long for a path
        return None


def _newest_weights(workdir: Path, field: str) -> tuple[int, Weights]:
    directory, step = newest_checkpoint(workdir)
    try:
        return step, restore_parameters(directory, step, field)
    except DamagedCheckpoint as error:
        raise UserError(f'checkpoint {step} of {workdir} is damaged: {error}') from error


def newest_checkpoint(workdir: Path) -> tuple[Path, int]:
    """The checkpoint directory of a run, and the step of its newest checkpoint.

    Raises:
        UserError: there is no checkpoint.
    """
    directory = workdir / CHECKPOINTS
    steps = all_gather_objects(saved_steps(directory))[0]  # all processes agree, even if the run saves meanwhile
    if not steps:
        raise UserError(f'{workdir} has no checkpoint yet: train until the run has saved one')
    return directory, steps[-1]


def weights_field(params: str) -> str:
    """The field of `TrainState` for 'raw' or 'ema'.

    Raises:
        UserError: `params` is neither of the two.
    """
    if params not in STATE_FIELDS:
        raise UserError(f"weights are 'raw' or 'ema', not '{params}'")
    return STATE_FIELDS[params]


def _entry(params: str) -> str | None:
    return 'ema' if params == 'ema' else None
