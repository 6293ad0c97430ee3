"""One global batch after another on the devices: which examples, in which order, decoded ahead of need.

Everything follows from (seed, step): there is no iterator state to save, and a run that resumes at a step, on any
number of processes, sees the examples that the unbroken run would have seen.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence

import grain
import jax
import numpy as np

from convnext_jax.data.dataset import Batch, Dataset, Example, Features, HostBatch
from convnext_jax.data.loading import Waiting, load_batches, no_word
from convnext_jax.errors import UserError

REPLACE = 'replace each by a readable file of that name, or delete them and take another workdir'
REPLACE_IN_EVALUATION = 'replace it by a readable file of that name, and run the same command again'
ROUNDS = 4  # of the cipher that shuffles, as Grain itself takes
CACHE_BYTES = 2**28  # a split whose examples are the same in every epoch stays in memory if it takes no more than this


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
    """The training examples that could not be read, each with its error."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        self._errors: dict[int, UserError] = {}
        self._told = 0

    def add(self, index: int) -> None:
        """Counts an example, once.

        Raises:
            UserError: they are more than one in a thousand: then it is no accident.
        """
        if index in self._errors:
            return
        self._add(index, self._error(index))

    def _add(self, index: int, error: UserError) -> None:
        self._errors[index] = error
        if len(self._errors) * 1000 > len(self._dataset):
            raise UserError(
                f'{error}. {len(self._errors)} of the {len(self._dataset)} training images cannot be read, more than '
                f'one in a thousand: {REPLACE}'
            ) from error

    def _error(self, index: int) -> UserError:
        try:
            self._dataset.check(index)
        except UserError as error:
            return error
        return UserError(f'{self._dataset.name(index)} could not be read, and now it can')

    def errors(self) -> list[tuple[int, str]]:
        """Each example with what is wrong with it."""
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
        """A line for each example since the last call."""
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
    dataset: Dataset,
    share: Share,
    *,
    seed: int,
    start_step: int,
    repeats: int = 1,
    unreadable: Unreadable | None = None,
    workers: int = 0,
    waiting: Waiting = no_word,
) -> Generator[HostBatch, None, None]:
    """Endless training batches of this process's rows, from `start_step` on, in a new order in each epoch.

    An example that cannot be read is reported to `unreadable`, and the next example of the split stands in for it, so
    that the batch does not depend on who loads it; without `unreadable` it is an error. Closing the iterator ends the
    decoding threads or processes.

    Args:
        dataset: the split.
        share: the rows of this process.
        seed: of the order and of the examples' draws.
        start_step: the first batch's number.
        repeats: copies of each example in its batch, each with its own draw (arXiv:1902.05509); an epoch keeps its
            length, and so holds only a part of the examples.
        unreadable: collects what cannot be read.
        workers: processes that decode, as in `decoders`.
        waiting: is called while a batch is waited for.

    Raises:
        UserError: the split is smaller than a batch, or the batch is not a multiple of `repeats`; while iterating, an
            example cannot be read, or too many of them, or a process was killed.
    """
    if share.batch_size % repeats:
        raise UserError(f'batch_size={share.batch_size} is no multiple of data.repeats={repeats}')
    examples = TrainExamples(dataset, share, seed, repeats, replace=unreadable is not None)
    batches = load_batches(
        examples,
        itertools.count(start_step),
        share.rows,
        dataset.features | {'unreadable': jax.ShapeDtypeStruct((), np.int32)},
        0 if examples.kept is not None else workers,
        waiting,
        examples.name,
    )
    return _report(batches, unreadable)


def fits_in_cache(dataset: Dataset) -> bool:
    """Whether the examples stay in memory once they are loaded: each epoch has the same, and they are small."""
    size = sum(x.size * x.dtype.itemsize for x in dataset.features.values())
    return not dataset.random and len(dataset) * size <= CACHE_BYTES


