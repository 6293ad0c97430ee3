"""One global batch after another on the devices: which examples, in which order, decoded ahead of need.

Everything follows from (seed, step): there is no iterator state to save, and a run that resumes at a step, on any
number of processes, sees the examples that the unbroken run would have seen.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import grain
import jax
import numpy as np
from PIL import Image

from convnext_jax.data.decode import decode, eval_resize, resize, train_crop
from convnext_jax.data.loading import Row, load_batches, no_word
from convnext_jax.data.sources import Source
from convnext_jax.errors import UserError

MOST_LABELS = 32  # of one image; ReaL's have a dozen
REPLACE = 'replace each by a readable file of that name, or delete them and take another workdir'
REPLACE_IN_EVALUATION = 'replace it by a readable file of that name, and run the same command again'
ROUNDS = 4  # of the cipher that shuffles, as Grain itself takes
KEPT_BYTES = 2**28  # images that are the same in every epoch are decoded once, where all of them take no more than this

Batch = dict[str, np.ndarray | jax.Array]
"""`image` (N, H, W, C) uint8; `label` (N,) int32, or (N, MOST_LABELS) with −1 where there are fewer; in evaluation
also `weight` (N,) float32: 0 where a row only fills up the batch, or has no label."""

Waiting = Callable[[float, Callable[[], str]], None]
"""Called again and again while a batch is waited for, with the seconds so far and what says which example has not come.
What it raises ends the waiting."""


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows of every global batch that one process loads: those of its devices.

    Attributes:
        batch_size: rows of the global batch.
        places: which of them, in order; all of them by default.
    """

    batch_size: int
    places: Sequence[int] | None = None

    @property
    def rows(self) -> int:
        return self.batch_size if self.places is None else len(self.places)

    def position(self, local: int) -> int:
        """The place in the global sequence of rows that the process's row number `local` has."""
        batch, row = divmod(local, self.rows)
        return batch * self.batch_size + (row if self.places is None else self.places[row])


