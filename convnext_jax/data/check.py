"""Which images of a split cannot be read, found before they are needed."""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from convnext_jax.data.decode import JPEG, decode, eval_sides
from convnext_jax.data.loading import Row, load_batches
from convnext_jax.data.pipeline import Share, Waiting
from convnext_jax.data.sources import Source
from convnext_jax.errors import UserError

ROWS = 16
"""Images that a thread decodes before the next is asked for: a signal is answered between them."""

SHOWN = 3
"""How many unreadable images a message names."""


def find_unreadable(
    source: Source,
    *,
    image_size: int,
    channels: int,
    crop_pct: float,
    process: int,
    processes: int,
    waiting: Waiting,
) -> Iterator[dict[int, str]]:
    """Decodes each image of this process's part of a split once, and yields those that cannot be read, part by part.

    Args:
        source: the split.
        image_size, channels, crop_pct: as `eval_batches`.
        process: which of the processes this is; each of them takes as many parts.
        processes: how many processes share the work.
        waiting: is called while a part is waited for.

    Yields:
        Number of an image in the split → what is wrong with it.
    """
    share = Share(processes * ROWS, range(process * ROWS, (process + 1) * ROWS))
    errors: dict[int, str] = {}

    def load(local: int) -> Row:
        index = share.position(local)
        if index < len(source):
            try:
                example = source[index]
                sides = _check(example.image, channels, example.name)
                eval_sides(sides, image_size, crop_pct, name=example.name)
            except UserError as error:
                errors[index] = str(error)
        return {'index': np.int64(index)}

    parts = load_batches(
        load,
        range(-(-len(source) // share.batch_size)),
        share.rows,
        (),
        workers=0,
        waiting=lambda seconds, row: waiting(seconds, lambda: source.name(min(share.position(row), len(source) - 1))),
    )
    with contextlib.closing(parts):
        for part in parts:
            yield {int(index): errors[index] for index in part['index'] if index in errors}


def _check(image: bytes, channels: int, name: str) -> tuple[int, int]:
    """Width and height of an image, which is decoded as cheaply as finds out whether all of it is there.

    Raises:
        UserError: as `decode`.
    """
    if image.startswith(JPEG):
        with contextlib.suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # `decode` says why
            opened = Image.open(io.BytesIO(image))
            sides = opened.size
            opened.draft('L' if channels == 1 else 'RGB', (1, 1))  # an eighth of each side, and all of the bytes
            opened.load()
            return sides
    return decode(image, channels, name).size


def describe_unreadable(errors: dict[int, str], images: int, split: str) -> str:
    """One line that names the first of the unreadable images of a split, and says what to do."""
    shown = '; '.join(errors[index] for index in sorted(errors)[:SHOWN])
    more = f'; and {len(errors) - SHOWN} more' if len(errors) > SHOWN else ''
    return (
        f'{len(errors)} of the {images} images of {split} cannot be read: {shown}{more}. '
        'Remove or replace them (of a prepared data set: in its source, and prepare it again), '
        'and run the same command again'
    )
