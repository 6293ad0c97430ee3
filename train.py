"""Trains a model, or resumes the run in the workdir: the same as `python -m convnext_jax train`.

python train.py --config=configs/fashion_mnist.py --workdir=runs/demo [--config.FIELD=VALUE]
"""

from convnext_jax.command_line import run
from convnext_jax.commands.train import main

if __name__ == '__main__':
    run(main)
