"""Evaluates a run of ours, or anybody's weights on the data of a config, with the preprocessing that comes with them.

    python eval.py --workdir=runs/demo [--params=raw|ema] [--step=N] [--config.data.dir=DIR]
    python eval.py --config=configs/imagenet1k.py:tiny --weights=FOLDER_OR_FILE_OR_HUB_ID [--params=raw|ema]

Either takes other splits (--splits=imagenet2012_real@validation,imagenet_v2@test), --resolution, --crop_pct, --flip,
and --per_class=FILE.csv. Top-1, top-5 and the expected calibration error (ece) are in percent. The last line of output
is one JSON object; of several splits it holds a list under "splits", and a table stands before it. A metric that is not
finite is null in it, and the exit status is 2.
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
    parse,
    refusals,
    required,
    required_config,
    run,
)
from convnext_jax.config import as_dict, changed_fields, check_values, evaluation_fields, read_config
from convnext_jax.errors import UserError
from convnext_jax.output import show, to_json
from convnext_jax.paths import local_path
from convnext_jax.runtime.processes import is_multiprocess
from convnext_jax.training.standalone_evaluation import Protocol, Result, evaluate_run, evaluate_weights


def main(arguments: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string('workdir', None, 'Folder of the run.', flag_values=values)
    flags.DEFINE_string('params', 'raw', "Which weights: 'raw', or 'ema' for the moving average.", flag_values=values)
    flags.DEFINE_integer('step', None, 'Step of the checkpoint; the newest by default.', flag_values=values)
    flags.DEFINE_string('weights', None, 'Of another library, or the workdir of a run.', flag_values=values)
    flags.DEFINE_list('splits', [], 'NAME@SPLIT of other data sets in data.dir, by commas.', flag_values=values)
    flags.DEFINE_integer('resolution', None, 'Side of the images in pixels.', lower_bound=1, flag_values=values)
    flags.DEFINE_float('crop_pct', None, 'Share of the shorter side in the crop.', flag_values=values)
    flags.DEFINE_bool('flip', None, 'Average the logits with those of the mirrored image.', flag_values=values)
    flags.DEFINE_string('per_class', None, 'CSV file for the accuracy of each class.', flag_values=values)
    stored = _stored_config(arguments)
    if stored is None:
        define_config(values, arguments)
    else:
        define_stored_config(values, arguments, stored)
    define_processes(values)
    parse(values, arguments, usage=__doc__)
    if stored is not None:
        _check_overrides(stored, values['config'].value)
    with all_processes(values):
        _evaluate(values)


def _stored_config(arguments: list[str]) -> ConfigDict | None:
    """The config of the run whose --workdir is among the arguments; None without --workdir.

    Raises:
        UserError: there is no such run, or two flags contradict each other.
    """
    given = flags.FlagValues()
    for name in ('workdir', 'config', 'weights'):
        flags.DEFINE_string(name, None, '', flag_values=given)
    given.set_gnu_getopt(True)  # reads on behind the value of a flag that is not known here
    with refusals():
        given(list(arguments), known_only=True)
    if given.workdir is None:
        return None
    if given.weights is not None:
        raise UserError('--workdir and --weights do not go together: --weights takes the workdir of a run as well')
    if given.config is not None:
        raise UserError(
            f'--workdir brings the config of its run: leave out --config={given.config}, and override its values with '
            '--config.FIELD=VALUE'
        )
    return read_config(workdir_path(given.workdir) / CONFIG)


def _check_overrides(stored: ConfigDict, config: ConfigDict) -> None:
    changes = changed_fields(as_dict(stored), as_dict(config))
    fields = evaluation_fields(stored.task)
    unused = [f'--config.{field}' for field in changes if field not in fields]
    if unused:
        raise UserError(
            f'an evaluation does not read {", ".join(unused)}: of the config of a run it takes {", ".join(fields)}'
        )
    check_values(config)


def _evaluate(values: flags.FlagValues) -> None:
    changes = {'data.image_size': values.resolution, 'data.crop_pct': values.crop_pct, 'eval.flip': values.flip}
    protocol = Protocol(
        splits=tuple(map(_name_and_split, values.splits)),
        changes={field: value for field, value in changes.items() if value is not None},
        table=local_path(values.per_class) if values.per_class else None,
    )
    if is_multiprocess():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX's runtime has taken it, for runs that save
    if values.weights is None:
        workdir, config = workdir_path(required(values, 'workdir')), values['config'].value
        results = evaluate_run(workdir, config, values.params, values.step, protocol)
    elif values.step is None:
        results = evaluate_weights(required_config(values), values.weights, values.params, protocol)
    else:
        raise UserError('--step chooses a checkpoint of --workdir, and does not go with --weights')
    several = len(protocol.splits) > 1
    rows = []
    for result in results:
        if several and not rows:
            show(f'{"data":34}{"images":>9}' + ''.join(f'{name:>10}' for name in _metrics(result)))
        rows.append(result)
        if several:
            show(_row(result))
    show(to_json({'splits': rows} if several else rows[0]))
    not_finite = [problem for result in rows for problem in _not_finite(result)]
    if not_finite:
        raise UserError(
            f'not finite: {", ".join(not_finite)}. The weights hold NaN or infinity, or the outputs overflow; evaluate '
            'other weights, or an earlier step of the run'
        )


def _name_and_split(text: str) -> tuple[str, str]:
    name, at, split = text.partition('@')
    if not (name and at and split):
        raise UserError(f"--splits takes NAME@SPLIT, as imagenet_v2@test, not '{text}'")
    return name, split


def _not_finite(result: Result) -> list[str]:
    place = f'{result["data"]}@{result["split"]}'
    return [f'{name} of {place}' for name, x in result.items() if isinstance(x, float) and not math.isfinite(x)]


def _metrics(result: Result) -> dict[str, float]:
    return {name: x for name, x in result.items() if isinstance(x, float)}


def _row(result: Result) -> str:
    numbers = ''.join(f'{value:10.4f}' for value in _metrics(result).values())
    return f'{result["data"] + "@" + result["split"]:34}{result["images"]:9,}{numbers}'


if __name__ == '__main__':
    run(main)
