"""The training step: a pure function of the state and a batch that returns the next state and metrics."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx
from ml_collections import ConfigDict

from convnext_jax.checkpoints.state import TrainState, step_key
from convnext_jax.errors import UserError
from convnext_jax.models import Parameters, Statistics, get_statistics, parameter_roles, with_parameters
from convnext_jax.models.layers import fusion_barrier_on_cpu
from convnext_jax.tasks import Batch, Task
from convnext_jax.training.optimizer import moving_average, select
from convnext_jax.training.sharding import Sums, map_over_mesh, sum_over_mesh

MAX_SKIPS_IN_A_ROW = 10
"""After this many consecutive skipped steps, all further steps are skipped, until the training loop stops the run."""


def make_train_step(
    task: Task,
    model: nnx.Module,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    config: ConfigDict,
    steps_per_epoch: int,
    mesh: jax.sharding.Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the training step.

    If the loss, the gradient or a statistic is not finite, the step is skipped: parameters, statistics, moments and
    moving average keep their values.

    Args:
        task: augments the batch and computes the loss.
        model: the architecture. Its arrays are not used.
        optimizer: from `adamw`.
        schedule: number of finished steps → learning rate.
        config: the config of the experiment.
        steps_per_epoch: number of optimizer steps in an epoch.
        mesh: the device mesh.

    Returns:
        A function of the state and a global batch. It returns the next state and these scalar metrics: `loss`, the
        task's terms, `learning_rate`, `grad_norm`, `param_norm`, `skipped` and `skips_in_a_row`.

    Raises:
        UserError: `accumulation_steps` is above 1, and the model has batch statistics.
    """
    if config.accumulation_steps > 1 and get_statistics(model):
        raise UserError(
            f'accumulation_steps={config.accumulation_steps}, but the model normalises over the batch, so it cannot be '
            'split: set accumulation_steps=1, and lower batch_size or use more devices'
        )

    def loss(parameters: Parameters, statistics: Statistics, batch: Batch, keys: jax.Array) -> tuple[jax.Array, tuple]:
        network = with_parameters(model, parameters | statistics)
        total, weight, terms = task.loss(network, batch, keys)
        return total, (weight, terms, get_statistics(network))

    @functools.partial(sum_over_mesh, mesh=mesh, roles=parameter_roles(model))
    def loss_and_gradient(
        parameters: Parameters, statistics: Statistics, batch: Batch, keys: jax.Array
    ) -> tuple[Sums, Parameters, Statistics]:
        def value_and_grad(parameters: Parameters, batch: Batch, keys: jax.Array) -> tuple:
            return jax.value_and_grad(loss, has_aux=True)(parameters, statistics, batch, keys)

        sums, gradient = _accumulate(value_and_grad, parameters, (batch, keys), config.accumulation_steps)
        total, (weight, terms, new_statistics) = sums  # statistics are {} if there are several accumulation steps
        return (total, weight, terms), gradient, new_statistics

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        examples = len(jax.tree.leaves(batch)[0])
        augment_keys, model_keys, batch_key = _keys(config.seed, state.step, examples)
        batch = map_over_mesh(task.augment, mesh)(batch, augment_keys)
        batch = task.mix(batch, batch_key, state.step / steps_per_epoch)
        sums, gradient, statistics = loss_and_gradient(state.parameters, state.statistics, batch, model_keys)
        total, weight, terms = sums
        divisor = jnp.where(weight > 0, weight, 1.0)
        value, terms, gradient = jax.tree.map(lambda x: x / divisor, (total, terms, gradient))
        grad_norm = optax.tree.norm(gradient)
        good = jnp.isfinite(value) & jnp.isfinite(grad_norm) & (state.step - state.last_good < MAX_SKIPS_IN_A_ROW)
        for statistic in statistics.values():
            good &= jnp.isfinite(statistic).all()  # a variance can overflow even if the loss is finite

        learning_rate = schedule(state.step)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters, good=good)
        parameters = jax.tree.map(lambda p, u: p - learning_rate * u, state.parameters, updates)
        parameters = fusion_barrier_on_cpu(select(good, parameters, state.parameters))
        statistics = select(good, statistics, state.statistics)
        weights = parameters | statistics
        ema = None if state.ema is None else moving_average(state.ema, weights, config.ema.decay)

        step = state.step + 1
        new = TrainState(
            step=step,
            parameters=parameters,
            statistics=statistics,
            optimizer=optimizer_state,
            ema=select(good, ema, state.ema),
            skipped=state.skipped + ~good,
            last_good=jnp.where(good, step, state.last_good),
        )
        metrics = {
            'loss': value,
            **terms,
            'learning_rate': learning_rate,
            'grad_norm': grad_norm,
            'param_norm': optax.tree.norm(parameters),
            'skipped': new.skipped,
            'skips_in_a_row': step - new.last_good,
        }
        return new, metrics  # ty: ignore[invalid-explicit-return]  # optax annotates rates and norms as array-likes

    return train_step


def _keys(seed: int, step: jax.Array, examples: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The random keys of a step: (N,) keys for augmentation, (N,) keys for the network, and one key for the batch."""
    augment_key, model_key, batch_key = jax.random.split(step_key(seed, step), 3)
    return jax.random.split(augment_key, examples), jax.random.split(model_key, examples), batch_key


def _accumulate(
    value_and_grad: Callable, parameters: Parameters, examples: tuple[Batch, jax.Array], steps: int
) -> tuple[Sums, Parameters]:
    """The sums and the gradient of all examples, accumulated over `steps` equal parts of the batch in a scan."""
    if steps == 1:
        return value_and_grad(parameters, *examples)
    parts = jax.tree.map(lambda x: rearrange(x, '(steps n) ... -> steps n ...', steps=steps), examples)

    def add(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(parameters, *part)), None

    shapes = jax.eval_shape(value_and_grad, parameters, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]
