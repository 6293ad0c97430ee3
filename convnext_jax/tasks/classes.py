"""The classes of a network: their number, and the outputs that a new run keeps from trained weights."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from convnext_jax.data.class_names import kept_outputs
from convnext_jax.errors import UserError
from convnext_jax.models import Weights


def set_num_classes(config: ConfigDict, classes: int) -> None:
    """Sets `model.num_classes` if it is 0, or checks that it is large enough for the data.

    Raises:
        UserError: the data has more classes.
    """
    model = config.model
    if model.num_classes == 0:
        model.num_classes = classes
    elif model.num_classes < classes:
        raise UserError(
            f'model.num_classes={model.num_classes}, but {config.data.name} has {classes} classes: '
            f'set it to {classes}, or to 0 for the number of classes of the data set'
        )


def matched_outputs(
    head: Sequence[str],
    loaded: Weights,
    initial: Weights,
    old_names: Sequence[str] | None,
    new_names: Sequence[str],
    rule: str,
) -> tuple[Weights, str]:
    """The initial head with the loaded outputs for known classes, and a message for the user.

    Args:
        head: names of the kernel and of the bias of the head.
        loaded, initial: weights that contain the head.
        old_names, new_names: class names of the loaded and of the new outputs. `old_names` may be None.
        rule: `config.init.head`.

    Returns:
        The head, {} if no output is copied; and the message, '' if there is none.
    """
    kernel, bias = head
    if rule == 'new':
        return {}, 'the head is newly initialised'
    outputs, old_outputs = initial[bias].size, loaded[bias].size
    kept, note = kept_outputs(new_names, outputs, old_names, old_outputs)
    if max(kept) < 0 or loaded[kernel].shape[0] != initial[kernel].shape[0]:
        return {}, note
    sources = np.asarray(kept)

    def merge(new: Float[Array, '*inputs new'], old: Float[Array, '*inputs old']) -> Float[Array, '*inputs new']:
        return jnp.where(sources >= 0, old[..., np.maximum(sources, 0)], new)

    def merged(name: str) -> jax.Array:
        return jax.jit(merge, out_shardings=initial[name].sharding)(initial[name], np.asarray(loaded[name]))

    return {name: merged(name) for name in head}, note
