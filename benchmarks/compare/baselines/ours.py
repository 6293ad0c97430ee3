"""convnext_jax: the training step of `Program`, and the jitted model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.compare.baselines.on_jax import jax_device
from benchmarks.compare.baselines.workload import LEARNING_RATE, WEIGHT_DECAY, Baseline, Workload, example_batch
from convnext_jax.checkpoints.state import init_key
from convnext_jax.config import default_config
from convnext_jax.models import get_parameters
from convnext_jax.tasks import abstract_model, make_task
from convnext_jax.training.durations import make_durations
from convnext_jax.training.program import Program
from convnext_jax.training.sharding import make_mesh


def build(workload: Workload) -> Baseline:
    """Sets up the workload."""
    config = _config(workload)
    make_step = _training_step if workload.training else _forward_pass
    parameters = sum(array.size for array in get_parameters(abstract_model(config)).values())
    return Baseline(make_step(workload, config), parameters, jax_device())


def _config(workload: Workload) -> ConfigDict:
    config = default_config()
    config.model.update(name=workload.model, num_classes=workload.classes, dtype=workload.dtype)
    config.data.image_size = workload.size
    config.augment.update(flip=False, policy='', erasing=0.0)
    config.label_smoothing = 0.0
    config.batch_size = workload.batch
    config.optimizer.learning_rate = LEARNING_RATE
    config.optimizer.weight_decay = WEIGHT_DECAY
    config.ema.decay = 0.0
    return config


def _training_step(workload: Workload, config: ConfigDict) -> Callable[[], object]:
    mesh = make_mesh(devices=jax.devices()[:1])
    program = Program(config, make_durations(config, images=workload.batch), mesh)
    images, labels = example_batch(workload)
    arrays = {'image': np.clip(128 + 50 * images, 0, 255), 'label': labels}
    batch = {name: jnp.asarray(arrays[name], x.dtype) for name, x in program.abstract_batch.items()}
    state = jax.block_until_ready(jax.jit(program.newly_initialised_state, out_shardings=program.state_sharding)())
    train_step = None

    def step() -> object:
        nonlocal state, train_step
        train_step = train_step or program.compile(state, batch)
        state, _ = train_step(state, batch)
        return state

    return step


def _forward_pass(workload: Workload, config: ConfigDict) -> Callable[[], object]:
    model = jax.block_until_ready(jax.jit(lambda: make_task(config).build(init_key(config.seed)))())
    forward = jax.jit(lambda model, images: model(images))
    images = jnp.asarray(example_batch(workload)[0])

    return lambda: forward(model, images)
