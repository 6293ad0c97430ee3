"""Evaluates a run: python eval.py --workdir=runs/demo [--params=ema|raw] [--step=N]

The last line of output is one JSON object; accuracies are in percent.
"""

import json
from pathlib import Path

from absl import flags

from convnext_jax.command_line import parse, required, run
from convnext_jax.training.evaluate import evaluate_run


def main(arguments: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string('workdir', None, 'Folder of the run.', flag_values=values)
    flags.DEFINE_string(
        'params', None, "Which weights: 'ema' (if the run has them, the default) or 'raw'.", flag_values=values
    )
    flags.DEFINE_integer('step', None, 'Step of the checkpoint; the newest by default.', flag_values=values)
    parse(values, arguments, usage=__doc__)
    print(json.dumps(evaluate_run(Path(required(values, 'workdir')), values.params, values.step)))


if __name__ == '__main__':
    run(main)
