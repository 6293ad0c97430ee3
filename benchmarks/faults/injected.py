"""Starts a program with faults that come from within: python -m benchmarks.faults.injected FAULT PROGRAM ARGUMENTS …

`nan=5,6` makes the augmented images of these steps NaN, and so the loss and all its gradients. `clock=SEED` moves the
time of day, as Python reads it, every five seconds to another time within a day of the right one, also backwards.
"""

import random
import runpy
import sys
import time


def nan(steps: list[int]) -> None:
    """Makes the images of these steps NaN."""
    import jax
    import jax.numpy as jnp

    from convnext_jax.training import step as module

    augment = module.augment

    def broken(images, keys, **settings):
        # The step's number is not here, but the first image's key says which it is.
        seed = 0
        marked = [jax.random.key_data(module._keys(seed, at, len(images))[0][0]) for at in steps]
        here = (jnp.stack(marked) == jax.random.key_data(keys[0])).all(-1).any()
        return augment(images, keys, **settings) * jnp.where(here, jnp.nan, 1)

    module.augment = broken


def clock(seed: int) -> None:
    """Lets the time of day jump."""
    right, right_ns = time.time, time.time_ns

    def offset() -> int:
        return random.Random(f'{seed} {int(time.monotonic() // 5)}').randint(-86_400, 86_400)

    time.time = lambda: right() + offset()
    time.time_ns = lambda: right_ns() + offset() * 10**9


def main() -> None:
    name, _, value = sys.argv[1].partition('=')
    if name == 'nan':
        nan([int(step) for step in value.split(',')])
    else:
        clock(int(value))
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
