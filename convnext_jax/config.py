"""The fields of an experiment, with their defaults and meaning. The files under configs/ set what differs.

Here are the fields that all experiments have; those of one task are in its file under `tasks/`.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from convnext_jax.errors import UserError, first_line
from convnext_jax.fields import Fields
from convnext_jax.paths import local_path
from convnext_jax.tasks import make_task, task_class


def default_config(task: str = 'classification') -> ConfigDict:
    """The defaults of a task, for 224-pixel photographs, with what all published V1 recipes share.

    Raises:
        UserError: there is no such task.
    """
    config = ConfigDict()
    config.task = task
    COMMON.defaults(config)
    task_class(task).fields.defaults(config)
    return config


def _defaults(config: ConfigDict) -> None:
    config.seed = 0
    # Durations: `steps`, unless 0, stands in for `epochs`, and `optimizer.warmup_steps` for `warmup_epochs`.
    config.epochs = 300.0
    config.steps = 0
    # Images to an optimizer step, over all devices. Each device sees batch_size / devices / accumulation_steps at once.
    config.batch_size = 4096
    config.accumulation_steps = 1

    config.model = ConfigDict()
    config.model.name = 'convnext_tiny'  # python -m convnext_jax models
    config.model.drop_path_rate = 0.0
    config.model.layer_scale_init = -1.0  # −1: the architecture's own; 0: no layer scale
    config.model.patch_size = 0  # 0: the architecture's own
    config.model.dtype = 'float32'  # of matrix products and convolutions: 'bfloat16' on accelerators
    config.model.remat = 'dots'  # recomputed in the backward pass: 'none', all but the 'dots', or the 'full' block
    config.model.unroll = False  # every block compiled by itself: longer, for 1 to 3 %; on TPU a quarter less memory
    config.model.pallas = False  # depthwise convolutions on TPU v5e, v5p, v6e by our kernel; untried

    config.init = ConfigDict()
    config.init.weights = ''  # fine-tuning: a workdir of ours, or a folder, file or hub id of another library
    config.init.params = 'raw'  # which of its weights: 'raw' or 'ema' ('model' or 'model_ema' of an original .pth)

    config.data = ConfigDict()
    config.data.name = 'imagenet2012'  # 'fashion_mnist_mini' (bundled), 'folder', 'webdataset', or a TFDS name
    config.data.dir = ''  # the folder of images or of tar shards, or the TFDS data directory
    config.data.train_split = 'train'
    config.data.eval_split = 'validation'
    config.data.image_size = 224
    config.data.repeats = 1  # copies of an image in a batch, each augmented by itself; epochs keep their length
    config.data.workers = -1  # processes that decode training images; 0: threads of this one; −1: by the cores
    config.data.on_error = 'replace'  # an unreadable training image by the next, up to 1 in 1,000; or 'raise'
    config.data.patience_seconds = 300.0  # without a batch; then the run says what it waits for, and waits on
    config.data.mean = (0.485, 0.456, 0.406)  # of pixels in [0, 1]; one value for each channel
    config.data.std = (0.229, 0.224, 0.225)

    config.optimizer = ConfigDict()  # AdamW
    config.optimizer.learning_rate = 2.5e-4  # peak for 256 images: multiplied by batch_size / 256
    config.optimizer.min_learning_rate = 1e-6  # end of the cosine, not scaled
    config.optimizer.warmup_epochs = 20.0
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 0.05
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.999
    config.optimizer.epsilon = 1e-8
    config.optimizer.layer_decay = 1.0  # learning rate of each layer to that of the next; 1: the same for all
    config.optimizer.layer_decay_rule = 'single'  # a layer is a 'single' block or a 'group' of them
    config.optimizer.clip_norm = 0.0  # largest global norm of the gradient; 0: off

    config.ema = ConfigDict()
    config.ema.decay = 0.9999  # 0: no moving average

    config.mesh = ConfigDict()
    # The devices: images are spread over data × fsdp of them; −1, for one of the two, takes those that are left.
    config.mesh.data = -1  # the state is repeated along this axis
    config.mesh.fsdp = 1  # large parameters, their moments and moving average are cut into so many pieces

    config.log_every_steps = 50
    config.eval_every_epochs = 1.0
    config.checkpoint_every_steps = 1000
    config.keep_checkpoints = 2  # the newest; the best by the task's metric is kept besides
    config.compilation_cache_dir = ''  # compiled programs for the next start; '': none, or JAX_COMPILATION_CACHE_DIR


COMMON = Fields(
    _defaults,
    positive=(
        *('batch_size', 'accumulation_steps', 'log_every_steps', 'eval_every_epochs', 'checkpoint_every_steps'),
        *('keep_checkpoints', 'data.image_size', 'data.repeats', 'data.patience_seconds'),
        *('optimizer.learning_rate', 'optimizer.epsilon', 'optimizer.layer_decay'),
    ),
    not_negative=(
        *('seed', 'epochs', 'steps', 'model.patch_size', 'optimizer.min_learning_rate', 'optimizer.warmup_epochs'),
        *('optimizer.warmup_steps', 'optimizer.weight_decay', 'optimizer.clip_norm'),
    ),
    below_one=('optimizer.beta1', 'optimizer.beta2', 'ema.decay', 'model.drop_path_rate'),
    at_most_one=('optimizer.layer_decay',),
    choices={
        'model.remat': ('none', 'dots', 'full'),
        'init.params': ('raw', 'ema'),
        'data.on_error': ('replace', 'raise'),
        'optimizer.layer_decay_rule': ('single', 'group'),
    },
    fixed=('task', 'seed', 'batch_size', 'model', 'data', 'ema'),
    free=(
        *('data.dir', 'data.on_error', 'data.patience_seconds', 'data.workers', 'data.eval_split'),
        *('model.dtype', 'model.remat', 'model.unroll', 'model.pallas'),
    ),
    evaluation=(
        *('batch_size', 'accumulation_steps', 'model.dtype'),
        *('data.name', 'data.dir', 'data.eval_split', 'data.image_size', 'data.mean', 'data.std'),
        'data.patience_seconds',
    ),
)


def check_values(config: ConfigDict) -> None:
    """Refuses values out of their range.

    Raises:
        UserError: the task is unknown, a field is missing, or a value is wrong; all of these are listed.
    """
    values, fields = _flatten(as_dict(config)), _flatten(as_dict(default_config(config.task)))
    if missing := fields.keys() - values.keys():
        raise UserError(
            f'the config lacks {", ".join(sorted(missing))} of the task {config.task}: take a config file of this task'
        )
    problems = COMMON.problems(values) + task_class(config.task).fields.problems(values) + make_task(config).problems()
    problems += [
        f'{field} must be finite, not {value}'
        for field, value in values.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    mean, std = values['data.mean'], values['data.std']
    if len(mean) not in (1, 3) or len(std) != len(mean) or not all(value > 0 for value in std):
        problems.append(f'data.mean and data.std need one value (grey) or three (RGB), std above 0: {mean}, {std}')
    if values['data.workers'] < -1:
        problems.append(f'data.workers must be −1 or a number of processes, not {values["data.workers"]}')
    if values['seed'] >= 2**63:
        problems.append(f'seed must be below 2⁶³: {values["seed"]}')
    if problems:
        raise UserError('; '.join(problems))


def changed_fields(old: dict, new: dict) -> dict[str, tuple]:
    """Field → (old, new) for all that differs, fields in dotted form."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    fields = sorted(flat_old.keys() | flat_new.keys())
    return {
        field: (flat_old.get(field), flat_new.get(field))
        for field in fields
        if flat_old.get(field) != flat_new.get(field)
    }


