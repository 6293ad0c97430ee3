"""The loss of semantic segmentation: the cross-entropy of pixels, from logits of a lower resolution."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from convnext_jax.data.mask_classes import IGNORED
from convnext_jax.models.parameters import AnyArray
from convnext_jax.models.upernet import HeadLogits, resize
from convnext_jax.tasks.task import Loss

AUXILIARY_WEIGHT = 0.4
"""Factor on the loss of the auxiliary head."""


def segmentation_loss(
    logits: HeadLogits,
    labels: Integer[AnyArray, 'n h w'],
    *,
    average: Literal['all', 'labelled'],
    ignored: int = IGNORED,
    auxiliary_weight: float = AUXILIARY_WEIGHT,
) -> Loss:
    """The cross-entropy of the main head, plus the weighted cross-entropy of the auxiliary head, summed over pixels.

    Args:
        logits: from `UPerNet.head_logits`. Both are enlarged to the size of the labels.
        labels: (N, H, W) integers. The class of each pixel, or `ignored`.
        average: the pixels by whose number the loss is divided. 'all', also the ignored ones, as in mmsegmentation and
            in the published recipes; or only the 'labelled' ones, as in transformers.
        ignored: label of pixels whose loss is 0.
        auxiliary_weight: factor on the loss of the auxiliary head.

    Returns:
        The sum over pixels, the number of pixels, and the term `auxiliary_loss` without its factor. All sums are NaN if
        a label is neither a class nor `ignored`.
    """
    total, terms = pixel_losses(logits.main, labels, ignored), {}
    if logits.auxiliary is not None:
        terms['auxiliary_loss'] = pixel_losses(logits.auxiliary, labels, ignored)
        total += auxiliary_weight * terms['auxiliary_loss']
    counted = labels != ignored if average == 'labelled' else jnp.ones_like(labels)
    return Loss(total, counted.sum(dtype=jnp.float32), terms)


def pixel_losses(
    logits: Float[Array, 'n rows columns classes'], labels: Integer[AnyArray, 'n h w'], ignored: int
) -> Float[Array, '']:
    """The sum of the cross-entropies of all pixels that are not ignored; arguments as for `segmentation_loss`.

    The images are computed one after the other and again in the backward pass, because the enlarged logits of a whole
    batch may not fit into memory.
    """

    @jax.checkpoint
    def of_image(logits: Float[Array, 'rows columns classes'], labels: Integer[Array, 'h w']) -> Float[Array, '']:
        log_probabilities = jax.nn.log_softmax(resize(logits[None], labels.shape)[0])
        classes = jnp.arange(logits.shape[-1])
        chosen = jnp.where(labels[..., None] == classes, log_probabilities, 0).sum(-1)
        known = (labels >= 0) & (labels < len(classes))
        return jnp.where(labels == ignored, 0, jnp.where(known, -chosen, jnp.nan)).sum()

    return jax.lax.map(lambda image: of_image(*image), (logits, labels)).sum()
