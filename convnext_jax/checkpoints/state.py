"""Everything a run is, as one pytree."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from convnext_jax.models import Parameters, Statistics, Weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """What a checkpoint holds and a training step maps to the next.

    Attributes:
        step: int32, steps done; every random key and the place in the data follow from it and the seed.
        parameters: float32 by name.
        statistics: float32 by name, updated by the model and by no gradient; {} if the model has none.
        optimizer: the state of the optax transformation.
        ema: moving average of the weights, or None.
        skipped: int32, steps whose update was left out because the loss or the gradient was not finite.
        last_good: int32, steps done when the newest update was made.
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
        """The parameters and the statistics: what a model is evaluated with."""
        return self.parameters | self.statistics


def initial_state(
    parameters: Parameters, optimizer: optax.GradientTransformation, *, ema: bool, statistics: Statistics | None = None
) -> TrainState:
    """The state before the first step; the moving average starts at the weights.

    Args:
        parameters: of the model.
        optimizer: as `adamw` gives it.
        ema: whether the run keeps a moving average.
        statistics: of the model; None if it has none.
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
    """The key of the parameters' first values."""
    return jax.random.split(jax.random.key(seed))[0]


def step_key(seed: int, step: jax.Array) -> jax.Array:
    """The key of everything that is random in one training step."""
    return jax.random.fold_in(jax.random.split(jax.random.key(seed))[1], step)
