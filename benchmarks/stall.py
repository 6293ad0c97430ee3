"""The cost of asynchronous saves: time of training steps with and without a save, with the config of the demo.

    python -m benchmarks.stall [--rounds=15] [--window=20]

The training loop runs with checkpoints. It saves at the beginning of every other window of steps, so that windows with
and without a save alternate, and a busy machine slows both. The time of a window includes the blocking part of `save`,
and the slowdown of the following steps by the background write. The stall is the difference between the median times of
windows with and without a save. It is also printed as a fraction of the config's interval between saves.
"""

import argparse
import contextlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from convnext_jax.checkpoints.manager import Checkpoints
from convnext_jax.configs.fashion_mnist import get_config
from convnext_jax.tasks import make_task
from convnext_jax.training.durations import make_durations
from convnext_jax.training.loop import Run
from convnext_jax.training.sharding import make_mesh

WARM_UP = 2  # pairs of windows that are not measured, because the first epoch decodes images


class Timed(Run):
    """A run that records when each step starts, and how long each call of `save` takes."""

    def compile(self, *arguments) -> Callable:
        step = super().compile(*arguments)
        self.began: list[float] = []
        self.calls: list[float] = []

        def timed(state, batch):
            self.began.append(time.perf_counter())
            return step(state, batch)

        return timed

    def _save(self, *arguments) -> None:
        began = time.perf_counter()
        super()._save(*arguments)
        self.calls.append(time.perf_counter() - began)


def measure(rounds: int, window: int) -> tuple[list[float], list[float], list[float], int]:
    """Seconds of each window with a save, of each window without, of each call of `save`, and steps between saves."""
    config = get_config()
    interval = config.checkpoint_every_steps
    config.steps = 2 * window * (rounds + WARM_UP) + 1
    config.checkpoint_every_steps = 2 * window
    config.eval_every_epochs = 10**6
    config.optimizer.warmup_steps = 1
    train_set, eval_set = make_task(config).open()
    durations = make_durations(config, len(train_set))
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        Checkpoints(Path(folder) / 'checkpoints', keep=config.keep_checkpoints, best_metric='top1') as checkpoints,
    ):
        run = Timed(config, durations, make_mesh(-1), train_set, eval_set, checkpoints)
        run.run_steps(run.first_state(), Path(folder))
        assert not checkpoints.failed, checkpoints.failed
    # The save after step 2 · window falls between the starts of that step and the next.
    ends = run.began[window - 1 :: window]
    windows = [end - begin for begin, end in itertools.pairwise(ends)]
    without, saving = windows[0::2], windows[1::2]
    return saving[WARM_UP:], without[WARM_UP:], run.calls[WARM_UP:-1], interval


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument('--rounds', type=int, default=15)
    arguments.add_argument('--window', type=int, default=20)
    options = arguments.parse_args()
    saving, without, calls, interval = measure(options.rounds, options.window)
    plain = statistics.median(without)
    stall = statistics.median(saving) - plain
    between = plain / options.window * interval
    middle = statistics.quantiles([a - b for a, b in zip(saving, without, strict=False)], n=4)
    print(f'{options.window} steps: {plain:.3f} s without a save, {plain + stall:.3f} s with one; {len(saving)} pairs')
    print(f'the call of save: {1000 * statistics.median(calls):.0f} ms (median), {1000 * max(calls):.0f} ms at most')
    print(
        f'stall {1000 * stall:.0f} ms (interquartile range: {1000 * middle[0]:.0f} to {1000 * middle[2]:.0f}), '
        f'{stall / between:.2%} of the {between:.1f} s between saves in the demo ({interval} steps)'
    )


if __name__ == '__main__':
    main()
