"""Speed of the training step with a recipe's augmentation and mixing, relative to a step that only normalises.

    python -m benchmarks.augment [--model=convnext_tiny] [--batch_size=16] [--rounds=5] [--steps=2]

For each policy, both steps of the ImageNet-1k recipe (224 pixels, bfloat16) run alternately on one device, on a batch
that is already in its memory. Each ratio compares two consecutive measurements, so that a busy machine slows both.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from convnext_jax.configs.imagenet1k import get_config
from convnext_jax.training.durations import make_durations
from convnext_jax.training.program import Program
from convnext_jax.training.sharding import make_mesh

POLICIES = {'rand-m9-mstd0.5-inc1': 0.0, '3a': 0.3}  # policy → colour jitter


def recipe(model: str, batch_size: int) -> ConfigDict:
    """The ImageNet-1k recipe of the model."""
    config = get_config(model)
    config.batch_size = batch_size
    config.model.num_classes = 1000
    return config


def without_augmentation(config: ConfigDict) -> ConfigDict:
    """The config without augmentation and mixing."""
    config = config.copy_and_resolve_references()
    config.augment.update(flip=False, policy='', color_jitter=0.0, erasing=0.0)
    config.mix.update(mixup=0.0, cutmix=0.0)
    return config


def make_step(config: ConfigDict) -> Callable[[], object]:
    """A function that starts the compiled training step once and returns the new state without waiting for it."""
    program = Program(config, make_durations(config, images=config.batch_size), make_mesh(devices=jax.devices()[:1]))
    rng = np.random.default_rng(0)
    highest = {'image': 256, 'label': config.model.num_classes}
    batch = {
        name: jnp.asarray(rng.integers(0, highest[name], x.shape), x.dtype)
        for name, x in program.abstract_batch.items()
    }
    state = jax.jit(program.fresh_state, out_shardings=program.state_sharding)()
    train_step = program.compile(state, batch)

    def step() -> object:
        nonlocal state
        state, _ = train_step(state, batch)
        return state

    return step


def seconds(step: Callable[[], object], steps: int) -> float:
    """Duration of a step, as the mean over a number of steps."""
    began = time.perf_counter()
    for _ in range(steps):
        state = step()
    jax.block_until_ready(state)
    return (time.perf_counter() - began) / steps


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument('--model', default='convnext_tiny')
    arguments.add_argument('--batch_size', type=int, default=16)
    arguments.add_argument('--rounds', type=int, default=5)
    arguments.add_argument('--steps', type=int, default=2)
    options = arguments.parse_args()
    config = recipe(options.model, options.batch_size)
    bare = make_step(without_augmentation(config))
    for policy, jitter in POLICIES.items():
        config.augment.update(policy=policy, color_jitter=jitter)
        augmented = make_step(config)
        pairs = [[seconds(step, options.steps) for step in (bare, augmented)] for _ in range(options.rounds + 1)][1:]
        ratio = statistics.median(without / with_ for without, with_ in pairs)
        plain, full = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
        print(
            f'{jax.devices()[0].device_kind}, {options.model}, {options.batch_size} images, {policy}: '
            f'step {full:.1f} ms, without augmentation {plain:.1f} ms, relative speed {ratio:.3f}'
        )


if __name__ == '__main__':
    main()
