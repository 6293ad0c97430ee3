"""The config fields of an experiment, with their defaults and meaning. The files in configs/ override the defaults.

This module has the fields that all tasks share. The fields of a single task are in its module in `tasks/`.
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
    """The default config of a task: 224-pixel photos, and the settings that all published V1 recipes share.

    Raises:
        UserError: the task is unknown.
    """
    config = ConfigDict()
    config.task = task
    COMMON.defaults(config)
    task_class(task).fields.defaults(config)
    return config


def _defaults(config: ConfigDict) -> None:
    config.seed = 0
    # Length of the run. Fields in steps override the corresponding fields in epochs, unless they are 0.
    config.epochs = 300.0
    config.steps = 0
    # Images per optimizer step, over all devices. A device computes batch_size / devices / accumulation_steps at once.
    config.batch_size = 4096
    config.accumulation_steps = 1

    config.model = ConfigDict()
    config.model.name = 'convnext_tiny'  # `python -m convnext_jax models` lists the names
    config.model.drop_path_rate = 0.0
    config.model.layer_scale_init = -1.0  # −1: the default of the architecture; 0: no layer scale
    config.model.patch_size = 0  # 0: the default of the architecture
    config.model.dtype = 'float32'  # of matrix products and convolutions; use 'bfloat16' on accelerators
    config.model.remat = 'dots'  # backward pass recomputes nothing ('none'), all but matmuls ('dots') or all ('full')
    config.model.unroll = False  # compile each block separately: slower to compile; faster, on CPU by 1 to 3 %
    config.model.pallas = False  # depthwise convolutions with a Pallas kernel on TPU v5e, v5p, v6e; untested on TPUs

    config.init = ConfigDict()
    config.init.weights = ''  # fine-tuning: a workdir, or a folder, file or hub id of weights; '': train from scratch
    config.init.params = 'raw'  # 'raw' or 'ema' (moving average); in a .pth file: the entry 'model' or 'model_ema'

    config.data = ConfigDict()
    config.data.name = 'imagenet2012'  # 'fashion_mnist_mini' (bundled), 'folder', 'webdataset', or a TFDS name
    config.data.dir = ''  # folder of images, folder of tar shards, or TFDS data directory
    config.data.train_split = 'train'
    config.data.eval_split = 'validation'
    config.data.image_size = 224
    config.data.repeats = 1  # repeated augmentation: copies of each image in a batch; epochs keep their length
    config.data.workers = -1  # processes that decode training images; 0: threads instead; −1: chosen by CPU cores
    config.data.on_error = 'replace'  # unreadable training images: 'replace' (at most 1 in 1,000) or 'raise'
    config.data.patience_seconds = 300.0  # time without a batch until the run reports what it is waiting for
    # Mean and standard deviation of each channel, after integer pixels are divided by the largest value of their type.
    # There is one value for each channel; `python -m convnext_jax measure` prints them.
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)

    config.optimizer = ConfigDict()  # AdamW
    config.optimizer.learning_rate = 2.5e-4  # peak for 256 images; the run uses it times batch_size / 256
    config.optimizer.schedule = 'cosine'  # decline of the learning rate after the peak: 'cosine' or 'linear'
    config.optimizer.min_learning_rate = 1e-6  # at the end of the run; not scaled by the batch size
    config.optimizer.warmup_epochs = 20.0
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 0.05
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.999
    config.optimizer.epsilon = 1e-8
    config.optimizer.layer_decay = 1.0  # a layer's learning rate divided by the next layer's; 1: off
    config.optimizer.layer_decay_rule = 'single'  # a layer is a 'single' block, a 'group' of blocks, or a 'stage'
    config.optimizer.clip_norm = 0.0  # maximum global norm of the gradient; 0: off

    config.ema = ConfigDict()
    config.ema.decay = 0.9999  # of the moving average of the weights; 0: none

    config.mesh = ConfigDict()
    # The device mesh has data × fsdp devices. One of the two may be −1: all remaining devices.
    config.mesh.data = -1  # images are sharded along this axis, and the state is replicated
    config.mesh.fsdp = 1  # images, large parameters, their moments and moving average are sharded along this axis

    config.log_every_steps = 50
    config.eval_every_epochs = 1.0
    config.eval_every_steps = 0
    config.checkpoint_every_steps = 1000
    config.keep_checkpoints = 2  # number of newest checkpoints to keep; the best by the task's metric is kept as well
    config.compilation_cache_dir = ''  # folder for compiled programs; '': JAX_COMPILATION_CACHE_DIR, or no cache


COMMON = Fields(
    _defaults,
    positive=(
        *('batch_size', 'accumulation_steps', 'log_every_steps', 'eval_every_epochs', 'checkpoint_every_steps'),
        *('keep_checkpoints', 'data.image_size', 'data.repeats', 'data.patience_seconds'),
        *('optimizer.learning_rate', 'optimizer.epsilon', 'optimizer.layer_decay'),
    ),
    not_negative=(
        *('seed', 'epochs', 'steps', 'eval_every_steps', 'model.patch_size', 'optimizer.min_learning_rate'),
        *('optimizer.warmup_epochs', 'optimizer.warmup_steps', 'optimizer.weight_decay', 'optimizer.clip_norm'),
    ),
    below_one=('optimizer.beta1', 'optimizer.beta2', 'ema.decay', 'model.drop_path_rate'),
    at_most_one=('optimizer.layer_decay',),
    choices={
        'model.remat': ('none', 'dots', 'full'),
        'init.params': ('raw', 'ema'),
        'data.on_error': ('replace', 'raise'),
        'optimizer.schedule': ('cosine', 'linear'),
        'optimizer.layer_decay_rule': ('single', 'group', 'stage'),
    },
    fixed=('task', 'seed', 'batch_size', 'model', 'data', 'ema'),
    free=(
        *('data.dir', 'data.on_error', 'data.patience_seconds', 'data.workers', 'data.eval_split'),
        *('model.dtype', 'model.remat', 'model.unroll', 'model.pallas'),
    ),
    paths=('data.dir',),
    evaluation=(
        *('batch_size', 'accumulation_steps', 'model.dtype'),
        *('data.name', 'data.dir', 'data.eval_split', 'data.image_size', 'data.mean', 'data.std'),
        'data.patience_seconds',
    ),
)


def check_values(config: ConfigDict) -> None:
    """Checks that a config has the fields of its task and no others, with valid values.

    Raises:
        UserError: the task is unknown, fields are missing or unknown, or values are invalid. The message lists all of
            them.
    """
    values, fields = _flatten(as_dict(config)), _flatten(as_dict(default_config(config.task)))
    if missing := fields.keys() - values.keys():
        raise UserError(
            f'the config has no {", ".join(sorted(missing))}, which the task {config.task} needs: choose a config file '
            'for this task'
        )
    if unknown := values.keys() - fields.keys():
        raise UserError(
            f'the task {config.task} has no config field {", ".join(sorted(unknown))}: correct its name, or remove it '
            'from the config'
        )
    problems = COMMON.problems(values) + task_class(config.task).fields.problems(values) + make_task(config).problems()
    problems += [
        f'{field} must be finite, not {value}'
        for field, value in values.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    mean, std = values['data.mean'], values['data.std']
    if not mean or len(std) != len(mean) or not all(value > 0 for value in std):
        problems.append(
            f'data.mean and data.std must have one value for each channel, with std above 0, not {mean} and {std}'
        )
    if values['data.workers'] < -1:
        problems.append(f'data.workers must be −1 or a number of processes, not {values["data.workers"]}')
    if values['seed'] >= 2**63:
        problems.append(f'seed must be below 2⁶³, not {values["seed"]}')
    if problems:
        raise UserError('; '.join(problems))


def changed_fields(old: dict, new: dict) -> dict[str, tuple]:
    """The fields that differ between two configs, as dotted name → (old value, new value).

    Args:
        old, new: from `as_dict`. A missing field has the value None.
    """
    flat_old, flat_new = _flatten(old), _flatten(new)
    fields = sorted(flat_old.keys() | flat_new.keys())
    return {
        field: (flat_old.get(field), flat_new.get(field))
        for field in fields
        if flat_old.get(field) != flat_new.get(field)
    }


def is_fixed(field: str, task: str) -> bool:
    """Whether a run must keep the value of this field when it resumes."""
    parts = (COMMON, task_class(task).fields)
    free, fixed = (name for part in parts for name in part.free), (name for part in parts for name in part.fixed)
    return field not in free and any(field == name or field.startswith(f'{name}.') for name in fixed)


def evaluation_fields(task: str) -> tuple[str, ...]:
    """The fields that an evaluation reads; `eval.py --workdir` may override them."""
    return COMMON.evaluation + task_class(task).fields.evaluation


def as_dict(config: ConfigDict) -> dict:
    """The config as nested dicts of JSON values: tuples become lists."""
    return json.loads(config.to_json())


def from_dict(values: dict) -> ConfigDict:
    """The inverse of `as_dict`; checks the type of every field.

    A missing field gets its default, because a config that an earlier version wrote does not have newer fields.

    Raises:
        UserError: the task or a field is unknown, or a value has the wrong type.
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
    """Reads the config that a run wrote into its workdir.

    Args:
        path: path of config.json.

    Raises:
        UserError: the file is missing or damaged, or another version of the package wrote an unknown field.
    """
    try:
        values = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(values, dict):
            raise ValueError('not a JSON object')
    except FileNotFoundError as error:
        raise UserError(f'{path.parent} holds no run: it has no {path.name}') from error
    except ValueError as error:
        raise UserError(
            f'{path} is damaged ({first_line(error)}): delete it, and run the training command again to rewrite it'
        ) from error
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from error
    try:
        return from_dict(values)
    except UserError as error:
        raise UserError(
            f'another version of convnext_jax wrote {path}: {error}; use the version that wrote it'
        ) from error


def _flatten(values: dict, prefix: str = '') -> dict:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f'{prefix}{name}.') if isinstance(value, dict) else {f'{prefix}{name}': value}
    return flat


def resolve_paths(config: ConfigDict) -> None:
    """Makes the local paths of a config absolute, so that they are valid from any working directory.

    Bucket URLs, hub ids and '' do not change.

    Raises:
        UserError: a `~` cannot be expanded, or a data set is in a bucket.
    """
    for field in COMMON.paths + task_class(config.task).fields.paths:
        if path := _flatten(as_dict(config))[field]:
            if '://' in path:  # ArrayRecord, tar shards and image folders are read at random positions of local files
                raise UserError(
                    f'{field}={path}: data sets are read from file systems, not from buckets: copy it, or mount the '
                    'bucket with gcsfuse'
                )
            config.update_from_flattened_dict({field: str(local_path(path).absolute())})
    weights = config.init.weights
    if weights and os.path.exists(local_path(weights)):  # False also for a name that is too long for a file
        config.init.weights = str(local_path(weights).absolute())
    cache = config.compilation_cache_dir
    if cache and '://' not in cache:
        config.compilation_cache_dir = str(local_path(cache).absolute())
