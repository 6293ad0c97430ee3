"""One global batch after another on the devices: which examples, in which order, decoded ahead of need.

Everything follows from (seed, step): there is no iterator state to save, and a run that resumes at a step, on any
number of processes, sees the examples that the unbroken run would have seen.
"""

import collections
import dataclasses
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np
from PIL import Image

from convnext_jax.data.decode import decode, eval_resize, resize, train_crop
from convnext_jax.data.sources import Source
from convnext_jax.errors import UserError

ENDLESS = 2**40  # more batches than any training takes
MOST_LABELS = 32  # of one image; ReaL's have a dozen
KEPT_BYTES = 2**28  # images that are the same in every epoch are decoded once, where all of them take no more than this

Batch = dict[str, np.ndarray | jax.Array]
"""`image` (N, H, W, C) uint8; `label` (N,) int32, or (N, MOST_LABELS) with −1 where there are fewer; `weight` (N,)
float32: 0 where a row only fills up the batch, or has no label."""


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows of every global batch that one process loads: contiguous, so that the rows' order never depends on it.

    Attributes:
        batch_size: rows of the global batch.
        process, processes: which of how many this is.
    """

    batch_size: int
    process: int = 0
    processes: int = 1

    def __post_init__(self):
        if self.batch_size % self.processes:
            raise UserError(f'batch_size={self.batch_size} is no multiple of the {self.processes} processes')

    @property
    def rows(self) -> int:
        return self.batch_size // self.processes

    def position(self, local: int) -> int:
        """The place in the global sequence of rows that the process's row number `local` has."""
        batch, row = divmod(local, self.rows)
        return batch * self.batch_size + self.process * self.rows + row


class Unreadable:
    """The training images that could not be read, told by the loader's threads to the loop.

    Raises:
        UserError: from `add`, when they are more than one in a thousand of `images`: then it is no accident.
    """

    def __init__(self, images: int):
        self._images = images
        self._errors: dict[int, UserError] = {}
        self._told = 0
        self._lock = threading.Lock()

    def add(self, index: int, error: UserError) -> None:
        with self._lock:
            self._errors[index] = error
            if len(self._errors) * 1000 > self._images:
                raise UserError(
                    f'{error}. Unreadable are {len(self._errors)} of {self._images} images, more than one in a thousand'
                ) from error

    def news(self) -> list[str]:
        """A line for each image since the last call."""
        with self._lock:
            errors = list(self._errors.values())[self._told :]
            self._told += len(errors)
        return [f'{error}: the next image stands in for it' for error in errors]

    def __len__(self) -> int:
        return len(self._errors)


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """Whole batches in an epoch; what is left over is dropped, other examples each epoch.

    Raises:
        UserError: the split is smaller than one batch.
    """
    if len(source) < batch_size:
        raise UserError(f'batch_size={batch_size} is more than the {len(source)} training images: lower it')
    return len(source) // batch_size


def train_batches(
    source: Source,
    share: Share,
    *,
    seed: int,
    start_step: int,
    image_size: int,
    channels: int,
    crop_scale: tuple[float, float] | tuple[()],
    unreadable: Unreadable | None = None,
) -> Iterator[Batch]:
    """Endless training batches of this process's rows, from `start_step` on, shuffled anew each epoch.

    An image that cannot be read is told to `unreadable`, and the next example of the split stands in for it, so that
    the batch does not depend on who loads it; without `unreadable` it is an error.

    Raises:
        UserError: `crop_scale` is no range of shares, or the split is smaller than a batch; while iterating, an image
            that cannot be read.
    """
    if crop_scale and not (len(crop_scale) == 2 and 0 < crop_scale[0] <= crop_scale[1] <= 1):
        raise UserError(f'data.crop_scale must be two shares of the area, 0 < least ≤ most ≤ 1, not {crop_scale}')
    used = steps_per_epoch(source, share.batch_size) * share.batch_size
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()

    def read(index: int) -> tuple[Image.Image, int]:
        try:
            example = source[index]
            return decode(example.image, channels, example.name), example.label
        except UserError as error:
            if unreadable is None:
                raise
            unreadable.add(index, error)
            return read((index + 1) % len(source))

    def whole(index: int) -> Batch:
        image, label = read(index)
        return _row(resize(image, image_size), label, weight=1)

    def cropped(index: int, epoch: int) -> Batch:
        image, label = read(index)
        rng = np.random.default_rng((seed, epoch, index))
        return _row(train_crop(image, image_size, crop_scale, rng), label, weight=1)

    if len(source) * image_size**2 * channels <= KEPT_BYTES:
        whole = functools.cache(whole)

    def load(local: int) -> Batch:
        epoch, place = divmod(share.position(int(local)), used)
        index = int(order[epoch * len(source) + place])
        return cropped(index, epoch) if crop_scale else whole(index)

    return _batches(load, share.rows, start_step, ENDLESS)


def eval_batches(
    source: Source,
    share: Share,
    *,
    image_size: int,
    channels: int,
    crop_pct: float,
    squash: bool | None = None,
    resample: int = Image.Resampling.BICUBIC,
) -> Iterator[Batch]:
    """This process's rows of a pass over the split, every example once; the last batch is filled up at weight 0.

    Images are prepared as by `eval_resize`.
    """

    none = () if source.many_labels else 0

    def load(local: int) -> Batch:
        index = share.position(int(local))
        if index >= len(source):
            return _row(np.zeros((image_size, image_size, channels), np.uint8), none, weight=0)
        example = source[index]
        image = decode(example.image, channels, example.name)
        pixels = eval_resize(image, image_size, crop_pct, squash=squash, resample=resample)
        return _row(pixels, example.label, weight=1)

    return _batches(load, share.rows, 0, -(-len(source) // share.batch_size))


def to_devices(batches: Iterator[Batch], sharding: jax.sharding.Sharding, ahead: int = 2) -> Iterator[Batch]:
    """Puts each process's rows on its devices as one global batch, `ahead` batches before they are asked for."""

    def put(batch: Batch) -> Batch:
        return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)

    queue = collections.deque(map(put, itertools.islice(batches, ahead)))
    while queue:
        queue.extend(map(put, itertools.islice(batches, 1)))
        yield queue.popleft()


def _batches(load: Callable[[int], Batch], rows: int, first: int, last: int) -> Iterator[Batch]:
    """Batches `first` to `last` of `rows` examples, loaded by threads ahead of need: Pillow decodes outside the GIL."""
    threads = max((os.cpu_count() or 1) - 1, 1)  # one core is the loop's; on small images a second thread only fights
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(grain.MapDataset.range(first * rows, last * rows).map(load).batch(rows).to_iter_dataset(options))


def _row(pixels: np.ndarray, label: int | tuple[int, ...], weight: float) -> Batch:
    if isinstance(label, tuple):
        weight = weight if label else 0
        label = (*label, *(-1,) * (MOST_LABELS - len(label)))
    return {'image': pixels, 'label': np.int32(label), 'weight': np.float32(weight)}
