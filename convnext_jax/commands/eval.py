"""Evaluates a checkpoint of a run, or weights from elsewhere, on the validation split or on other splits.

    python eval.py --workdir=runs/demo [--params=raw|ema] [--step=N] [--config.data.dir=DIR]
    python eval.py --config=configs/imagenet1k.py:tiny --weights=FOLDER_OR_FILE_OR_HUB_ID [--params=raw|ema]

Without a clone, `convnext-jax eval` takes the same flags, and --config=imagenet1k:tiny names a recipe of the package.

The first form uses the config and the preprocessing of the run. The second uses the data of the config with the
preprocessing that is stored with the weights.

With --probe=knn or --probe=linear, both forms instead compute the accuracy of a classifier on the frozen features. It
learns from data.train_split and is tested on data.eval_split, or on the splits of config.probe of a pre-training run.
The weights need no head.

Both forms accept --resolution and --crop_pct, and without --probe also --flip, --per_class=FILE.csv and
--splits=imagenet2012_real@validation,imagenet_v2@test.

Accuracies and the expected calibration error (ece) are in percent. The last line of output is a JSON object. With
several splits, it holds a list under "splits", and a table is printed before it. A metric that is not finite is null in
the JSON object, and the exit status is then 2.
"""

import math
import signal

from absl import flags
from ml_collections import ConfigDict

from convnext_jax.checkpoints.workdir import CONFIG, workdir_path
from convnext_jax.command_line import (
    all_processes,
    define_config,
    define_processes,
    define_stored_config,
    flag_errors_as_user_errors,
    parse,
    required,
    required_config,
)
from convnext_jax.config import as_dict, changed_fields, check_values, evaluation_fields, read_config
from convnext_jax.errors import UserError
from convnext_jax.output import show, to_json
from convnext_jax.paths import local_path
from convnext_jax.probing.knn import NEIGHBOURS
from convnext_jax.runtime.processes import is_multiprocess
from convnext_jax.tasks import PROBES, make_task
from convnext_jax.training.standalone_evaluation import EvaluationProtocol, Result, evaluate_run, evaluate_weights
from convnext_jax.training.standalone_probe import ProbeProtocol, probe_run, probe_weights


