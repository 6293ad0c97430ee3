"""This package: the training step of its runs, and the jitted model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from contender import LEARNING_RATE, WEIGHT_DECAY, Contender, Task, example_batch
from ml_collections import ConfigDict
from on_jax import device_kind, make_matmul

from convnext_jax.config import default_config
from convnext_jax.models import get_parameters
from convnext_jax.training.optimizer import adamw
from convnext_jax.training.setup import abstract_model, build_model
from convnext_jax.training.state import init_key, initial_state
from convnext_jax.training.step import make_train_step


def build(task: Task) -> Contender:
    """Sets it up."""
    config = _config(task)
    make_step = _training_step if task.training else _forward_pass
    parameters = sum(array.size for array in get_parameters(abstract_model(config)).values())
    return Contender(make_step(task, config), make_matmul(task.dtype), parameters, device_kind())


def _config(task: Task) -> ConfigDict:
    config = default_config()
    config.model.update(name=task.model, num_classes=task.classes, dtype=task.dtype)
    config.data.image_size = task.size
    config.augment.update(flip=False, policy='', erasing=0.0)
    config.label_smoothing = 0.0
    config.ema.decay = 0.0
    return config


def _training_step(task: Task, config: ConfigDict) -> Callable[[], None]:
    model = abstract_model(config)
    optimizer = adamw(
        dict.fromkeys(get_parameters(model), 1.0),
        beta1=config.optimizer.beta1,
        beta2=config.optimizer.beta2,
        epsilon=config.optimizer.epsilon,
        weight_decay=WEIGHT_DECAY,
        clip_norm=config.optimizer.clip_norm,
    )
    schedule = optax.constant_schedule(LEARNING_RATE)
    train_step = jax.jit(make_train_step(model, optimizer, schedule, config, mixing_steps=0), donate_argnums=0)
    images, labels = example_batch(task)
    batch = {
        'image': jnp.asarray(np.clip(128 + 50 * images, 0, 255), jnp.uint8),
        'label': jnp.asarray(labels, jnp.int32),
    }

    @jax.jit
    def fresh_state():
        parameters = get_parameters(build_model(config, init_key(config.seed)))
        return initial_state(parameters, optimizer, ema=False)

    state = jax.block_until_ready(fresh_state())

    def step() -> None:
        nonlocal state
        state, _ = train_step(state, batch)
        jax.block_until_ready(state)

    return step


def _forward_pass(task: Task, config: ConfigDict) -> Callable[[], None]:
    model = jax.block_until_ready(jax.jit(lambda: build_model(config, init_key(config.seed)))())
    forward = jax.jit(lambda model, images: model(images))
    images = jnp.asarray(example_batch(task)[0])

    def step() -> None:
        jax.block_until_ready(forward(model, images))

    return step
