"""AdamW with weight decay by role, the learning-rate schedule, and the moving average of the weights."""

import re

import jax
import optax

from convnext_jax.models import Parameters

# The first rule that matches a parameter's name says whether weight decay falls on it: on the weights of convolutions
# and linear layers, the depthwise kernel among them, never on biases, norms, layer scale or GRN.
DECAY_RULES = (
    (r'(^|\.)(conv|depthwise|pointwise1|pointwise2|head)\.kernel$', True),
    (r'(^|\.)layer_scale$', False),
    (r'(^|\.)grn\.(gamma|beta)$', False),
    (r'(^|\.)norm\.scale$', False),
    (r'\.bias$', False),
)


def decays(name: str) -> bool:
    """Whether weight decay falls on the parameter of that name.

    Raises:
        ValueError: no rule covers it; a new kind of parameter needs one.
    """
    for pattern, decay in DECAY_RULES:
        if re.search(pattern, name):
            return decay
    raise ValueError(f'no rule of DECAY_RULES covers {name}')


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
    names: list[str], *, beta1: float, beta2: float, epsilon: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) but for the last factor: the training step multiplies by −learning rate itself."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.scale_by_adam(beta1, beta2, epsilon),
        optax.add_decayed_weights(weight_decay, mask={name: decays(name) for name in names}),
    )


def moving_average(average: Parameters, parameters: Parameters, decay: float) -> Parameters:
    """decay · average + (1 − decay) · parameters."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, parameters)
