"""Weights to start from, evaluate or convert: of a run of ours, or of anybody's model."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from convnext_jax.config import read_config
from convnext_jax.data.class_names import kept_outputs
from convnext_jax.errors import UserError
from convnext_jax.interop import ImageProcessor, Pretrained, read_pretrained
from convnext_jax.models import Parameters, get_parameters, with_parameters
from convnext_jax.training.checkpoint import DamagedCheckpoint, read_about, restore_parameters, saved_steps
from convnext_jax.training.distributed import gathered, spread
from convnext_jax.training.setup import evaluation_model
from convnext_jax.training.workdir import CHECKPOINTS, CONFIG, workdir_path

HEAD = ('head.kernel', 'head.bias')
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
        pretrained = read_pretrained(where, name=name, entry=_entry(params))
        return pretrained._replace(origin=f'the {params} weights of {where} ({pretrained.layout} layout)')
    workdir = _folder(where)
    config = read_config(workdir / CONFIG)
    step, parameters = _newest_parameters(workdir, field)
    class_names = read_about(workdir / CHECKPOINTS, step)['data']['class names']
    model = with_parameters(evaluation_model(config), parameters)
    named = (*class_names, *(f'class {label}' for label in range(len(class_names), config.model.num_classes)))
    notes = ['--params=ema takes the moving average'] if params == 'raw' and config.ema.decay else []
    origin = f'the {params} weights of {where}, step {step}'
    return Pretrained(model, 'convnext_jax', named, config_processor(config), (), notes, origin=origin)


def config_processor(config: ConfigDict) -> ImageProcessor:
    """How a run prepares the images of its evaluations."""
    data = config.data
    return ImageProcessor(data.image_size, data.crop_pct, mean=tuple(data.mean), std=tuple(data.std))


def load_parameters(init: ConfigDict, initial: Parameters, class_names: Sequence[str]) -> tuple[Parameters, list[str]]:
    """Loads the first parameters of a run from other weights, and says in lines what was done.

    An output of the head starts from the weights' output for the class of that name; the other outputs keep their
    initial values. Nothing else may differ.

    Args:
        init: the config's `init` section: `weights` and `params` as `read_weights` takes them; `head`, 'match' or
            'new' for a head that keeps all its initial values.
        initial: this run's initial parameters; the result has their names, shapes, types and shardings.
        class_names: of this run's classes.

    Raises:
        UserError: as `read_weights`; the head would start from one that is not a softmax over classes; or names or
            shapes differ, and all differences are listed.
    """
    where, params = init.weights, init.params
    if _is_run(where):
        step, loaded, names = _load_run(_folder(where), params)
        notes, new, pretrained = [f'starts from the {params} weights of {where}, step {step}'], (), None
    else:
        weights_field(params)
        classes = initial['head.bias'].size
        pretrained = read_pretrained(where, entry=_entry(params), new_classes=classes, key=jax.random.key(0))
        loaded, names, new = get_parameters(pretrained.model), pretrained.class_names, pretrained.fresh
        notes = [f'starts from the {pretrained.layout} weights of {where}', *pretrained.notes]
    values = {name: initial[name] for name in new}
    if 'head.bias' not in new:
        head, note = _matched_head(loaded, initial, names, class_names, init.head)
        if note:
            notes.append(note)
        if head and pretrained and pretrained.activation != 'softmax':
            raise UserError(f'{describe_head(pretrained, where)}. --config.init.head=new starts a new head')
        values |= head or {name: initial[name] for name in HEAD}
    differences = [f'{name} is missing' for name in initial.keys() - loaded.keys()]
    differences += [f'{name} is unexpected' for name in loaded.keys() - initial.keys()]
    differences += [
        f'{name} is {loaded[name].shape}, not {initial[name].shape}'
        for name in initial.keys() & loaded.keys() - values.keys()
        if loaded[name].shape != initial[name].shape
    ]
    if differences:
        raise UserError(f'the weights of {where} do not fit the model: {"; ".join(sorted(differences))}')
    rest = {name: spread(loaded[name], x.sharding) for name, x in initial.items() if name not in values}
    return {name: (values | rest)[name] for name in initial}, notes


def _matched_head(
    loaded: Parameters, initial: Parameters, old_names: Sequence[str] | None, new_names: Sequence[str], rule: str
) -> tuple[Parameters, str]:
    """The head with the outputs that it keeps, {} if it keeps none; and a line for the user, or ''."""
    if rule == 'new':
        return {}, 'the head is newly initialised'
    outputs, old_outputs = initial['head.bias'].size, loaded['head.bias'].size
    kept, note = kept_outputs(new_names, outputs, old_names, old_outputs)
    if max(kept) < 0 or loaded['head.kernel'].shape[0] != initial['head.kernel'].shape[0]:
        return {}, note
    sources = np.asarray(kept)

    def merge(new: jax.Array, old: np.ndarray) -> jax.Array:
        return jnp.where(sources >= 0, old[..., np.maximum(sources, 0)], new)

    def merged(name: str) -> jax.Array:
        return jax.jit(merge, out_shardings=initial[name].sharding)(initial[name], np.asarray(loaded[name]))

    return {name: merged(name) for name in HEAD}, note


def check_single_label(pretrained: Pretrained, where: str) -> None:
    """Refuses a head that does not choose one of its classes by a softmax, as evaluation here does.

    Raises:
        UserError: it is multi-label, a regression, or has one output.
    """
    if pretrained.activation != 'softmax':
        raise UserError(describe_head(pretrained, where))


def describe_head(pretrained: Pretrained, where: str) -> str:
    """The reason why a head is neither trained nor evaluated here."""
    outputs = pretrained.model.head.bias.size
    kind = pretrained.problem_type or 'a sigmoid of each output'
    return (
        f'the head of {where} is for {kind}, with {outputs} output(s): training and evaluation here choose one of '
        'several classes by a softmax'
    )


def _load_run(workdir: Path, params: str) -> tuple[int, Parameters, list[str]]:
    """Step, parameters and class names of the newest checkpoint."""
    step, loaded = _newest_parameters(workdir, weights_field(params))
    return step, loaded, read_about(workdir / CHECKPOINTS, step)['data']['class names']


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
    try:
        return (_folder(where) / CHECKPOINTS).is_dir()
    except OSError:  # longer than a path can be
        return False


def _folder(where: str) -> Path:
    return workdir_path(where)


def _entry(params: str) -> str | None:
    return 'ema' if params == 'ema' else None
