"""Examples → batches, by threads or by processes, ahead of need and in order."""

import atexit
import collections
import contextlib
import ctypes
import functools
import multiprocessing
import os
import pickle
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from convnext_jax.data.dataset import Example, Features, HostBatch
from convnext_jax.errors import UserError

HELD_BACK = {signal.SIGINT, signal.SIGTERM}

GRACE = 5.0
"""So many seconds a thread or process has to end its batch when nobody needs it any more; one that hangs in a read is
left to end with this process, or ended."""

OPEN: weakref.WeakSet[Generator] = weakref.WeakSet()
"""Of batches: closed at the end of the process, before Python takes itself apart, if nobody did it earlier."""

Waiting = Callable[[float, Callable[[], str]], None]
"""Called again and again while a batch is waited for, with the seconds so far and a function that names the first
example that is missing. What it raises ends the waiting."""


def no_word(_seconds: float, _what: object) -> None:
    """Waits and says nothing."""


def decoders(workers: int) -> tuple[int, int]:
    """Processes that decode (0: threads of this one do), and the threads of each.

    Threads decode as fast as processes while Python's lock does not hold them up, and it is taken for about a fifth of
    an image's time: few cores get threads, and many a process for every four.

    Args:
        workers: how many processes; −1 leaves it to the machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    if workers < 0:
        workers = cores // 4 if cores >= 8 else 0
    # Without processes one core is left to the loop: on small images one more thread only fights.
    return workers, max(cores // workers if workers else cores - 1, 1)


def load_batches(
    load: Callable[[int], Example],
    batches: Iterable[int],
    size: int,
    features: Features,
    workers: int,
    waiting: Waiting = no_word,
    name: Callable[[int], str] = str,
) -> Generator[HostBatch, None, None]:
    """Batch b holds examples b · `size` to (b + 1) · `size` − 1, stacked.

    Batches come in order, from threads and from processes.

    Closing the iterator, or an error, ends threads and processes, a thread that hangs in a read excepted: that one does
    not keep this process from its end.

    Args:
        load: number of an example → the example. Runs in several threads at once; for processes, it can be pickled.
        batches: their numbers, in order.
        size: examples of a batch.
        features: the arrays of an example.
        workers: as in `decoders`.
        waiting: is called while a batch is waited for.
        name: number of an example → its name, for `waiting`.

    Raises:
        UserError: as `load`, or there is too little shared memory, or a process was killed.
        ValueError: an example does not fit the features.
    """
    processes, threads = decoders(workers)
    if processes:
        loaded = _by_processes(load, batches, size, features, processes, threads, waiting, name)
    else:
        loaded = _by_threads(load, batches, size, features, threads, waiting, name)
    OPEN.add(loaded)
    return loaded


@atexit.register
def _close_open() -> None:
    for batches in list(OPEN):
        batches.close()


def _by_threads(
    load: Callable[[int], Example],
    batches: Iterable[int],
    size: int,
    features: Features,
    threads: int,
    waiting: Waiting,
    name: Callable[[int], str],
) -> Generator[HostBatch, None, None]:
    def fill(number: int, batch: HostBatch, loaded: np.ndarray) -> HostBatch:
        for place in range(size):
            _put(load(number * size + place), batch, place)
            loaded[place] = True
        return batch

    def submit(number: int) -> tuple[Future, int, np.ndarray]:
        batch = {feature: np.empty((size, *x.shape), x.dtype) for feature, x in features.items()}
        loaded = np.zeros(size, bool)
        return pool.submit(fill, number, batch, loaded), number, loaded

    with contextlib.closing(_Threads(threads)) as pool:
        for future, number, loaded in _ahead((functools.partial(submit, number) for number in batches), threads + 1):
            yield _result(future, waiting, lambda: name(number * size + int(loaded.argmin())))  # noqa: B023


class _Threads:
    """As ThreadPoolExecutor, but that a thread which hangs in a read does not keep the process from its end."""

    def __init__(self, count: int):
        self._calls: queue.SimpleQueue[tuple[Future, Callable] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable, *arguments: object) -> Future:
        future: Future = Future()
        self._calls.put((future, functools.partial(function, *arguments)))
        return future

    def _work(self) -> None:
        for future, call in iter(self._calls.get, None):
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

    def close(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()
        for _ in self._threads:
            self._calls.put(None)
        deadline = time.monotonic() + GRACE
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))


def _by_processes(
    load: Callable[[int], Example],
    batches: Iterable[int],
    size: int,
    features: Features,
    processes: int,
    threads: int,
    waiting: Waiting,
    name: Callable[[int], str],
) -> Generator[HostBatch, None, None]:
    """Each feature has a block of shared memory with a slot for each batch under way."""
    slots = processes + 2
    sizes = {feature: slots * size * x.size * x.dtype.itemsize for feature, x in features.items()}
    total = sum(sizes.values())
    free = max(
        shutil.disk_usage(folder).free for folder in ('/dev/shm', tempfile.gettempdir()) if os.path.isdir(folder)
    )
    if total > free:
        raise UserError(
            f'{processes} processes need {total / 1e9:.1f} GB of shared memory, and {free / 1e9:.1f} are free: '
            'enlarge /dev/shm, or lower data.workers; with 0 none is needed'
        )
    main = sys.modules['__main__']
    if not hasattr(main, '__spec__'):  # IPython's %run leaves it out, and multiprocessing reads it
        main.__spec__ = None
    spawn = multiprocessing.get_context('spawn')  # a fork would copy JAX's threads half
    # Such an array has no name that could be left behind, and is a file where /dev/shm is too small for it.
    memory = {feature: spawn.RawArray(ctypes.c_uint8, count) for feature, count in sizes.items()}
    flags = spawn.RawArray(ctypes.c_bool, slots * size)  # which examples are in their slot
    arrays, loaded = _views(memory, flags, features, slots)
    leash, end = spawn.Pipe(duplex=False)
    work = (pickle.dumps(load), memory, flags, features, slots, threads, leash)
    with (
        _closing(ProcessPoolExecutor(processes, spawn, initializer=_Worker.begin, initargs=work), end) as (pool, busy),
        # A thread of its own begins the processes: a signal would interrupt the main thread halfway through one, and
        # a process has this thread's blocked signals until it has imported what it needs to answer them.
        ThreadPoolExecutor(1, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, HELD_BACK)) as beginner,
    ):

        def submit(number: int, slot: int) -> tuple[Future, int, int]:
            loaded[slot] = False
            busy[slot] = beginner.submit(pool.submit, _Worker.fill, number, slot).result()
            return busy[slot], number, slot

        numbered = (functools.partial(submit, number, place % slots) for place, number in enumerate(batches))
        try:
            for future, number, slot in _ahead(numbered, slots - 1):
                _result(future, waiting, lambda: name(number * size + int(loaded[slot].argmin())))  # noqa: B023
                yield {feature: array[slot].copy() for feature, array in arrays.items()}
        except BrokenProcessPool as error:
            raise UserError(
                'a process that decodes images ended: out of memory, or begun by a script that trains without '
                "if __name__ == '__main__'? Lower data.workers; with 0 there are none"
            ) from error


def _views(
    memory: dict[str, ctypes.Array], flags: ctypes.Array, features: Features, slots: int
) -> tuple[HostBatch, np.ndarray]:
    """Shared memory as arrays: each feature's (slots, size, …), and (slots, size) bool, which examples are loaded."""
    # NumPy's stubs do not count arrays of ctypes among the buffers.
    loaded = np.frombuffer(flags, bool).reshape(slots, -1)  # type: ignore[call-overload]
    arrays = {
        feature: np.frombuffer(memory[feature], x.dtype).reshape(*loaded.shape, *x.shape)  # type: ignore[call-overload]
        for feature, x in features.items()
    }
    return arrays, loaded


