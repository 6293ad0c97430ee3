"""Images per second inside the training loop against the bare jitted step on batches that are already on the device.

    python -m benchmarks.loop [--rounds=5] [--steps=39]

The two take turns, so that a ratio is of neighbours in time and a busy machine slows both. The loop's figures are its
own from metrics.jsonl, decoding, transfer, dispatch and records, without evaluations and saves: one of the first
epoch, in which every image is decoded, one of the second, for which small images are kept. Both sides run the demo's
config, both are compiled anew each round and warm up for one interval of `steps`, by default half an epoch.
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
    arguments.add_argument('--steps', type=int, default=39)
    options = arguments.parse_args()

    config = get_config()
    config.steps = 4 * options.steps
    config.log_every_steps = options.steps
    config.optimizer.warmup_steps = 1
    config.eval_every_epochs = 1000.0
    config.checkpoint_every_steps = 1000
    train_source, eval_source = open_sources(config)
    settle_classes(config, train_source)
    plan = make_plan(config, train_source)
    run = Run(config, plan, make_mesh(-1), abstract_model(config), train_source, eval_source, checkpoints=None)
    resident = list(itertools.islice(run.train_batches(0), 8))

    ratios = {'first epoch': [], 'later epochs': []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):
            train(config, Path(workdir))
            training = [record for record in read_records(Path(workdir)) if record['split'] == 'train']
        speed = [record['images_per_second'] for record in training]
        inside = {'first epoch': speed[1], 'later epochs': statistics.mean(speed[2:])}

        state = jax.jit(run.fresh_state, out_shardings=run.state_sharding)()
        step = run.train_step.lower(state, resident[0]).compile()
        for _ in range(2):
            began = time.perf_counter()
            for batch in itertools.islice(itertools.cycle(resident), options.steps):
                state, _ = step(state, batch)
            jax.block_until_ready(state)
        bare = options.steps * config.batch_size / (time.perf_counter() - began)
        for epoch, images_per_second in inside.items():
            ratios[epoch].append(images_per_second / bare)
        print(f'bare {bare:.1f} images/s', *(f'{epoch} {speed:.1f}' for epoch, speed in inside.items()), flush=True)
    for epoch, rounds in ratios.items():
        print(f'{epoch}: median ratio {statistics.median(rounds):.3f}, from {min(rounds):.3f} to {max(rounds):.3f}')


if __name__ == '__main__':
    main()