class Unreadable:
    """The training images that could not be read, each with its error."""

    def __init__(self, source: Source, channels: int):
        self._source, self._channels = source, channels
        self._errors: dict[int, UserError] = {}
        self._told = 0

    def add(self, index: int) -> None:
        """Counts an image, once.

        Raises:
            UserError: they are more than one in a thousand: then it is no accident.
        """
        if index in self._errors:
            return
        self._add(index, self._error(index))

    def _add(self, index: int, error: UserError) -> None:
        self._errors[index] = error
        if len(self._errors) * 1000 > len(self._source):
            raise UserError(
                f'{error}. {len(self._errors)} of the {len(self._source)} training images cannot be read, more than '
                f'one in a thousand: {REPLACE}'
            ) from error

    def _error(self, index: int) -> UserError:
        try:
            name = self._source[index].name
            decode(self._source[index].image, self._channels, name)
        except UserError as error:
            return error
        return UserError(f'{name} could not be read, and now it can')

    def errors(self) -> list[tuple[int, str]]:
        """Each image with what is wrong with it."""
        return [(index, str(error)) for index, error in self._errors.items()]

    def merge(self, errors: Iterable[list[tuple[int, str]]]) -> None:
        """Counts what other processes could not read.

        Args:
            errors: `errors()` of each of them.

        Raises:
            UserError: as `add`.
        """
        for index, error in itertools.chain.from_iterable(errors):
            if index not in self._errors:
                self._add(index, UserError(error))

    def news(self) -> list[str]:
        """A line for each image since the last call."""
        errors = list(self._errors.values())[self._told :]
        self._told = len(self._errors)
        return [f'{error}: the next image stands in for it' for error in errors]

    def __len__(self) -> int:
        return len(self._errors)


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in an epoch; what is left over is dropped, other examples each epoch.

    Raises:
        UserError: the split is smaller than one batch.
    """
    if images < batch_size:
        raise UserError(f'batch_size={batch_size} is more than the {images} training images: lower it')
    return images // batch_size


def train_batches(
    source: Source,
    share: Share,
    *,
    seed: int,
    start_step: int,
    image_size: int,
    channels: int,
    crop_scale: tuple[float, float] | tuple[()],
    repeats: int = 1,
    exact: bool = False,
    unreadable: Unreadable | None = None,
    workers: int = 0,
    waiting: Waiting = no_word,
) -> Iterator[Batch]:
    """Endless training batches of this process's rows, from `start_step` on, shuffled anew each epoch.

    An image that cannot be read is told to `unreadable`, and the next example of the split stands in for it, so that
    the batch does not depend on who loads it; without `unreadable` it is an error. Closing the iterator ends the
    decoding threads or processes.

    Args:
        source: the split.
        share: the rows of this process.
        seed: of order and crops.
        start_step: the first batch's number.
        image_size, channels: of the images.
        crop_scale: least and most share of the area that the random crop takes; () for the whole image.
        repeats: copies of each image in its batch, each cropped by itself (arXiv:1902.05509); an epoch keeps its
            length, and so holds only a part of the images.
        exact: decode and resize as Pillow does, as in `train_crop`.
        unreadable: collects what cannot be read.
        workers: processes that decode, as in `decoders`.
        waiting: hears of a batch that is not there yet.

    Raises:
        UserError: `crop_scale` is no range of shares, the split is smaller than a batch, or the batch no multiple of
            `repeats`; while iterating, an image that cannot be read, or too many of them, or a process that was killed.
    """
    if crop_scale and not (len(crop_scale) == 2 and 0 < crop_scale[0] <= crop_scale[1] <= 1):
        raise UserError(f'data.crop_scale must be two shares of the area, 0 < least ≤ most ≤ 1, not {crop_scale}')
    if share.batch_size % repeats:
        raise UserError(f'batch_size={share.batch_size} is no multiple of data.repeats={repeats}')
    replace = unreadable is not None
    rows = TrainRows(source, share, seed, image_size, channels, crop_scale, repeats, exact, replace)
    shape = (image_size, image_size, channels)
    batches = load_batches(
        rows,
        itertools.count(start_step),
        share.rows,
        shape,
        0 if rows.kept is not None else workers,
        lambda seconds, row: waiting(seconds, lambda: source.name(rows.index(row)[0])),
    )
    return _tell(batches, unreadable)


def is_kept(images: int, image_size: int, channels: int, crop_scale: tuple) -> bool:
    """Whether the images stay in memory once they are decoded: where epochs change nothing and they are small."""
    return not crop_scale and images * image_size**2 * channels <= KEPT_BYTES


class TrainRows:
    """Number of a row of this process → the row. Its arguments are those of `train_batches`.

    Attributes:
        kept: images that are the same in every epoch, where they are few and small.
    """

    def __init__(
        self,
        source: Source,
        share: Share,
        seed: int,
        image_size: int,
        channels: int,
        crop_scale: tuple[float, float] | tuple[()],
        repeats: int,
        exact: bool,
        replace: bool,
    ):
        self._source, self._share, self._seed = source, share, seed
        self._image_size, self._channels, self._crop_scale, self._exact = image_size, channels, crop_scale, exact
        self._distinct = share.batch_size // repeats
        self._steps = steps_per_epoch(len(source), share.batch_size)
        self._tries = len(source) // 1000 + 2 if replace else 1  # more in a row are too many anyway
        self.kept: dict[int, Row] | None = {} if is_kept(len(source), image_size, channels, crop_scale) else None

    def index(self, local: int) -> tuple[int, int, int]:
        """The example of a row, the epoch, and which copy of the example in its batch it is."""
        step, row = divmod(self._share.position(local), self._share.batch_size)
        epoch, batch = divmod(step, self._steps)
        # An image and its copies lie far apart in the batch: mixup takes neighbours.
        copy, place = divmod(row, self._distinct)
        return shuffled(batch * self._distinct + place, len(self._source), self._seed, epoch), epoch, copy

    def __call__(self, local: int) -> Row:
        index, epoch, copy = self.index(local)
        for skipped in range(self._tries):
            try:
                row = self._row((index + skipped) % len(self._source), epoch, copy)
            except UserError as error:
                if skipped == self._tries - 1:
                    raise UserError(f'{error}: {REPLACE}') from error
            else:
                return row | {'unreadable': np.int64(index if skipped else -1)}
        raise AssertionError('the last try raises or returns')

    def _row(self, index: int, epoch: int, copy: int) -> Row:
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        example = self._source[index]
        if self._crop_scale:
            pixels = train_crop(
                example.image,
                self._image_size,
                channels=self._channels,
                scale=self._crop_scale,
                seed=(self._seed, epoch, index, copy),
                exact=self._exact,
                name=example.name,
            )
        else:
            pixels = resize(decode(example.image, self._channels, example.name), self._image_size)
        row = {'image': pixels, 'label': np.int32(example.label)}
        if self.kept is not None:
            self.kept[index] = row
        return row


def shuffled(place: int, images: int, seed: int, epoch: int) -> int:
    """Which of so many images is at a place of an epoch's order, worked out without the rest of the order."""
    # Where images − 1 is a power of four, Grain's cipher may repeat a number: there it orders one more, passed over.
    largest = images if (images - 1).bit_count() == 1 else images - 1
    while True:
        place = grain.experimental.index_shuffle(place, largest, _epoch_seed(seed, epoch), ROUNDS)
        if place < images:
            return place


