"""Fine-tuning: another run's weights as the first values of this one's."""

from pathlib import Path

import jax

from convnext_jax.errors import UserError
from convnext_jax.models import Parameters
from convnext_jax.training.checkpoint import DamagedCheckpoint, restore_parameters, saved_steps
from convnext_jax.training.workdir import CHECKPOINTS

FIELDS = {'raw': 'parameters', 'ema': 'ema'}


def load_parameters(workdir: Path, params: str, fresh: Parameters) -> tuple[Parameters, list[str]]:
    """The newest weights of the run in `workdir`, and a line on what was done.

    A head for another number of classes keeps its fresh values; nothing else may differ.

    Args:
        workdir: of a run of ours.
        params: 'raw' or 'ema'.
        fresh: this run's parameters; the result has their names, shapes, types and shardings.

    Raises:
        UserError: no such run or weights, or names or shapes differ; all differences are listed.
    """
    directory, step = newest_checkpoint(workdir)
    try:
        loaded = restore_parameters(directory, step, weights_field(params))
    except DamagedCheckpoint as error:
        raise UserError(f'checkpoint {step} of {workdir} is damaged: {error}') from error
    notes = [f'starts from the {params} weights of {workdir}, step {step}']
    head = ('head.kernel', 'head.bias')
    if 'head.bias' in loaded and loaded['head.bias'].shape != fresh['head.bias'].shape:
        was, now = loaded['head.bias'].size, fresh['head.bias'].size
        notes.append(f'the head is fresh: {now} classes here, {was} there')
        loaded |= {name: fresh[name] for name in head}
    differences = [f'{name} is missing' for name in fresh.keys() - loaded.keys()]
    differences += [f'{name} is left over' for name in loaded.keys() - fresh.keys()]
    differences += [
        f'{name} is {loaded[name].shape}, not {fresh[name].shape}'
        for name in fresh.keys() & loaded.keys()
        if loaded[name].shape != fresh[name].shape
    ]
    if differences:
        raise UserError(f'the weights of {workdir} do not fit the model: {"; ".join(sorted(differences))}')
    return {name: jax.device_put(loaded[name], array.sharding) for name, array in fresh.items()}, notes


def newest_checkpoint(workdir: Path) -> tuple[Path, int]:
    """The checkpoint directory of a run, and the newest step in it.

    Raises:
        UserError: there is none.
    """
    directory = workdir / CHECKPOINTS
    steps = saved_steps(directory)
    if not steps:
        raise UserError(f'{workdir} holds no checkpoint of a run')
    return directory, steps[-1]


def weights_field(params: str) -> str:
    """The field of `TrainState` that 'raw' or 'ema' names.

    Raises:
        UserError: it is neither.
    """
    if params not in FIELDS:
        raise UserError(f"weights are 'raw' or 'ema', not '{params}'")
    return FIELDS[params]
