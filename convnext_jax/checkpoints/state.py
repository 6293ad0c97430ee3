"""TrainState, the pytree that a checkpoint stores, and the random keys that follow from the seed and the step."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from convnext_jax.models import Parameters, Statistics, Weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """The training state: what a checkpoint stores, and what a training step maps to the next state.

    Attributes:
        step: int32 scalar, number of finished steps. It and the seed determine the random keys and the position in the
            data.
        parameters: name → float32 array.
        statistics: name → float32 array that the model itself updates, without a gradient; {} if there are none.
        optimizer: the state of the optax transformation.
        ema: moving average of parameters and statistics, by name, or None.
        skipped: int32 scalar, number of steps without an update because the loss, the gradient or a statistic was not
            finite.
        last_good: int32 scalar, value of `step` after the newest update.
    """

    step: jax.Array
    parameters: Parameters
    statistics: Statistics
    optimizer: optax.OptState
    ema: Weights | None
    skipped: jax.Array
    last_good: jax.Array

    @property
    def weights(self) -> Weights:
        """The parameters and the statistics, which an evaluation needs."""
        return self.parameters | self.statistics


def initial_state(
    parameters: Parameters, optimizer: optax.GradientTransformation, *, ema: bool, statistics: Statistics | None = None
) -> TrainState:
    """The state before the first step; the moving average starts at the weights.

    Args:
        parameters: name → float32 array.
        optimizer: from `adamw`.
        ema: whether to keep a moving average of the weights.
        statistics: name → float32 array; None if the model has none.
    """
    statistics = statistics or {}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        parameters=parameters,
        statistics=statistics,
        optimizer=optimizer.init(parameters),
        ema=jax.tree.map(jnp.copy, parameters | statistics) if ema else None,
        skipped=jnp.zeros((), jnp.int32),
        last_good=jnp.zeros((), jnp.int32),
    )


def init_key(seed: int) -> jax.Array:
    """The key for the initialisation of the parameters."""
    return jax.random.split(jax.random.key(seed))[0]


def step_key(seed: int, step: jax.Array) -> jax.Array:
    """The key for all random draws of one training step."""
    return jax.random.fold_in(jax.random.split(jax.random.key(seed))[1], step)
