"""The batches of training and evaluation: order of the examples, share of each process, transfer to the devices.

The order is a function of seed and step. So there is no iterator state to save, and a run that resumes, on any number
of processes, gets the examples that it would have got without the interruption.
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
from convnext_jax.data.loading import WaitCallback, ignore_wait, load_batches
from convnext_jax.errors import UserError

HOW_TO_REPLACE = 'replace each with a readable file of that name, or delete them and choose another workdir'
HOW_TO_REPLACE_IN_EVALUATION = 'replace it with a readable file of that name, then run the same command again'
SHUFFLE_ROUNDS = 4  # rounds of the cipher that shuffles the examples; Grain's default
CACHE_BYTES = 2**28  # a split without random augmentation on the host stays in memory up to this size


@dataclasses.dataclass(frozen=True)
class Share:
    """The examples of every global batch that one process loads for its devices.

    Attributes:
        batch_size: examples in a global batch.
        indices: indices of this process's examples in a global batch, in order; None for all examples.
    """

    batch_size: int
    indices: Sequence[int] | None = None

    @property
    def local_batch_size(self) -> int:
        """Examples in this process's part of a global batch."""
        return self.batch_size if self.indices is None else len(self.indices)

    def position(self, local: int) -> int:
        """The global index of an example: its position in the examples of all global batches one after the other.

        Args:
            local: index of the example in the sequence of the examples that this process loads.
        """
        batch, index = divmod(local, self.local_batch_size)
        return batch * self.batch_size + (index if self.indices is None else self.indices[index])


