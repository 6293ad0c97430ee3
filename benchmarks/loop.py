"""Images per second inside the training loop against the bare jitted step on batches that are already on the device.

    python -m benchmarks.loop [--rounds=5] [--steps=40]

The two take turns, so that a ratio is of neighbours in time and a busy machine slows both. The loop's figure is its own
from metrics.jsonl, of the second logging interval: decoding, transfer, dispatch and records, without evaluations and
saves. Both run the demo's config, and both are compiled anew each round and warm up for one interval.
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

from configs.fashion_mnist import get_config
from convnext_jax.training.logging import read_records
from convnext_jax.training.loop import Run, train
from convnext_jax.training.setup import abstract_model, make_plan, open_sources, settle_classes
from convnext_jax.training.sharding import make_mesh


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument('--rounds', type=int, default=5)
    arguments.add_argument('--steps', type=int, default=40)
    options = arguments.parse_args()

    config = get_config()
    config.steps = 2 * options.steps
    config.log_every_steps = options.steps
    config.optimizer.warmup_steps = 1
    config.eval_every_epochs = 1000.0
    config.checkpoint_every_steps = 1000
    train_source, eval_source = open_sources(config)
    settle_classes(config, train_source)
    plan = make_plan(config, train_source)
    run = Run(config, plan, make_mesh(-1), abstract_model(config), train_source, eval_source, checkpoints=None)
    resident = list(itertools.islice(run.train_batches(0), 8))

    ratios = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):
            train(config, Path(workdir))
            training = [record for record in read_records(Path(workdir)) if record['split'] == 'train']
        inside = training[1]['images_per_second']

        state = jax.jit(run.fresh_state, out_shardings=run.state_sharding)()
        step = run.train_step.lower(state, resident[0]).compile()
        for _ in range(2):
            began = time.perf_counter()
            for batch in itertools.islice(itertools.cycle(resident), options.steps):
                state, _ = step(state, batch)
            jax.block_until_ready(state)
        bare = options.steps * config.batch_size / (time.perf_counter() - began)
        ratios.append(inside / bare)
        print(f'loop {inside:7.1f}  bare {bare:7.1f} images/s  ratio {ratios[-1]:.3f}', flush=True)
    print(f'median ratio {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}')


if __name__ == '__main__':
    main()
