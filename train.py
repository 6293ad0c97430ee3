"""Trains a ConvNeXt, and resumes: python train.py --config=configs/fashion_mnist.py --workdir=runs/demo"""

from absl import flags

from convnext_jax.checkpoints.workdir import workdir_path
from convnext_jax.command_line import (
    all_processes,
    define_config,
    define_processes,
    parse,
    required,
    required_config,
    run,
)
from convnext_jax.monitoring.trace import Window
from convnext_jax.training.loop import train


def main(arguments: list[str]) -> None:
    values = flags.FlagValues()
    define_config(values, arguments)
    define_processes(values)
    flags.DEFINE_string('workdir', None, 'Folder of the run: config, checkpoints, logs.', flag_values=values)
    flags.DEFINE_string(
        'profile',
        None,
        'START:STEPS traces so many steps, after the first START of this start, for TensorBoard and XProf.',
        flag_values=values,
    )
    parse(values, arguments, usage=__doc__)
    config, workdir = required_config(values), workdir_path(required(values, 'workdir'))
    profile = Window.parse(values.profile) if values.profile else None
    with all_processes(values):
        train(config, workdir, profile)


if __name__ == '__main__':
    run(main)