class _Worker:
    """What a decoding process holds; in the training process it is not used."""

    load: Callable[[int], Example]
    arrays: HostBatch
    loaded: np.ndarray
    pool: Executor

    @classmethod
    def begin(
        cls,
        load: bytes,
        memory: dict[str, ctypes.Array],
        flags: ctypes.Array,
        features: Features,
        slots: int,
        threads: int,
        leash: Connection,
    ) -> None:
        # Ctrl-C and a launcher's SIGTERM, which Slurm sends to every process, are the training process's to answer: it
        # needs batches until all hosts have agreed on the step to stop at. This one ends with its leash.
        for number in HELD_BACK:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
        cls.load = staticmethod(pickle.loads(load))
        cls.arrays, cls.loaded = _views(memory, flags, features, slots)
        cls.pool = ThreadPoolExecutor(threads)
        threading.Thread(target=cls.end_with_parent, args=(leash,), daemon=True).start()

    @classmethod
    def end_with_parent(cls, leash: Connection) -> None:
        parent: Any = multiprocessing.parent_process()  # None only in the main process
        multiprocessing.connection.wait([parent.sentinel, leash])
        os._exit(1)

    @classmethod
    def fill(cls, number: int, slot: int) -> None:
        """Puts the examples of a batch into its slot."""
        batch, loaded = {feature: array[slot] for feature, array in cls.arrays.items()}, cls.loaded[slot]

        def put(place: int) -> None:
            _put(cls.load(number * len(loaded) + place), batch, place)
            loaded[place] = True

        list(cls.pool.map(put, range(len(loaded))))


def _put(example: Example, batch: HostBatch, place: int) -> None:
    """Copies an example into a batch.

    Raises:
        ValueError: it has other names, shapes or types than the batch.
    """
    given = {feature: (np.shape(x), np.asarray(x).dtype) for feature, x in example.items()}
    wanted = {feature: (array.shape[1:], array.dtype) for feature, array in batch.items()}
    if given != wanted:
        raise ValueError(f'an example does not fit the features of its data set: it is {given}, not {wanted}')
    for feature, x in example.items():
        batch[feature][place] = x


def _result(future: Future, waiting: Waiting, missing: Callable[[], str]) -> Any:
    """The future's result, waited for in short spells: between them signals are answered, and `waiting` is called."""
    began = time.monotonic()
    while not future.done():
        seconds = time.monotonic() - began
        wait([future], timeout=min(max(seconds / 20, 0.001), 0.1))
        if not future.done():
            waiting(time.monotonic() - began, missing)
    return future.result()


def _ahead(calls: Iterator[Callable], count: int) -> Iterator:
    """Results of the calls, each made when its result is the `count`-th of those to come."""
    made: collections.deque = collections.deque()
    for call in calls:
        made.append(call())
        if len(made) > count:
            yield made.popleft()
    yield from made


@contextlib.contextmanager
def _closing(pool: Executor, end: Connection) -> Iterator[tuple[Executor, dict[int, Future]]]:
    """The pool, and a place for the results that it is at; the closing of `end` ends its processes, hanging or not."""
    busy: dict[int, Future] = {}
    try:
        yield pool, busy
    finally:
        wait([future for future in busy.values() if not future.cancel()], GRACE)
        end.close()
        pool.shutdown(cancel_futures=True)
