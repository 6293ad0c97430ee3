"""Evaluates a run of ours, or anybody's weights on the data of a config, with the preprocessing that comes with them.

    python eval.py --workdir=runs/demo [--params=raw|ema] [--step=N]
    python eval.py --config=configs/imagenet1k.py:tiny --weights=FOLDER_OR_FILE_OR_HUB_ID [--params=raw|ema]

Either takes other splits (--splits=imagenet2012_real@validation,imagenet_v2@test), --resolution, --crop_pct, --flip,
and --per_class=FILE.csv. Top-1, top-5 and the expected calibration error (ece) are in percent. The last line of output
is one JSON object; of several splits it holds a list under "splits", and a table stands before it. A metric that is not
finite is null in it, and the exit status is 2.
"""

import math
import signal
from pathlib import Path

from absl import flags

from convnext_jax.command_line import (
    all_processes,
    define_config,
    define_processes,
    parse,
    required,
    required_config,
    run,
)
from convnext_jax.errors import UserError
from convnext_jax.output import show, to_json
from convnext_jax.training.distributed import are_several
from convnext_jax.training.evaluate import Protocol, Result, evaluate_run, evaluate_weights
from convnext_jax.training.workdir import workdir_path

HEADER = f'{"data":34}{"images":>9}{"loss":>9}{"top1":>8}{"top5":>8}{"ece":>8}'


def main(arguments: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string('workdir', None, 'Folder of the run.', flag_values=values)
    flags.DEFINE_string('params', 'raw', "Which weights: 'raw', or 'ema' for the moving average.", flag_values=values)
    flags.DEFINE_integer('step', None, 'Step of the checkpoint; the newest by default.', flag_values=values)
    flags.DEFINE_string('weights', None, 'Of another library, or the workdir of a run.', flag_values=values)
    flags.DEFINE_list('splits', [], 'NAME@SPLIT of other data sets in data.dir, by commas.', flag_values=values)
    flags.DEFINE_integer('resolution', None, 'Side of the images in pixels.', lower_bound=1, flag_values=values)
    flags.DEFINE_float('crop_pct', None, 'Share of the shorter side in the crop.', flag_values=values)
    flags.DEFINE_bool('flip', False, 'Average the logits with those of the mirrored image.', flag_values=values)
    flags.DEFINE_string('per_class', None, 'CSV file for the accuracy of each class.', flag_values=values)
    define_config(values, arguments)
    define_processes(values)
    parse(values, arguments, usage=__doc__)
    with all_processes(values):
        _evaluate(values)


def _evaluate(values: flags.FlagValues) -> None:
    protocol = Protocol(
        splits=tuple(map(_name_and_split, values.splits)),
        resolution=values.resolution,
        crop_pct=values.crop_pct,
        flip=values.flip,
        per_class=Path(values.per_class) if values.per_class else None,
    )
    if are_several():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX's runtime has taken it, for runs that save
    if values.weights is None and values.config is None:
        results = evaluate_run(workdir_path(required(values, 'workdir')), values.params, values.step, protocol)
    elif values.weights is not None and values.workdir is None and values.step is None:
        results = evaluate_weights(required_config(values), values.weights, values.params, protocol)
    else:
        raise UserError('--weights goes with --config, --workdir with --step: give one or the other')
    several = len(protocol.splits) > 1
    if several:
        show(HEADER)
    rows = []
    for result in results:
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


def _row(result: dict) -> str:
    numbers = f'{result["loss"]:9.4f}{result["top1"]:8.2f}{result["top5"]:8.2f}{result["ece"]:8.2f}'
    return f'{result["data"] + "@" + result["split"]:34}{result["images"]:9,}{numbers}'


if __name__ == '__main__':
    run(main)
