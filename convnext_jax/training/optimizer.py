"""AdamW with weight decay and layer decay, the learning-rate schedule, and the moving average of the weights."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from convnext_jax.errors import UserError
from convnext_jax.models import Parameters, Role
from convnext_jax.models.layers import Tree, fusion_barrier_on_cpu

WARMUP_START = 1e-6
"""Factor on the learning rate at the first step of the warm-up of `linear_schedule`."""


def layer_factors(names: list[str], depths: tuple[int, ...], rule: str, decay: float) -> dict[str, np.ndarray | float]:
    """The factor on the learning rate of each parameter: `decay` to the power of its distance from the head in layers.

    Args:
        names: names of all parameters. Names of the stem and the stages may begin with `backbone.`.
        depths: number of blocks in each stage.
        rule: 'single': each block is a layer. 'group': every three blocks of the third stage are a layer, and each
            other stage is one layer. Both are from `optim_factory.py` of the original repositories. 'stage': each stage
            is a layer, and the stem and all downsampling are the first layer, as in their segmentation code.
        decay: in (0, 1]; 1 switches layer decay off.

    Returns:
        Name → factor. Stacked parameters have an array (blocks,) with one factor for each block.

    Raises:
        UserError: the rule is unknown, or it is 'group' or 'stage' and the model does not have four stages.
    """
    if rule not in LAYER_RULES:
        raise UserError(f"optimizer.layer_decay_rule must be one of {', '.join(LAYER_RULES)}, not '{rule}'")
    if rule != 'single' and len(depths) != 4:
        raise UserError(f"optimizer.layer_decay_rule='{rule}' is for models of four stages: use 'single'")
    layers, head = LAYER_RULES[rule](depths)
    factors: dict[str, np.ndarray | float] = {}
    for name in names:
        part, *rest = name.removeprefix('backbone.').split('.')
        if part == 'stem':
            layer = np.zeros(())
        elif part == 'stages':
            downsample, blocks = layers[int(rest[0])]
            layer = np.asarray(blocks if rest[1] == 'blocks' else downsample)
        else:
            layer = np.asarray(head)
        factors[name] = decay ** (head - layer)
    return factors


def _single_layers(depths: tuple[int, ...]) -> tuple[list[tuple[int, list[int]]], int]:
    """For each stage, the layer of its downsampling and the layers of its blocks; and the layer of the head.

    The stem is layer 0.
    """
    layers = []
    for stage, depth in enumerate(depths):
        first = sum(depths[:stage]) + 1
        layers.append((first, list(range(first, first + depth))))
    return layers, sum(depths) + 1


def _group_layers(depths: tuple[int, ...]) -> tuple[list[tuple[int, list[int]]], int]:
    """Like `_single_layers`. There are 12 layers between stem and head if stage 3 has 27 blocks, and 6 if it has 9."""
    third = [3 + block // 3 for block in range(depths[2])]
    last = third[-1] + 1
    return [(1, [1] * depths[0]), (2, [2] * depths[1]), (3, third), (last, [last] * depths[3])], last + 1


def _stage_layers(depths: tuple[int, ...]) -> tuple[list[tuple[int, list[int]]], int]:
    """Stage i is layer i + 1, its downsampling is layer 0. The head has the number that `_group_layers` gives it."""
    return [(0, [stage + 1] * depth) for stage, depth in enumerate(depths)], _group_layers(depths)[1]


LAYER_RULES = {'single': _single_layers, 'group': _group_layers, 'stage': _stage_layers}


def peak_learning_rate(config: ConfigDict) -> float:
    """The learning rate after the warm-up: `optimizer.learning_rate`, which is for 256 examples, times batch / 256."""
    return config.optimizer.learning_rate * config.batch_size / 256


def cosine_schedule(peak: float, minimum: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """A schedule from step to learning rate: linear from 0 to the peak, then half a cosine to the minimum.

    It equals `cosine_scheduler` in utils.py of the original repository: the first warm-up step has rate 0, the last one
    has the peak rate, and the first step of the cosine has the peak rate again.

    Args:
        peak: learning rate at the end of the warm-up.
        minimum: learning rate at the end of the run.
        warmup_steps, total_steps: in optimizer steps; `total_steps` includes the warm-up.
    """
    cosine = optax.cosine_decay_schedule(peak, total_steps - warmup_steps, alpha=minimum / peak)
    if warmup_steps == 0:
        return cosine
    warmup = optax.linear_schedule(0.0, peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, cosine], [warmup_steps])


def linear_schedule(peak: float, minimum: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """A schedule from step to learning rate: linear from the peak to the minimum, times a linear warm-up.

    It equals mmsegmentation's policy 'poly' of power 1: the decline begins at the first step, and in the warm-up its
    value is multiplied by a factor that rises linearly from `WARMUP_START` at the first step to 1 after the last one.
    Arguments as for `cosine_schedule`.
    """
    decline = optax.linear_schedule(peak, minimum, total_steps)
    if warmup_steps == 0:
        return decline
    warmup = optax.linear_schedule(WARMUP_START, 1.0, warmup_steps)
    return lambda step: decline(step) * warmup(step)


SCHEDULES = {'cosine': cosine_schedule, 'linear': linear_schedule}
"""Value of `config.optimizer.schedule` → the function that builds the schedule."""


def adamw(
    factors: dict[str, np.ndarray | float],
    roles: dict[str, Role],
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float,
    clip_norm: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW (arXiv:1711.05101) without the learning rate: the training step multiplies the update by −learning rate.

    Its `update` takes an additional argument `good`, a bool scalar. If it is False, the state does not change, and the
    returned update must not be applied.

    Args:
        factors: from `layer_factors`, for all parameters.
        roles: name → role; `Role.decays` says whether weight decay applies.
        beta1, beta2, epsilon, weight_decay: as in the paper.
        clip_norm: maximum global norm of the gradient; 0: no clipping.
    """

    def by_layer(updates: Parameters, _) -> Parameters:
        # The leading axis of stacked parameters is the block axis, so that each block is multiplied by its own factor.
        return {name: u * np.reshape(factors[name], (-1,) + (1,) * (u.ndim - 1)) for name, u in updates.items()}

    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        _scale_by_adam(beta1, beta2, epsilon),
        optax.add_decayed_weights(weight_decay, mask={name: roles[name].decays for name in factors}),
        optax.stateless(by_layer),  # ty: ignore[invalid-argument-type]  # optax asks for any tree
    )


def _scale_by_adam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` that selects between old and new moments before it computes the update.

    Otherwise the old moments stay live until the selection after the update, and XLA has to copy them at every step
    instead of updating them in place.
    """
    adam = optax.scale_by_adam(beta1, beta2, epsilon)

    def update(gradient: Parameters, state: optax.ScaleByAdamState, _=None, *, good: jax.Array, **others) -> tuple:
        new = cast(optax.ScaleByAdamState, adam.update(gradient, state)[1])
        state = fusion_barrier_on_cpu(select(good, new, state))
        mean = optax.tree.bias_correction(state.mu, beta1, state.count)
        square = optax.tree.bias_correction(state.nu, beta2, state.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mean, square), state

    return optax.GradientTransformationExtraArgs(adam.init, update)  # ty: ignore[invalid-argument-type]  # as above


def moving_average(average: Parameters, parameters: Parameters, decay: float) -> Parameters:
    """decay · average + (1 − decay) · parameters."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, parameters)


def select(condition: jax.Array, chosen: Tree, otherwise: Tree) -> Tree:
    """`chosen` if the scalar condition is True, otherwise `otherwise`, for each array of the trees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, otherwise)
