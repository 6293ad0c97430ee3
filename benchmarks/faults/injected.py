"""Runs a program with an injected fault: python -m benchmarks.faults.injected FAULT PROGRAM ARGUMENTS …

`nan=5,6` sets the augmented images of steps 5 and 6 to NaN, so that the loss and all gradients are NaN. `clock=SEED`
shifts Python's clock by a random offset of up to a day, forwards or backwards, which changes every five seconds.
"""

import random
import runpy
import sys
import time


def nan(steps: list[int]) -> None:
    """Sets the augmented images of these steps to NaN, in a run with seed 0."""
    import jax
    import jax.numpy as jnp

    from convnext_jax.tasks import classification
    from convnext_jax.training.step import _keys

    augment = classification.augment

    def augment_with_nan(images, keys, **settings):
        # The step is not an argument, but the key of the first image identifies it.
        first_keys = [jax.random.key_data(_keys(0, step, len(images))[0][0]) for step in steps]
        inject = (jnp.stack(first_keys) == jax.random.key_data(keys[0])).all(-1).any()
        return augment(images, keys, **settings) * jnp.where(inject, jnp.nan, 1)

    classification.augment = augment_with_nan


def clock(seed: int) -> None:
    """Makes `time.time` jump every five seconds."""
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
