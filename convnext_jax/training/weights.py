"""Weights to start from, evaluate or convert: of a run of ours, or of anybody's model."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from convnext_jax.config import read_config
from convnext_jax.errors import UserError
from convnext_jax.interop import ImageProcessor, Pretrained, read_pretrained
from convnext_jax.models import Parameters, get_parameters, with_parameters
from convnext_jax.training.checkpoint import DamagedCheckpoint, read_about, restore_parameters, saved_steps
from convnext_jax.training.distributed import gathered, spread
from convnext_jax.training.setup import evaluation_model
from convnext_jax.training.workdir import CHECKPOINTS, CONFIG, workdir_path

FIELDS = {'raw': 'parameters', 'ema': 'ema'}


def read_weights(where: str, params: str, name: str | None = None) -> Pretrained:
    """A model from the workdir of a run of ours, or as `read_pretrained` finds it.

    Args:
        where: a workdir, or anything that `read_pretrained` takes.
        params: 'raw' or 'ema'; of another library's file the entries 'model' or 'state_dict', and 'model_ema' or
            'state_dict_ema'.
        name: as `read_pretrained`.

    Raises:
        UserError: there are no such weights, or they cannot be read.
    """
    field = weights_field(params)
    if not _is_run(where):
        return read_pretrained(where, name=name, entry=_entry(params))
    workdir = _folder(where)
    config = read_config(workdir / CONFIG)
    step, parameters = _newest_parameters(workdir, field)
    class_names = read_about(workdir / CHECKPOINTS, step)['data']['class names']
    model = with_parameters(evaluation_model(config), parameters)
    named = tuple(class_names) if len(class_names) == config.model.num_classes else None
    return Pretrained(model, 'convnext_jax', named, config_processor(config), (), [])


def config_processor(config: ConfigDict) -> ImageProcessor:
    """How a run prepares the images of its evaluations."""
    data = config.data
    return ImageProcessor(data.image_size, data.crop_pct, mean=tuple(data.mean), std=tuple(data.std))


def load_parameters(where: str, params: str, fresh: Parameters) -> tuple[Parameters, list[str]]:
    """The weights at `where` as first values of a run, and a line on what was done.

    A head for another number of classes is newly initialised; nothing else may differ.

    Args:
        where, params: as `read_weights`.
        fresh: this run's parameters; the result has their names, shapes, types and shardings.

    Raises:
        UserError: as `read_weights` and, of a head that is kept, as `single_label`, or names or shapes differ; all
            differences are listed.
    """
    if _is_run(where):
        loaded, notes = _load_run(_folder(where), params, fresh)
    else:
        weights_field(params)
        classes = fresh['head.bias'].size
        pretrained = read_pretrained(where, entry=_entry(params), num_classes=classes, key=jax.random.key(0))
        if 'head.bias' not in pretrained.fresh:
            single_label(pretrained, where)
        loaded = get_parameters(pretrained.model) | {name: fresh[name] for name in pretrained.fresh}
        notes = [f'starts from the {pretrained.layout} weights of {where}', *pretrained.notes]
    differences = [f'{name} is missing' for name in fresh.keys() - loaded.keys()]
    differences += [f'{name} is unexpected' for name in loaded.keys() - fresh.keys()]
    differences += [
        f'{name} is {loaded[name].shape}, not {fresh[name].shape}'
        for name in fresh.keys() & loaded.keys()
        if loaded[name].shape != fresh[name].shape
    ]
    if differences:
        raise UserError(f'the weights of {where} do not fit the model: {"; ".join(sorted(differences))}')
    return {name: spread(loaded[name], array.sharding) for name, array in fresh.items()}, notes


def single_label(pretrained: Pretrained, where: str) -> None:
    """Refuses a head that does not choose one of its classes by a softmax, as training and evaluation here do.

    Raises:
        UserError: it is multi-label, a regression, or has one output.
    """
    if pretrained.activation != 'softmax':
        outputs = pretrained.model.head.bias.size
        kind = pretrained.problem_type or 'a sigmoid of each output'
        raise UserError(
            f'the head of {where} is for {kind}, with {outputs} output(s): training and evaluation here choose one of '
            'several classes by a softmax; without its head the model can be fine-tuned'
        )


def _load_run(workdir: Path, params: str, fresh: Parameters) -> tuple[Parameters, list[str]]:
    step, loaded = _newest_parameters(workdir, weights_field(params))
    notes = [f'starts from the {params} weights of {workdir}, step {step}']
    if loaded['head.bias'].shape != fresh['head.bias'].shape:
        notes.append(
            f'the head is newly initialised: {fresh["head.bias"].size} classes here, {loaded["head.bias"].size} there'
        )
        loaded |= {name: fresh[name] for name in ('head.kernel', 'head.bias')}
    return loaded, notes


def _newest_parameters(workdir: Path, field: str) -> tuple[int, Parameters]:
    directory, step = newest_checkpoint(workdir)
    try:
        return step, restore_parameters(directory, step, field)
    except DamagedCheckpoint as error:
        raise UserError(f'checkpoint {step} of {workdir} is damaged: {error}') from error


def newest_checkpoint(workdir: Path) -> tuple[Path, int]:
    """The checkpoint directory of a run, and the newest step in it.

    Raises:
        UserError: there is none.
    """
    directory = workdir / CHECKPOINTS
    steps = gathered(saved_steps(directory))[0]  # a run that goes on may save one in this moment
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


def _is_run(where: str) -> bool:
    return (_folder(where) / CHECKPOINTS).is_dir()


def _folder(where: str) -> Path:
    return workdir_path(where)


def _entry(params: str) -> str | None:
    return 'ema' if params == 'ema' else None