@functools.lru_cache(maxsize=2)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def _tell(batches: Iterator[Row], unreadable: Unreadable | None) -> Iterator[Batch]:
    """Takes out of the batches which images could not be read, and tells it."""
    with contextlib.closing(batches):
        for batch in batches:
            for index in batch.pop('unreadable'):
                if index >= 0:
                    unreadable.add(int(index))
            yield batch


def eval_batches(
    source: Source,
    share: Share,
    *,
    image_size: int,
    channels: int,
    crop_pct: float,
    squash: bool | None = None,
    resample: int = Image.Resampling.BICUBIC,
    waiting: Waiting = no_word,
) -> Iterator[Batch]:
    """This process's rows of a pass over the split, every example once; the last batch is filled up at weight 0.

    Images are prepared as by `eval_resize`; `waiting` hears of a batch that is not there yet.

    Raises:
        UserError: while iterating, an image that cannot be read.
    """

    none = () if source.many_labels else 0

    def load(local: int) -> Row:
        index = share.position(local)
        if index >= len(source):
            return _eval_row(np.zeros((image_size, image_size, channels), np.uint8), none, weight=0)
        try:
            example = source[index]
            image = decode(example.image, channels, example.name)
            pixels = eval_resize(image, image_size, crop_pct, squash=squash, resample=resample, name=example.name)
        except UserError as error:
            raise UserError(f'{error}: {REPLACE_IN_EVALUATION}') from error
        return _eval_row(pixels, example.label, weight=1)

    steps = range(-(-len(source) // share.batch_size))

    def name(row: int) -> str:
        return source.name(min(share.position(row), len(source) - 1))

    return load_batches(
        load,
        steps,
        share.rows,
        (image_size, image_size, channels),
        workers=0,
        waiting=lambda seconds, row: waiting(seconds, lambda: name(row)),
    )


def to_devices(batches: Iterator[Batch], sharding: jax.sharding.Sharding, ahead: int = 2) -> Iterator[Batch]:
    """Puts each process's rows on its devices as one global batch, `ahead` batches before they are asked for."""

    def put(batch: Batch) -> Batch:
        return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)

    queue = collections.deque(map(put, itertools.islice(batches, ahead)))
    while queue:
        queue.extend(map(put, itertools.islice(batches, 1)))
        yield queue.popleft()


def _eval_row(pixels: np.ndarray, label: int | tuple[int, ...], weight: float) -> Row:
    if isinstance(label, tuple):
        weight = weight if label else 0
        label = (*label, *(-1,) * (MOST_LABELS - len(label)))
    return {'image': pixels, 'label': np.int32(label), 'weight': np.float32(weight)}
