"""The training step: a pure function from state and batch to the next state and the step's metrics."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from convnext_jax.data.augment import augment
from convnext_jax.data.mixing import mix
from convnext_jax.data.pipeline import Batch
from convnext_jax.models import ConvNeXt, Parameters, with_parameters
from convnext_jax.models.layers import apart_on_cpu
from convnext_jax.training.optimizer import moving_average, select
from convnext_jax.training.sharding import over_mesh
from convnext_jax.training.state import TrainState, step_key

SKIPS_IN_A_ROW = 10
"""After so many steps without a finite loss the state stands still, for the loop to stop the run."""


def make_train_step(
    model: ConvNeXt,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: ConfigDict,
    mixing_steps: int,
    mesh: jax.sharding.Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the step.

    Its metrics are scalars: `loss`, `learning_rate`, `grad_norm`, `param_norm`, `skipped` and `skips_in_a_row`.

    Args:
        model: the architecture; its own parameters are not used.
        optimizer: as `adamw` gives it.
        schedule: steps done → learning rate.
        config: of the experiment.
        mixing_steps: steps in which images are mixed; those after them see every image by itself.
        mesh: of the devices.
    """
    classes = model.head.bias.shape[0]

    def loss(parameters: Parameters, images: jax.Array, targets: jax.Array, keys: jax.Array) -> jax.Array:
        logits = with_parameters(model, parameters)(images, key=keys)
        return optax.softmax_cross_entropy(logits, targets).mean()

    @functools.partial(over_mesh, mesh=mesh)
    def value_and_grad(parameters: Parameters, *examples: jax.Array) -> tuple[jax.Array, Parameters]:
        return _accumulate(jax.value_and_grad(loss), parameters, examples, config.accumulation_steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        augment_keys, drop_path_keys, mix_key = _keys(config.seed, state.step, len(batch['label']))
        images = augment(batch['image'], augment_keys, mean=config.data.mean, std=config.data.std, **config.augment)
        targets = optax.smooth_labels(jax.nn.one_hot(batch['label'], classes), config.label_smoothing)
        if config.mix.mixup or config.mix.cutmix:
            images, targets = mix(
                images,
                targets,
                mix_key,
                mixup=config.mix.mixup,
                cutmix=config.mix.cutmix,
                mode=config.mix.mode,
                on=state.step < mixing_steps,
            )
        value, gradient = value_and_grad(state.parameters, images, targets, drop_path_keys)
        grad_norm = optax.tree.norm(gradient)
        good = jnp.isfinite(value) & jnp.isfinite(grad_norm) & (state.step - state.last_good < SKIPS_IN_A_ROW)

        learning_rate = schedule(state.step)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters, good=good)
        parameters = jax.tree.map(lambda p, u: p - learning_rate * u, state.parameters, updates)
        parameters = apart_on_cpu(select(good, parameters, state.parameters))
        ema = None if state.ema is None else moving_average(state.ema, parameters, config.ema.decay)

        step = state.step + 1
        new = TrainState(
            step=step,
            parameters=parameters,
            optimizer=optimizer_state,
            ema=select(good, ema, state.ema),
            skipped=state.skipped + ~good,
            last_good=jnp.where(good, step, state.last_good),
        )
        metrics = {
            'loss': value,
            'learning_rate': learning_rate,
            'grad_norm': grad_norm,
            'param_norm': optax.tree.norm(parameters),
            'skipped': new.skipped,
            'skips_in_a_row': step - new.last_good,
        }
        return new, metrics

    return train_step


def _keys(seed: int, step: jax.Array, images: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A key for each image for augmentation, one for drop path, and one for mixing: from seed and step alone."""
    augment_key, drop_path_key, mix_key = jax.random.split(step_key(seed, step), 3)
    return jax.random.split(augment_key, images), jax.random.split(drop_path_key, images), mix_key


def _accumulate(
    value_and_grad: Callable, parameters: Parameters, examples: tuple[jax.Array, ...], steps: int
) -> tuple[jax.Array, Parameters]:
    """Loss and gradient of all examples, computed on one of `steps` equal parts after the other."""
    if steps == 1:
        return value_and_grad(parameters, *examples)
    parts = jax.tree.map(lambda x: x.reshape(steps, -1, *x.shape[1:]), examples)

    def add(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(parameters, *part)), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters))
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / steps, total)
