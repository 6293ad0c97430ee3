"""AdamW with weight decay by role and layer decay, the learning-rate schedule, the moving average of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from convnext_jax.errors import UserError
from convnext_jax.models import Parameters, Role
from convnext_jax.models.layers import Tree, apart_on_cpu


def layer_factors(names: list[str], depths: tuple[int, ...], rule: str, decay: float) -> dict[str, np.ndarray | float]:
    """What the learning rate of each parameter is multiplied by: decay to the power of its distance from the head.

    Stacked parameters have one factor for each block, along their leading axis.

    Args:
        names: of all parameters.
        depths: blocks in each stage.
        rule: 'single', a layer for each block; or 'group', one for every three blocks of the third stage and one for
            each of the others (both `optim_factory.py` of the original repositories).
        decay: in (0, 1]; 1 leaves all at the learning rate.

    Raises:
        UserError: an unknown rule, or the group rule for a model that has no four stages.
    """
    if rule not in LAYER_RULES:
        raise UserError(f"optimizer.layer_decay_rule must be one of {', '.join(LAYER_RULES)}, not '{rule}'")
    if rule == 'group' and len(depths) != 4:
        raise UserError("optimizer.layer_decay_rule='group' is for models of four stages: take 'single'")
    layers, head = LAYER_RULES[rule](depths)
    factors: dict[str, np.ndarray | float] = {}
    for name in names:
        part, *rest = name.split('.')
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
    """(Layer of the downsampling, layer of each block) of each stage, and the head's layer; the stem's is 0."""
    layers = []
    for stage, depth in enumerate(depths):
        first = sum(depths[:stage]) + 1
        layers.append((first, list(range(first, first + depth))))
    return layers, sum(depths) + 1


def _group_layers(depths: tuple[int, ...]) -> tuple[list[tuple[int, list[int]]], int]:
    """As `_single_layers`; 12 layers between stem and head where the third stage has 27 blocks, 6 where it has 9."""
    third = [3 + block // 3 for block in range(depths[2])]
    last = third[-1] + 1
    return [(1, [1] * depths[0]), (2, [2] * depths[1]), (3, third), (last, [last] * depths[3])], last + 1


LAYER_RULES = {'single': _single_layers, 'group': _group_layers}


def peak_learning_rate(config: ConfigDict) -> float:
    """The learning rate after the warm-up: the config's, which is for 256 examples, scaled with the batch size."""
    return config.optimizer.learning_rate * config.batch_size / 256


def cosine_schedule(peak: float, minimum: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Step → learning rate: linear from 0 to the peak, then half a cosine to the minimum.

    The steps are the original's (`cosine_scheduler` of its utils.py): the warm-up's first step has rate 0 and its last
    the peak, and the cosine's first step is at the peak again.
    """
    cosine = optax.cosine_decay_schedule(peak, total_steps - warmup_steps, alpha=minimum / peak)
    if warmup_steps == 0:
        return cosine
    warmup = optax.linear_schedule(0.0, peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, cosine], [warmup_steps])


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
    """AdamW (arXiv:1711.05101) but for the last factor: the training step multiplies by −learning rate itself.

    Its `update` has one argument more, `good`: where it is False, the state stands still and the update means nothing.

    Args:
        factors: of the learning rate, as `layer_factors` gives them for every parameter.
        roles: of the parameters; they say on which of them weight decay falls.
        beta1, beta2, epsilon, weight_decay: as in the paper.
        clip_norm: largest global norm of the gradient; 0 for any.
    """

    def by_layer(updates: Parameters, _) -> Parameters:
        # A block's factor stands at the front of the stacked axes.
        return {name: u * np.reshape(factors[name], (-1,) + (1,) * (u.ndim - 1)) for name, u in updates.items()}

    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        _scale_by_adam(beta1, beta2, epsilon),
        optax.add_decayed_weights(weight_decay, mask={name: roles[name].decays for name in factors}),
        optax.stateless(by_layer),
    )


def _scale_by_adam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, with the choice of `good` made before the moments are used.

    So the update reads the moments that stay. Read from those before, they could not be overwritten where they are, and
    the compiler would copy them at every step.
    """
    adam = optax.scale_by_adam(beta1, beta2, epsilon)

    def update(gradient: Parameters, state: optax.ScaleByAdamState, _=None, *, good: jax.Array, **others) -> tuple:
        state = apart_on_cpu(select(good, adam.update(gradient, state)[1], state))
        mean = optax.tree.bias_correction(state.mu, beta1, state.count)
        square = optax.tree.bias_correction(state.nu, beta2, state.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mean, square), state

    return optax.GradientTransformationExtraArgs(adam.init, update)


def moving_average(average: Parameters, parameters: Parameters, decay: float) -> Parameters:
    """decay · average + (1 − decay) · parameters."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, parameters)


def select(condition: jax.Array, chosen: Tree, otherwise: Tree) -> Tree:
    """Array by array: the first where the condition, a scalar, is True, else the second."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, otherwise)