def main(arguments: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string('workdir', None, 'Folder of the run.', flag_values=values)
    flags.DEFINE_string(
        'params', 'raw', "Weights to evaluate: 'raw', or 'ema' for their moving average.", flag_values=values
    )
    flags.DEFINE_integer('step', None, 'Step of the checkpoint; by default the newest.', flag_values=values)
    flags.DEFINE_string(
        'weights', None, 'Folder, file or hub id of weights, or the workdir of a run.', flag_values=values
    )
    flags.DEFINE_list(
        'splits', [], 'Comma-separated list of NAME@SPLIT, data sets in data.dir to evaluate on.', flag_values=values
    )
    flags.DEFINE_string(
        'resolution',
        None,
        "Side of the evaluated images in pixels, or 'test' for the size and crop of timm's published accuracy.",
        flag_values=values,
    )
    flags.DEFINE_float(
        'crop_pct', None, 'Side of the centre crop divided by the shorter side of the image.', flag_values=values
    )
    flags.DEFINE_bool('flip', None, 'Predict each image and its mirror image together.', flag_values=values)
    flags.DEFINE_enum(
        'probe', None, tuple(PROBES), 'Evaluate the frozen features with a classifier on them.', flag_values=values
    )
    flags.DEFINE_integer(
        'neighbours', None, 'Number of neighbours of --probe=knn, 20 by default.', lower_bound=1, flag_values=values
    )
    flags.DEFINE_string('per_class', None, 'CSV file to write the accuracy of each class to.', flag_values=values)
    stored = _stored_config(arguments)
    if stored is None:
        define_config(values, arguments)
    else:
        define_stored_config(values, arguments, stored)
    define_processes(values)
    parse(values, arguments, usage=__doc__)
    if stored is not None:
        _check_overrides(stored, values.config, probe=values.probe is not None)
    with all_processes(values):
        if stored is not None:
            make_task(stored).warn_of_overrides(values.config)
        _evaluate(values)


def _stored_config(arguments: list[str]) -> ConfigDict | None:
    """The stored config of the run given by --workdir; None if there is no --workdir.

    Raises:
        UserError: there is no such run, or --workdir is combined with --weights or --config.
    """
    given = flags.FlagValues()
    for name in ('workdir', 'config', 'weights'):
        flags.DEFINE_string(name, None, '', flag_values=given)
    given.set_gnu_getopt(True)  # continue after the separate value of a flag that is not defined here
    with flag_errors_as_user_errors():
        given(list(arguments), known_only=True)
    if given.workdir is None:
        return None
    if given.weights is not None:
        raise UserError('give --workdir or --weights, not both; --weights also accepts the workdir of a run')
    if given.config is not None:
        raise UserError(
            f'--workdir uses the stored config of the run: drop --config={given.config}, and override single fields '
            'with --config.FIELD=VALUE'
        )
    return read_config(workdir_path(given.workdir) / CONFIG)


def _check_overrides(stored: ConfigDict, config: ConfigDict, *, probe: bool) -> None:
    changes = changed_fields(as_dict(stored), as_dict(config))
    fields = evaluation_fields(stored.task) + (('data.train_split',) if probe else ())
    unused = [f'--config.{field}' for field in changes if field not in fields]
    if unused:
        raise UserError(
            f'{", ".join(unused)} cannot be changed for an evaluation, only {", ".join(fields)}: drop the flag'
        )
    check_values(config)
    if probe:
        used = dict(zip(('name', 'dir', 'train_split', 'eval_split'), make_task(config).labelled_data, strict=True))
        ignored = [name for name, value in used.items() if f'data.{name}' in changes and config.data[name] != value]
        if ignored:
            given, instead = (', '.join(f'--config.{part}.{name}' for name in ignored) for part in ('data', 'probe'))
            raise UserError(f'{given} has no effect, because the run has other data for its probe: give {instead}')


def _evaluate(values: flags.FlagValues) -> None:
    if is_multiprocess():
        # jax.distributed catches SIGTERM so that a run can save first. An evaluation has nothing to save.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if values.weights is not None and values.step is not None:
        raise UserError('--step selects a checkpoint of --workdir and cannot be used with --weights')
    rows = _results(values) if values.probe is None else [_probe(values)]
    not_finite = [problem for result in rows for problem in _not_finite(result)]
    if not_finite:
        raise UserError(
            f'not finite: {", ".join(not_finite)}; the weights contain NaN or infinity, the outputs overflow, or there '
            'was nothing to evaluate: evaluate other weights or data, or an earlier step of the run'
        )


def _probe(values: flags.FlagValues) -> Result:
    """Runs and shows the probe."""
    unused = [f'--{name}' for name in ('splits', 'flip', 'per_class') if values[name].present]
    unused += ['--neighbours'] if values.neighbours and values.probe != 'knn' else []
    if unused:
        raise UserError(f'--probe={values.probe} does not use {", ".join(unused)}: drop the flag')
    protocol = ProbeProtocol(values.probe, values.neighbours or NEIGHBOURS, _pixels(values), values.crop_pct)
    if values.weights is None:
        workdir, config = workdir_path(required(values, 'workdir')), values.config
        result = probe_run(workdir, config, values.params, values.step, protocol)
    else:
        result = probe_weights(required_config(values), values.weights, values.params, protocol)
    show(to_json(result))
    return result


def _results(values: flags.FlagValues) -> list[Result]:
    """Evaluates the splits, and shows the results."""
    if values.neighbours is not None:
        raise UserError('--neighbours belongs to --probe=knn: give both, or neither')
    test_size = values.resolution == 'test'
    if test_size and values.weights is None:
        raise UserError('--resolution=test needs --weights with a config of timm')
    pixels = None if test_size else _pixels(values)
    changes = {'data.image_size': pixels, 'data.crop_pct': values.crop_pct, 'eval.flip': values.flip}
    protocol = EvaluationProtocol(
        splits=tuple(map(_name_and_split, values.splits)),
        changes={field: value for field, value in changes.items() if value is not None},
        test_size=test_size,
        table=local_path(values.per_class) if values.per_class else None,
    )
    if values.weights is None:
        workdir, config = workdir_path(required(values, 'workdir')), values.config
        results = evaluate_run(workdir, config, values.params, values.step, protocol)
    else:
        results = evaluate_weights(required_config(values), values.weights, values.params, protocol)
    several = len(protocol.splits) > 1
    rows: list[Result] = []
    for result in results:
        if several and not rows:
            show(f'{"data":34}{"images":>9}' + ''.join(f'{name:>10}' for name in _metrics(result)))
        rows.append(result)
        if several:
            show(_row(result))
    show(to_json({'splits': rows} if several else rows[0]))
    return rows


def _pixels(values: flags.FlagValues) -> int | None:
    """The number in --resolution; None if the flag is not given."""
    if values.resolution is None:
        return None
    if not values.resolution.isdecimal() or int(values.resolution) < 1:
        raise UserError(f'--resolution={values.resolution} must be a number of pixels, or test without --probe')
    return int(values.resolution)


def _name_and_split(text: str) -> tuple[str, str]:
    name, at, split = text.partition('@')
    if not (name and at and split):
        raise UserError(f"--splits needs NAME@SPLIT, for example imagenet_v2@test, not '{text}'")
    return name, split


def _not_finite(result: Result) -> list[str]:
    split = f'{result["data"]}@{result["split"]}'
    return [f'{name} of {split}' for name, x in result.items() if isinstance(x, float) and not math.isfinite(x)]


def _metrics(result: Result) -> dict[str, float]:
    """The metrics among the values of a result: its floats."""
    return {name: x for name, x in result.items() if isinstance(x, float)}


def _row(result: Result) -> str:
    numbers = ''.join(f'{value:10.4f}' for value in _metrics(result).values())
    split = f'{result["data"]}@{result["split"]}'
    return f'{split:34}{result["images"]:9,}{numbers}'
