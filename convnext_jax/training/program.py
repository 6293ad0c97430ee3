"""Program: the shapes of the training state and the jitted training step of a config, without data or device memory."""

from collections.abc import Mapping

import jax
from ml_collections import ConfigDict

from convnext_jax.checkpoints.state import TrainState, init_key, initial_state
from convnext_jax.data.pipeline import abstract_batch
from convnext_jax.models import get_parameters, get_statistics, parameter_roles
from convnext_jax.runtime.process import release_memory
from convnext_jax.tasks import abstract_model, make_task
from convnext_jax.training.durations import Durations
from convnext_jax.training.optimizer import SCHEDULES, adamw, layer_factors, peak_learning_rate
from convnext_jax.training.sharding import batch_sharding, state_sharding
from convnext_jax.training.step import make_train_step


class Program:
    """The computation of a run.

    Args:
        config: the config of the experiment.
        durations: from `make_durations`.
        mesh: from `make_mesh`.

    Attributes:
        task: the task of the config.
        model: the network, with `jax.ShapeDtypeStruct` instead of arrays.
        optimizer: from `adamw`.
        abstract_state: shape, dtype and sharding of each array of the state.
        abstract_batch: shape, dtype and sharding of each array of a training batch.
        train_step: the training step, jitted. It donates the state.
    """

    def __init__(self, config: ConfigDict, durations: Durations, mesh: jax.sharding.Mesh):
        self.config, self.durations, self.task = config, durations, make_task(config)
        self.model = model = abstract_model(config)
        roles = parameter_roles(model)
        peak = peak_learning_rate(config)
        depths = model.variant.depths  # ty: ignore[missing-attribute]  # every task's network has it, see `Task.build`
        layer_decay, rule = config.optimizer.layer_decay, config.optimizer.layer_decay_rule
        self.optimizer = adamw(
            layer_factors(list(roles), depths, rule, layer_decay),
            roles,
            beta1=config.optimizer.beta1,
            beta2=config.optimizer.beta2,
            epsilon=config.optimizer.epsilon,
            weight_decay=config.optimizer.weight_decay,
            clip_norm=config.optimizer.clip_norm,
        )
        schedule = SCHEDULES[config.optimizer.schedule](
            peak, config.optimizer.min_learning_rate, durations.warmup_steps, durations.total_steps
        )
        self.batch_sharding = batch_sharding(mesh)
        state = jax.eval_shape(self.newly_initialised_state)
        self.state_sharding = state_sharding(mesh, roles, state)
        self.abstract_state = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, self.state_sharding
        )
        self.abstract_batch = abstract_batch(self.task.features, config.batch_size, self.batch_sharding)
        self.train_step = jax.jit(
            make_train_step(self.task, model, self.optimizer, schedule, config, durations.steps_per_epoch, mesh),
            donate_argnums=0,
            out_shardings=(self.state_sharding, None),
        )

    def compile(
        self,
        state: TrainState,
        batch: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
        options: dict[str, str | bool] | None = None,
    ) -> jax.stages.Compiled:
        """Compiles the training step, and then returns freed memory to the operating system.

        Args:
            state, batch: arrays, or their shapes with shardings.
            options: XLA compiler options.
        """
        compiled = self.train_step.lower(state, batch).compile(options)
        release_memory()
        return compiled

    def newly_initialised_state(self) -> TrainState:
        """The state before the first step, with random parameters. Jit it with `state_sharding`."""
        model, ema = self.task.build(init_key(self.config.seed)), self.config.ema.decay > 0
        return initial_state(get_parameters(model), self.optimizer, ema=ema, statistics=get_statistics(model))
