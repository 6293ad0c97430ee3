"""A check that all images of a split can be read, before training needs them."""

import contextlib
from collections.abc import Generator

import jax
import numpy as np

from convnext_jax.data.dataset import Dataset, Example
from convnext_jax.data.loading import WaitCallback, load_batches
from convnext_jax.data.pipeline import Share
from convnext_jax.errors import UserError

BATCH_SIZE = 16
"""Images per batch. It is small because signals are handled between batches."""

MAX_NAMED = 3
"""Maximum number of unreadable images that a message names."""


def find_unreadable(
    dataset: Dataset, *, process: int, processes: int, waiting: WaitCallback
) -> Generator[dict[int, str], None, None]:
    """Checks this process's share of the examples of a split, batch by batch.

    Args:
        dataset: the split.
        process: index of this process. All processes check equal numbers of batches.
        processes: number of processes that share the work.
        waiting: called while a batch is pending, see `loading.WaitCallback`.

    Yields:
        For each batch: index of an unreadable example in the split → error message.
    """
    share = Share(processes * BATCH_SIZE, range(process * BATCH_SIZE, (process + 1) * BATCH_SIZE))
    errors: dict[int, str] = {}

    def load(local: int) -> Example:
        index = share.position(local)
        if index < len(dataset):
            try:
                dataset.check(index)
            except UserError as error:
                errors[index] = str(error)
        return {'index': np.int32(index)}

    batches = load_batches(
        load,
        range(-(-len(dataset) // share.batch_size)),
        share.local_batch_size,
        {'index': jax.ShapeDtypeStruct((), np.int32)},
        workers=0,
        waiting=waiting,
        name=lambda local: dataset.name(min(share.position(local), len(dataset) - 1)),
    )
    with contextlib.closing(batches):
        for batch in batches:
            yield {int(index): errors[index] for index in batch['index'] if index in errors}


def describe_unreadable(errors: dict[int, str], images: int, split: str) -> str:
    """A one-line error message: the number of unreadable images, the errors of the first few, and what to do.

    Args:
        errors: index of an unreadable example → error message.
        images: number of images in the split.
        split: name of the split.
    """
    named = '; '.join(errors[index] for index in sorted(errors)[:MAX_NAMED])
    more = f'; and {len(errors) - MAX_NAMED} more' if len(errors) > MAX_NAMED else ''
    return (
        f'{len(errors)} of the {images} images of {split} cannot be read: {named}{more}. '
        'Remove or replace them (for a prepared data set, in its source, and prepare it again), '
        'then run the same command again'
    )
