"""Evaluates a run, or weights from elsewhere: the same as `python -m convnext_jax eval`.

python eval.py --workdir=runs/demo
"""

from convnext_jax.command_line import run
from convnext_jax.commands.eval import main

if __name__ == '__main__':
    run(main)