def is_fixed(field: str, task: str) -> bool:
    """Whether a run of a task that resumes must keep this field's value."""
    parts = (COMMON, task_class(task).fields)
    free, fixed = (name for part in parts for name in part.free), (name for part in parts for name in part.fixed)
    return field not in free and any(field == name or field.startswith(f'{name}.') for name in fixed)


def evaluation_fields(task: str) -> tuple[str, ...]:
    """The fields that an evaluation of a run's checkpoint reads, and that may therefore differ from the run's own."""
    return COMMON.evaluation + task_class(task).fields.evaluation


def as_dict(config: ConfigDict) -> dict:
    """The config as JSON holds it: nested dicts, tuples as lists."""
    return json.loads(config.to_json())


def from_dict(values: dict) -> ConfigDict:
    """The config that `as_dict` gave, with every field's type checked.

    A field that is missing has its default: an earlier version, which did not have the field, wrote the config.

    Raises:
        UserError: a field is unknown or of another type, or there is no such task.
    """
    task = values.get('task')
    config = default_config(task) if isinstance(task, str) else default_config()
    unknown = _flatten(values).keys() - _flatten(as_dict(config)).keys()
    if unknown:
        raise UserError(f'this version of convnext_jax has no config field {", ".join(sorted(unknown))}')
    for field, value in _flatten(values).items():
        if value is None:
            raise UserError(f'config field {field} is null')
        try:
            config.update_from_flattened_dict({field: tuple(value) if isinstance(value, list) else value})
        except (TypeError, ValueError) as error:
            raise UserError(f'config field {field}: {error}') from error
    return config


def read_config(path: Path) -> ConfigDict:
    """The config that a run wrote into its workdir.

    Raises:
        UserError: no run is there, the file is damaged, or another version wrote a field that is unknown here.
    """
    try:
        values = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(values, dict):
            raise ValueError('it holds no JSON object')
    except FileNotFoundError as error:
        raise UserError(f'{path.parent} holds no run: there is no {path.name} in it') from error
    except ValueError as error:
        raise UserError(
            f'{path} is damaged ({first_line(error)}): delete it and run the training command again, which writes it'
        ) from error
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from error
    try:
        return from_dict(values)
    except UserError as error:
        raise UserError(f'{path} is of another version: {error}. Use the version that wrote it') from error


def _flatten(values: dict, prefix: str = '') -> dict:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f'{prefix}{name}.') if isinstance(value, dict) else {f'{prefix}{name}': value}
    return flat


def resolve_paths(config: ConfigDict) -> None:
    """Makes the paths of this machine in a config absolute, so that they mean the same from any folder.

    A bucket, a hub id and '' stay as they are.

    Raises:
        UserError: a `~` cannot be expanded.
    """
    if config.data.dir:
        config.data.dir = str(local_path(config.data.dir).absolute())
    weights = config.init.weights
    if weights and os.path.exists(local_path(weights)):  # False of a name that no file can have
        config.init.weights = str(local_path(weights).absolute())
    cache = config.compilation_cache_dir
    if cache and '://' not in cache:
        config.compilation_cache_dir = str(local_path(cache).absolute())
