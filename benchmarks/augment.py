"""The cost of augmentation and mixing as a fraction of a training step: ConvNeXt-T, 224 pixels, bfloat16.

    python -m benchmarks.augment [--batch_size=16]

For each policy, the command prints the GFLOPs and GB per image of augmentation with mixing, the GFLOPs and GB of the
rest of the training step, and the fraction of augmentation in the sum. XLA counts the figures (`cost_analysis`);
nothing is run. FLOPs are counted in the lowered program, because the CPU compiler turns depthwise convolutions into
dense ones. Bytes are counted in the compiled program, after fusion by the CPU compiler. XLA counts the body of a loop
once, so the loops of the model are unrolled, and the cost of a RandAugment layer is multiplied by the number of layers.
If code differs between platforms, the code for accelerators is counted.
"""

import argparse
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from convnext_jax.checkpoints.state import initial_state
from convnext_jax.configs.imagenet1k import get_config
from convnext_jax.data.augment import augment
from convnext_jax.data.mixing import mix
from convnext_jax.data.pipeline import abstract_batch
from convnext_jax.data.randaugment import parse_randaugment
from convnext_jax.models import get_parameters, parameter_roles
from convnext_jax.tasks import abstract_model, make_task
from convnext_jax.training.optimizer import adamw, cosine_schedule
from convnext_jax.training.sharding import batch_sharding, make_mesh
from convnext_jax.training.step import make_train_step

POLICIES = {'rand-m9-mstd0.5-inc1': 0.0, '3a': 0.3}  # policy → colour jitter
KINDS = {'flops': 'GFLOPs', 'bytes': 'GB'}


def recipe(batch_size: int) -> ConfigDict:
    """The ImageNet-1k recipe of ConvNeXt-T in bfloat16."""
    config = get_config('tiny')
    config.batch_size = batch_size
    config.model.num_classes = 1000
    config.model.dtype = 'bfloat16'
    return config


def bare_step(config: ConfigDict) -> dict[str, float]:
    """The cost of a training step that only normalises its images."""
    config = config.copy_and_resolve_references()
    config.augment.update(flip=False, policy='', erasing=0.0)
    config.mix.update(mixup=0.0, cutmix=0.0)
    model = abstract_model(config)
    parameters = get_parameters(model)
    optimizer = adamw(
        dict.fromkeys(parameters, 1.0),
        parameter_roles(model),
        weight_decay=0.05,
    )
    state = jax.eval_shape(lambda parameters: initial_state(parameters, optimizer, ema=True), parameters)
    schedule, mesh, task = cosine_schedule(4e-3, 1e-6, 0, 100), make_mesh(devices=jax.devices()[:1]), make_task(config)
    batch = abstract_batch(task.features, config.batch_size, batch_sharding(mesh))
    step = make_train_step(task, model, optimizer, schedule, config, 1, mesh)
    with mock.patch('jax.lax.scan', functools.partial(jax.lax.scan, unroll=True)):
        return _cost(step, state, batch)


def augmentation(config: ConfigDict) -> dict[str, float]:
    """The cost of augmentation and mixing, with all layers of RandAugment."""
    one_layer = _augmentation_with_loops_once(config)
    if not config.augment.policy.startswith('rand'):
        return one_layer
    without = config.copy_and_resolve_references()
    without.augment.policy = ''
    rest = _augmentation_with_loops_once(without)
    layers = parse_randaugment(config.augment.policy).layers
    return {kind: rest[kind] + layers * (one_layer[kind] - rest[kind]) for kind in KINDS}


def _augmentation_with_loops_once(config: ConfigDict) -> dict[str, float]:
    def run(images: jax.Array, labels: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key, len(images))
        images = augment(images, keys, mean=config.data.mean, std=config.data.std, **config.augment)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, config.model.num_classes), config.label_smoothing)
        chosen = {name: config.mix[name] for name in ('mixup', 'cutmix', 'mode')}
        return mix(images, targets, key, **chosen)

    labels = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)
    return _cost(run, _images(config), labels, jax.eval_shape(lambda: jax.random.key(0)))


def _images(config: ConfigDict) -> jax.ShapeDtypeStruct:
    size = config.data.image_size
    return jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.uint8)


def _cost(function, *arguments) -> dict[str, float]:
    accelerators = lambda *arrays, cpu, default: default(*arrays)  # noqa: E731 - replaces a function
    with mock.patch('jax.lax.platform_dependent', accelerators):
        lowered = jax.jit(function).lower(*arguments)
    return {'flops': lowered.cost_analysis()['flops'], 'bytes': lowered.compile().cost_analysis()['bytes accessed']}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument('--batch_size', type=int, default=16)
    config = recipe(arguments.parse_args().batch_size)
    step = bare_step(config)
    for policy, jitter in POLICIES.items():
        config.augment.update(policy=policy, color_jitter=jitter)
        cost = augmentation(config)
        for kind, unit in KINDS.items():
            ours, rest = (total[kind] / config.batch_size / 1e9 for total in (cost, step))
            print(f'{policy:22} {ours:.3f} {unit}, rest of the step {rest:.3f}: {ours / (ours + rest):.2%}', flush=True)


if __name__ == '__main__':
    main()