class TrainExamples:
    """Loads a training example by its number in this process's sequence; arguments as `train_batches`.

    Attributes:
        kept: the examples loaded so far, if they are kept.
    """

    def __init__(self, dataset: Dataset, share: Share, seed: int, repeats: int, replace: bool):
        self._dataset, self._share, self._seed = dataset, share, seed
        self._distinct = share.batch_size // repeats
        self._steps = steps_per_epoch(len(dataset), share.batch_size)
        self._tries = len(dataset) // 1000 + 2 if replace else 1  # more in a row are too many anyway
        self.kept: dict[int, Example] | None = {} if fits_in_cache(dataset) else None

    def index(self, local: int) -> tuple[int, int, int]:
        """The index in the split, the epoch, and which copy of the example in its batch it is."""
        step, row = divmod(self._share.position(local), self._share.batch_size)
        epoch, batch = divmod(step, self._steps)
        # An example and its copies lie far apart in the batch: mixup takes neighbours.
        copy, place = divmod(row, self._distinct)
        return shuffled(batch * self._distinct + place, len(self._dataset), self._seed, epoch), epoch, copy

    def name(self, local: int) -> str:
        return self._dataset.name(self.index(local)[0])

    def __call__(self, local: int) -> Example:
        index, epoch, copy = self.index(local)
        for skipped in range(self._tries):
            try:
                example = self._load((index + skipped) % len(self._dataset), epoch, copy)
            except UserError as error:
                if skipped == self._tries - 1:
                    raise UserError(f'{error}: {REPLACE}') from error
            else:
                return example | {'unreadable': np.int32(index if skipped else -1)}
        raise AssertionError('the last try raises or returns')

    def _load(self, index: int, epoch: int, copy: int) -> Example:
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        example = self._dataset.load(index, (self._seed, epoch, index, copy))
        if self.kept is not None:
            self.kept[index] = example
        return example


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


def _report(
    batches: Generator[HostBatch, None, None], unreadable: Unreadable | None
) -> Generator[HostBatch, None, None]:
    """Takes out of the batches which examples could not be read, and reports them."""
    with contextlib.closing(batches):
        for batch in batches:
            for index in batch.pop('unreadable'):
                if unreadable is not None and index >= 0:
                    unreadable.add(int(index))
            yield batch


def eval_batches(dataset: Dataset, share: Share, waiting: Waiting = no_word) -> Generator[HostBatch, None, None]:
    """This process's rows of a pass over the split, every example once; zeros of weight 0 fill up the last batch.

    A batch also has `weight` (N,) float32, which is 0 where a row only fills up the batch.

    Args:
        dataset: the split.
        share: the rows of this process.
        waiting: is called while a batch is waited for.

    Raises:
        UserError: while iterating, an example cannot be read.
    """
    features = eval_features(dataset)

    def load(local: int) -> Example:
        index = share.position(local)
        if index >= len(dataset):
            return {name: np.zeros(x.shape, x.dtype) for name, x in features.items()}
        try:
            return {'weight': np.float32(1)} | dataset.load(index)
        except UserError as error:
            raise UserError(f'{error}: {REPLACE_IN_EVALUATION}') from error

    steps = range(-(-len(dataset) // share.batch_size))

    def name(local: int) -> str:
        return dataset.name(min(share.position(local), len(dataset) - 1))

    return load_batches(load, steps, share.rows, features, workers=0, waiting=waiting, name=name)


def eval_features(dataset: Dataset) -> Features:
    """The arrays of an example in the batches of `eval_batches`."""
    return {'weight': jax.ShapeDtypeStruct((), np.float32)} | dataset.features


def abstract_batch(features: Features, size: int, sharding: jax.sharding.Sharding) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a global batch, with its sharding."""
    return {name: jax.ShapeDtypeStruct((size, *x.shape), x.dtype, sharding=sharding) for name, x in features.items()}


def prefetch_to_device(
    batches: Iterator[HostBatch], sharding: jax.sharding.Sharding, ahead: int = 2
) -> Generator[Batch, None, None]:
    """Puts each process's rows on its devices as one global batch, `ahead` batches before they are asked for."""

    def put(batch: HostBatch) -> Batch:
        return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)

    queue = collections.deque(map(put, itertools.islice(batches, ahead)))
    while queue:
        queue.extend(map(put, itertools.islice(batches, 1)))
        yield queue.popleft()
