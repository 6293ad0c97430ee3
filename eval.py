"""Evaluates a run of ours, or anybody's weights on the data of a config, with the preprocessing that comes with them.

    python eval.py --workdir=runs/demo [--params=ema|raw] [--step=N]
    python eval.py --config=configs/imagenet1k.py:tiny --weights=FOLDER_OR_FILE_OR_HUB_ID [--params=ema|raw]

The last line of output is one JSON object; accuracies are in percent.
"""

import json
from pathlib import Path

from absl import flags

from convnext_jax.command_line import define_config, parse, required, required_config, run
from convnext_jax.errors import UserError
from convnext_jax.training.evaluate import evaluate_run, evaluate_weights


def main(arguments: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string('workdir', None, 'Folder of the run.', flag_values=values)
    flags.DEFINE_string(
        'params', None, "Which weights: 'ema' (if the run has them, the default) or 'raw'.", flag_values=values
    )
    flags.DEFINE_integer('step', None, 'Step of the checkpoint; the newest by default.', flag_values=values)
    flags.DEFINE_string('weights', None, 'Of another library, or the workdir of a run.', flag_values=values)
    define_config(values, arguments)
    parse(values, arguments, usage=__doc__)
    if values.weights is None:
        metrics = evaluate_run(Path(required(values, 'workdir')), values.params, values.step)
    elif values.workdir is None and values.step is None:
        metrics = evaluate_weights(required_config(values), values.weights, values.params or 'raw')
    else:
        raise UserError('--weights goes with --config, --workdir with --step: give one or the other')
    print(json.dumps(metrics))


if __name__ == '__main__':
    run(main)
