"""Speed of the training loop relative to the jitted step alone, on batches that are already on the device.

    python -m benchmarks.loop [--rounds=12] [--steps=39]

The training loop runs the config of the demo, with decoding, transfer, dispatch and records. After every `steps` steps,
instead of an evaluation, the jitted step alone runs equally often. Each ratio compares two consecutive measurements, so
a busy machine slows both. The first two rounds (an epoch by default) are a warm-up, after which the decoded images are
cached in memory. A second part repeats everything without the cache, as for large images.
"""

import argparse
import contextlib
import io
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import jax

from convnext_jax.checkpoints.manager import Checkpoints
from convnext_jax.configs.fashion_mnist import get_config
from convnext_jax.data import pipeline
from convnext_jax.monitoring.records import read_records
from convnext_jax.tasks import make_task
from convnext_jax.training.durations import make_durations
from convnext_jax.training.loop import Run
from convnext_jax.training.sharding import make_mesh

WARM_UP = 2


class Alternating(Run):
    """A run that measures the jitted step alone instead of evaluating."""

    def prepare(self, steps: int) -> None:
        """Puts batches on the device and compiles the step."""
        self.bare_images_per_second: list[float] = []
        self._steps = steps
        self._resident = list(itertools.islice(self.train_batches(0), 8))
        self._state = jax.jit(self.newly_initialised_state, out_shardings=self.state_sharding)()
        self._step = self.train_step.lower(self._state, self._resident[0]).compile()

    def _evaluate(self, *_) -> None:
        began = time.perf_counter()
        for batch in itertools.islice(itertools.cycle(self._resident), self._steps):
            self._state, _ = self._step(self._state, batch)
        jax.block_until_ready(self._state)
        self.bare_images_per_second.append(self._steps * self.config.batch_size / (time.perf_counter() - began))


def ratios(rounds: int, steps: int) -> list[float]:
    """The speed of the loop divided by the speed of the jitted step alone, for each round."""
    config = get_config()
    config.steps = (rounds + WARM_UP) * steps
    config.log_every_steps = steps
    config.optimizer.warmup_steps = 1
    config.checkpoint_every_steps = 10**6
    train_set, eval_set = make_task(config).open()
    config.eval_every_epochs = steps / (len(train_set) // config.batch_size)
    durations = make_durations(config, len(train_set))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        workdir = Path(folder)
        with Checkpoints(workdir / 'checkpoints', keep=1, best_metric='top1') as checkpoints:
            run = Alternating(config, durations, make_mesh(), train_set, eval_set, checkpoints)
            run.prepare(steps)
            run.run_steps(run.first_state(), workdir)
        inside = [record['images_per_second'] for record in read_records(workdir)]
    return [a / b for a, b in zip(inside, run.bare_images_per_second, strict=True)][WARM_UP:]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument('--rounds', type=int, default=12)
    arguments.add_argument('--steps', type=int, default=39)
    options = arguments.parse_args()
    for images in ('cached', 'decoded'):
        if images == 'decoded':
            pipeline.CACHE_BYTES = 0
        values = ratios(options.rounds, options.steps)
        median, spread = statistics.median(values), f'from {min(values):.3f} to {max(values):.3f}'
        print(f'images {images}: median ratio {median:.3f}, {spread}', flush=True)


if __name__ == '__main__':
    main()
