"""Trains a model, or resumes the run in the workdir.

python train.py --config=configs/fashion_mnist.py --workdir=runs/demo [--config.FIELD=VALUE]    # in a clone
convnext-jax train --config=fashion_mnist --workdir=runs/demo [--config.FIELD=VALUE]            # anywhere
"""

from absl import flags

from convnext_jax.checkpoints.workdir import workdir_path
from convnext_jax.command_line import (
    all_processes,
    define_config,
    define_processes,
    parse,
    required,
    required_config,
)
from convnext_jax.monitoring.trace import ProfileWindow
from convnext_jax.training.loop import train


def main(arguments: list[str]) -> None:
    values = flags.FlagValues()
    define_config(values, arguments)
    define_processes(values)
    flags.DEFINE_string('workdir', None, 'Folder for the config, checkpoints and logs of the run.', flag_values=values)
    flags.DEFINE_string(
        'profile',
        None,
        'START:STEPS profiles STEPS steps after the first START steps of this process, for TensorBoard and XProf.',
        flag_values=values,
    )
    parse(values, arguments, usage=__doc__)
    config, workdir = required_config(values), workdir_path(required(values, 'workdir'))
    profile = ProfileWindow.parse(values.profile) if values.profile else None
    with all_processes(values):
        train(config, workdir, profile)
