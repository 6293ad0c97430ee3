"""Compares speed and memory with timm, transformers, torch.compile, plain Flax and Keras.

    python -m benchmarks.compare --models=convnext_tiny,convnextv2_atto --mode=train,eval,latency [--output=DIR]

Each implementation runs in its own process. Every round measures all of them, so that a busy machine slows all of them.
Run it on an otherwise idle machine. The exit status is 1 if convnext_jax could not be measured.

    python -m benchmarks.compare --models=convnext_tiny,timm:resnet50,timm:vit_base_patch16_224 --peers=timm,compile

timm:NAME is a model of timm, for a table of architectures. Only the baselines timm, compile and compile_max run it.
"""

import sys

from absl import flags

from benchmarks.compare.measure import MODES, choose_baselines, choose_implementations, compare, make_cases
from benchmarks.compare.process import BASELINES, DEFAULT_BASELINES, OURS
from benchmarks.compare.report import as_table, describe_machine, make_folder, write_report
from convnext_jax.command_line import parse, run
from convnext_jax.output import say, show
from convnext_jax.paths import local_path


def main(arguments: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_list('models', ['convnext_tiny'], 'Models to measure; timm:NAME is a timm model.', flag_values=values)
    flags.DEFINE_list('mode', ['train'], f'One or more of {", ".join(MODES)}.', flag_values=values)
    flags.DEFINE_list('peers', DEFAULT_BASELINES, f'To compare with: {", ".join(BASELINES)}.', flag_values=values)
    flags.DEFINE_integer('batch', 8, 'Images per step; the mode latency uses 1.', lower_bound=1, flag_values=values)
    flags.DEFINE_integer('size', 224, 'Height and width of the images in pixels.', flag_values=values)
    flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Type of matrix products.', flag_values=values)
    flags.DEFINE_integer('rounds', 7, 'Measurements of each implementation.', lower_bound=1, flag_values=values)
    flags.DEFINE_string('output', None, 'Folder for benchmark.json and benchmark.png.', flag_values=values)
    parse(values, arguments, usage=__doc__)
    cases = make_cases(values.models, values.mode, values.batch, values.size, values.dtype)
    baselines, missing = choose_baselines(values.peers)
    runs = [(case, choose_implementations(case, baselines)) for case in cases]
    output = local_path(values.output) if values.output else None
    if output:
        make_folder(output)
    machine, results = describe_machine(), []
    left_out = [{'implementation': name, 'reason': reason} for name, reason in missing.items()]
    for case, names in runs:
        measured, failed = compare(case, names, values.rounds, say=lambda line: say(line, error=True))
        results += measured
        left_out += [{'case': str(case), 'implementation': name, 'reason': reason} for name, reason in failed.items()]
    show(as_table(machine, results))
    for entry in left_out:
        show(f'left out: {", ".join(entry.values())}')
    if output:
        write_report(output, machine, results, left_out)
    if any(entry['implementation'] == OURS for entry in left_out):
        sys.exit(1)


if __name__ == '__main__':
    run(main)
