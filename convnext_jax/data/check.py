"""Which images of a split cannot be read, found before they are needed."""

import contextlib
from collections.abc import Generator

import jax
import numpy as np

from convnext_jax.data.dataset import Dataset, Example
from convnext_jax.data.loading import Waiting, load_batches
from convnext_jax.data.pipeline import Share
from convnext_jax.errors import UserError

ROWS = 16
"""Images that a thread decodes before the next is asked for: a signal is answered between them."""

SHOWN = 3
"""How many unreadable images a message names."""


def find_unreadable(
    dataset: Dataset, *, process: int, processes: int, waiting: Waiting
) -> Generator[dict[int, str], None, None]:
    """Checks each example of this process's part of a split once, and yields those that cannot be read, part by part.

    Args:
        dataset: the split.
        process: which of the processes this is; each of them takes as many parts.
        processes: how many processes share the work.
        waiting: is called while a part is waited for.

    Yields:
        Number of an example in the split → what is wrong with it.
    """
    share = Share(processes * ROWS, range(process * ROWS, (process + 1) * ROWS))
    errors: dict[int, str] = {}

    def load(local: int) -> Example:
        index = share.position(local)
        if index < len(dataset):
            try:
                dataset.check(index)
            except UserError as error:
                errors[index] = str(error)
        return {'index': np.int32(index)}

    parts = load_batches(
        load,
        range(-(-len(dataset) // share.batch_size)),
        share.rows,
        {'index': jax.ShapeDtypeStruct((), np.int32)},
        workers=0,
        waiting=waiting,
        name=lambda local: dataset.name(min(share.position(local), len(dataset) - 1)),
    )
    with contextlib.closing(parts):
        for part in parts:
            yield {int(index): errors[index] for index in part['index'] if index in errors}


def describe_unreadable(errors: dict[int, str], images: int, split: str) -> str:
    """One line that names the first of the unreadable images of a split, and says what to do."""
    shown = '; '.join(errors[index] for index in sorted(errors)[:SHOWN])
    more = f'; and {len(errors) - SHOWN} more' if len(errors) > SHOWN else ''
    return (
        f'{len(errors)} of the {images} images of {split} cannot be read: {shown}{more}. '
        'Remove or replace them (of a prepared data set: in its source, and prepare it again), '
        'and run the same command again'
    )
