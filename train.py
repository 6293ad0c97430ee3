"""Trains a ConvNeXt, and resumes: python train.py --config=configs/fashion_mnist.py --workdir=runs/demo"""

from pathlib import Path

from absl import flags

from convnext_jax import launch
from convnext_jax.command_line import define_config, parse, required, required_config, run


def main(arguments: list[str]) -> None:
    # Not above: the processes that decode images import this file too.
    from convnext_jax.training.loop import train
    from convnext_jax.training.trace import Window

    values = flags.FlagValues()
    define_config(values, arguments)
    flags.DEFINE_string('workdir', None, 'Folder of the run: config, checkpoints, logs.', flag_values=values)
    flags.DEFINE_string(
        'profile',
        None,
        'START:STEPS traces so many steps, after the first START of this start, for TensorBoard and XProf.',
        flag_values=values,
    )
    parse(values, arguments, usage=__doc__)
    profile = Window.parse(values.profile) if values.profile else None
    train(required_config(values), Path(required(values, 'workdir')), profile)


if __name__ == '__main__':
    launch.restart_with_settings()
    run(main)