class Unreadable:
    """The training examples that could not be read, with their errors."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        self._errors: dict[int, UserError] = {}
        self._reported = 0

    def add(self, index: int) -> None:
        """Adds the example with this index, unless it was added before.

        Raises:
            UserError: more than one example in a thousand is unreadable.
        """
        if index in self._errors:
            return
        self._add(index, self._error(index))

    def _add(self, index: int, error: UserError) -> None:
        self._errors[index] = error
        if len(self._errors) * 1000 > len(self._dataset):
            raise UserError(
                f'{error}. {len(self._errors)} of the {len(self._dataset)} training images cannot be read, more than '
                f'one in a thousand: {HOW_TO_REPLACE}'
            ) from error

    def _error(self, index: int) -> UserError:
        try:
            self._dataset.check(index)
        except UserError as error:
            return error
        return UserError(f'{self._dataset.name(index)} could not be read at the first attempt')

    def errors(self) -> list[tuple[int, str]]:
        """(index, error message) of each example."""
        return [(index, str(error)) for index, error in self._errors.items()]

    def merge(self, errors: Iterable[list[tuple[int, str]]]) -> None:
        """Adds the examples that other processes could not read.

        Args:
            errors: the `errors()` of each process.

        Raises:
            UserError: as for `add`.
        """
        for index, error in itertools.chain.from_iterable(errors):
            if index not in self._errors:
                self._add(index, UserError(error))

    def new_messages(self) -> list[str]:
        """A message for each example that was added since the last call."""
        errors = list(self._errors.values())[self._reported :]
        self._reported = len(self._errors)
        return [f'{error}: the next image is used instead' for error in errors]

    def __len__(self) -> int:
        return len(self._errors)


def steps_per_epoch(images: int, batch_size: int) -> int:
    """The number of complete batches in an epoch. The remaining examples, different ones in each epoch, are not used.

    Raises:
        UserError: the split is smaller than one batch.
    """
    if images < batch_size:
        raise UserError(f'batch_size={batch_size} is larger than the {images} training images: lower it')
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
    waiting: WaitCallback = ignore_wait,
) -> Generator[HostBatch, None, None]:
    """An endless iterator over this process's part of the training batches, shuffled again in each epoch.

    If `unreadable` is given, an example that cannot be read is added to it, and the next example of the split is used
    instead, so that the batch does not depend on the process that loads it. Closing the iterator ends the decoding
    threads or processes.

    Args:
        dataset: the split.
        share: the examples of a batch that this process loads.
        seed: seed of the order and of the random choices in `Dataset.load`.
        start_step: index of the first batch.
        repeats: copies of each example in its batch, each with its own random choices (arXiv:1902.05509). The number of
            batches in an epoch does not change, so that an epoch has only a part of the examples.
        unreadable: collects unreadable examples; None makes them an error.
        workers: number of decoding processes, as for `loading.decoders`.
        waiting: callback while a batch is pending.

    Yields:
        Name → array, (local batch size, …), with the dataset's features.

    Raises:
        UserError: the split is smaller than a batch, or the batch size is not a multiple of `repeats`; during the
            iteration: an example, or too many, cannot be read, or a process was killed.
    """
    if share.batch_size % repeats:
        raise UserError(f'batch_size={share.batch_size} must be a multiple of data.repeats={repeats}')
    examples = TrainExamples(dataset, share, seed, repeats, replace=unreadable is not None)
    batches = load_batches(
        examples,
        itertools.count(start_step),
        share.local_batch_size,
        dataset.features | {'unreadable': jax.ShapeDtypeStruct((), np.int32)},
        0 if examples.cache is not None else workers,
        waiting,
        examples.name,
    )
    return _report(batches, unreadable)


def fits_in_cache(dataset: Dataset) -> bool:
    """Whether loaded examples are kept in memory: if they are equal in each epoch, and the split is small."""
    size = sum(x.size * x.dtype.itemsize for x in dataset.features.values())
    return not dataset.random and len(dataset) * size <= CACHE_BYTES


class TrainExamples:
    """Index in the sequence of examples of this process → training example; arguments as for `train_batches`.

    Attributes:
        cache: index in the split → loaded example; None if examples are not cached.
    """

    def __init__(self, dataset: Dataset, share: Share, seed: int, repeats: int, replace: bool):
        self._dataset, self._share, self._seed = dataset, share, seed
        self._distinct = share.batch_size // repeats
        self._steps = steps_per_epoch(len(dataset), share.batch_size)
        self._tries = len(dataset) // 1000 + 2 if replace else 1  # more unreadable examples in a row are an error
        self.cache: dict[int, Example] | None = {} if fits_in_cache(dataset) else None

    def index(self, local: int) -> tuple[int, int, int]:
        """The index in the split, the epoch, and the number of the copy in its batch."""
        step, position = divmod(self._share.position(local), self._share.batch_size)
        epoch, batch = divmod(step, self._steps)
        # Copies of an example are far apart in the batch, because mixup uses neighbours.
        copy, position = divmod(position, self._distinct)
        return shuffled(batch * self._distinct + position, len(self._dataset), self._seed, epoch), epoch, copy

    def name(self, local: int) -> str:
        """The location of an example, for messages."""
        return self._dataset.name(self.index(local)[0])

    def __call__(self, local: int) -> Example:
        index, epoch, copy = self.index(local)
        for skipped in range(self._tries):
            try:
                example = self._load((index + skipped) % len(self._dataset), epoch, copy)
            except UserError as error:
                if skipped == self._tries - 1:
                    raise UserError(f'{error}: {HOW_TO_REPLACE}') from error
            else:
                return example | {'unreadable': np.int32(index if skipped else -1)}
        raise AssertionError('unreachable: the last try raises or returns')

    def _load(self, index: int, epoch: int, copy: int) -> Example:
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        example = self._dataset.load(index, (self._seed, epoch, index, copy))
        if self.cache is not None:
            self.cache[index] = example
        return example


def shuffled(position: int, images: int, seed: int, epoch: int) -> int:
    """The index of the image at a position in an epoch's random order; the whole order is not computed.

    Args:
        position: position in the order, at least 0 and below `images`.
        images: number of images.
        seed, epoch: they determine the order.
    """
    # Grain's cipher repeats an index if images − 1 is a large power of 4. For all powers of 2, one more index is
    # shuffled, and skipped.
    largest = images if (images - 1).bit_count() == 1 else images - 1
    while True:
        position = grain.experimental.index_shuffle(position, largest, _epoch_seed(seed, epoch), SHUFFLE_ROUNDS)
        if position < images:
            return position


@functools.lru_cache(maxsize=2)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def _report(
    batches: Generator[HostBatch, None, None], unreadable: Unreadable | None
) -> Generator[HostBatch, None, None]:
    """The batches without the feature `unreadable`. The examples that it names are added to `unreadable`, if given."""
    with contextlib.closing(batches):
        for batch in batches:
            for index in batch.pop('unreadable'):
                if unreadable is not None and index >= 0:
                    unreadable.add(int(index))
            yield batch


def eval_batches(
    dataset: Dataset, share: Share, waiting: WaitCallback = ignore_wait
) -> Generator[HostBatch, None, None]:
    """An iterator over this process's part of the evaluation batches, in which every example occurs once.

    The last batch is padded with zeros. Batches also have `weight`, (N,) float32, which is 0 for padding.

    Args:
        dataset: the split.
        share: the examples of a batch that this process loads.
        waiting: callback while a batch is pending.

    Yields:
        Name → array, (local batch size, …), with the features of `eval_features`.

    Raises:
        UserError: during the iteration, an example cannot be read.
    """
    features = eval_features(dataset)

    def load(local: int) -> Example:
        index = share.position(local)
        if index >= len(dataset):
            return {name: np.zeros(x.shape, x.dtype) for name, x in features.items()}
        try:
            return {'weight': np.float32(1)} | dataset.load(index)
        except UserError as error:
            raise UserError(f'{error}: {HOW_TO_REPLACE_IN_EVALUATION}') from error

    steps = range(-(-len(dataset) // share.batch_size))

    def name(local: int) -> str:
        return dataset.name(min(share.position(local), len(dataset) - 1))

    return load_batches(load, steps, share.local_batch_size, features, workers=0, waiting=waiting, name=name)


def eval_features(dataset: Dataset) -> Features:
    """Name → shape and dtype of the arrays of an example in `eval_batches`: the dataset's features and `weight`."""
    return {'weight': jax.ShapeDtypeStruct((), np.float32)} | dataset.features


def abstract_batch(features: Features, size: int, sharding: jax.sharding.Sharding) -> dict[str, jax.ShapeDtypeStruct]:
    """Name → shape, dtype and sharding of the arrays of a global batch with `size` examples."""
    return {name: jax.ShapeDtypeStruct((size, *x.shape), x.dtype, sharding=sharding) for name, x in features.items()}


def prefetch_to_device(
    batches: Iterator[HostBatch], sharding: jax.sharding.Sharding, ahead: int = 2
) -> Generator[Batch, None, None]:
    """Global batches on the devices, each transferred `ahead` batches before it is needed.

    Args:
        batches: this process's part of each batch.
        sharding: sharding of the global arrays.
        ahead: number of batches that are on the devices in advance.
    """

    def put(batch: HostBatch) -> Batch:
        return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), batch)

    queue = collections.deque(map(put, itertools.islice(batches, ahead)))
    while queue:
        queue.extend(map(put, itertools.islice(batches, 1)))
        yield queue.popleft()
