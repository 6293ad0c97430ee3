"""The loader: threads or processes load examples in advance and collect them in batches, in a fixed order."""

import atexit
import collections
import contextlib
import ctypes
import functools
import multiprocessing.connection
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

HANDLED_BY_PARENT = {signal.SIGINT, signal.SIGTERM}

CLOSE_TIMEOUT = 5.0
"""Seconds that threads and processes have to finish their batches when the loader is closed. Then a thread that hangs
in a read is abandoned until this process ends, and a process is terminated."""

OPEN: weakref.WeakSet[Generator] = weakref.WeakSet()
"""The open batch iterators; an `atexit` hook closes them before the interpreter shuts down."""

WaitCallback = Callable[[float, Callable[[], str]], None]
"""A callback that is called repeatedly while a batch is pending. Its arguments are the duration of the wait in seconds,
and a function that returns the name of the first missing example. An exception that it raises cancels the wait."""


Done = queue.SimpleQueue[Future]
"""A queue that receives the future of a call once the call has ended.

The main thread waits for this queue and not for the future itself. If Ctrl-C interrupted the main thread while it takes
the lock of the future, the lock would never be released, and the thread that sets the result would block forever."""


def ignore_wait(_seconds: float, _what: object) -> None:
    """A wait callback that does nothing."""


def decoders(workers: int) -> tuple[int, int]:
    """The number of decoding processes (0 to decode in threads of this process), and of decoding threads in each.

    Decoding an image holds Python's global lock for about a fifth of the time. Therefore a machine with few cores
    decodes in threads, and one with eight or more in one process for every four cores.

    Args:
        workers: number of processes; −1 chooses it by the number of cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    if workers < 0:
        workers = cores // 4 if cores >= 8 else 0
    # Without processes, one core stays free for the training loop, which would compete with one more thread.
    return workers, max(cores // workers if workers else cores - 1, 1)


def load_batches(
    load: Callable[[int], Example],
    batches: Iterable[int],
    size: int,
    features: Features,
    workers: int,
    waiting: WaitCallback = ignore_wait,
    name: Callable[[int], str] = str,
) -> Generator[HostBatch, None, None]:
    """An iterator over batches in order; batch b consists of examples b · `size` to (b + 1) · `size` − 1.

    Closing the iterator, or an error, ends the threads and processes. A thread that hangs in a read is abandoned; it
    does not prevent this process from ending.

    Args:
        load: index of an example → the example. Several threads call it concurrently. With processes it must be
            picklable.
        batches: indices of the batches, in order.
        size: number of examples in a batch.
        features: name → shape and dtype of the arrays of an example.
        workers: as for `decoders`.
        waiting: callback while a batch is pending.
        name: index of an example → its name, for `waiting`.

    Yields:
        Name → array, (size, …).

    Raises:
        UserError: as for `load`, or there is too little shared memory, or a process was killed.
        ValueError: an example does not match the features.
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
    waiting: WaitCallback,
    name: Callable[[int], str],
) -> Generator[HostBatch, None, None]:
    def fill(number: int, batch: HostBatch, loaded: np.ndarray) -> HostBatch:
        for position in range(size):
            _put(load(number * size + position), batch, position)
            loaded[position] = True
        return batch

    def submit(number: int) -> tuple[Done, int, np.ndarray]:
        batch = {feature: np.empty((size, *x.shape), x.dtype) for feature, x in features.items()}
        loaded = np.zeros(size, bool)
        return pool.submit(fill, number, batch, loaded), number, loaded

    with contextlib.closing(_Threads(threads)) as pool:
        for done, number, loaded in _prefetch((functools.partial(submit, number) for number in batches), threads + 1):
            yield _result(done, waiting, lambda: name(number * size + int(loaded.argmin())))  # noqa: B023


class _Threads:
    """A thread pool with daemon threads: a thread that hangs in a read does not prevent the process from ending."""

    def __init__(self, count: int):
        self._calls: queue.SimpleQueue[tuple[Done, Callable] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable, *arguments: object) -> Done:
        done: Done = queue.SimpleQueue()
        self._calls.put((done, functools.partial(function, *arguments)))
        return done

    def _work(self) -> None:
        for done, call in iter(self._calls.get, None):
            future: Future = Future()
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            done.put(future)

    def close(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()
        for _ in self._threads:
            self._calls.put(None)
        deadline = time.monotonic() + CLOSE_TIMEOUT
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))


def _by_processes(
    load: Callable[[int], Example],
    batches: Iterable[int],
    size: int,
    features: Features,
    processes: int,
    threads: int,
    waiting: WaitCallback,
    name: Callable[[int], str],
) -> Generator[HostBatch, None, None]:
    """`load_batches` with processes. Each feature has a block of shared memory with a slot for each pending batch."""
    slots = processes + 2
    sizes = {feature: slots * size * x.size * x.dtype.itemsize for feature, x in features.items()}
    total = sum(sizes.values())
    free = max(
        shutil.disk_usage(folder).free for folder in ('/dev/shm', tempfile.gettempdir()) if os.path.isdir(folder)
    )
    if total > free:
        raise UserError(
            f'{processes} processes need {total / 1e9:.1f} GB of shared memory, but only {free / 1e9:.1f} GB are free: '
            'enlarge /dev/shm, or reduce data.workers (0 needs no shared memory)'
        )
    main = sys.modules['__main__']
    if not hasattr(main, '__spec__'):  # missing under IPython's %run, but multiprocessing reads it
        main.__spec__ = None
    spawn = multiprocessing.get_context('spawn')  # a forked process would have JAX's locks without its threads
    # A RawArray has no name that would remain after a crash, and uses a file if /dev/shm is too small.
    memory = {feature: spawn.RawArray(ctypes.c_uint8, count) for feature, count in sizes.items()}
    flags = spawn.RawArray(ctypes.c_bool, slots * size)  # whether each example of a slot is loaded
    arrays, loaded = _views(memory, flags, features, slots)
    parent_end, stop_end = spawn.Pipe(duplex=False)
    work = (pickle.dumps(load), memory, flags, features, slots, threads, parent_end)
    workers = ProcessPoolExecutor(processes, spawn, initializer=_Worker.start, initargs=work)
    with (
        _closing(workers, stop_end) as (pool, busy),
        # A separate thread starts the processes, because a signal could interrupt the main thread during a start. The
        # signals are blocked in this thread, and in the processes that it starts until `_Worker.start` ignores them.
        ThreadPoolExecutor(
            1, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, HANDLED_BY_PARENT)
        ) as starter,
    ):

        def start(number: int, slot: int, done: Done) -> None:
            try:
                busy[slot] = pool.submit(_Worker.fill, number, slot)
            except BrokenProcessPool as error:
                busy[slot] = Future()
                busy[slot].set_exception(error)
            busy[slot].add_done_callback(done.put)

        def submit(number: int, slot: int) -> tuple[Done, int, int]:
            loaded[slot] = False
            done: Done = queue.SimpleQueue()
            starter.submit(start, number, slot, done)
            return done, number, slot

        numbered = (functools.partial(submit, number, count % slots) for count, number in enumerate(batches))
        try:
            for done, number, slot in _prefetch(numbered, slots - 1):
                _result(done, waiting, lambda: name(number * size + int(loaded[slot].argmin())))  # noqa: B023
                yield {feature: array[slot].copy() for feature, array in arrays.items()}
        except BrokenProcessPool as error:
            raise UserError(
                'a decoding process has ended, because memory ran out or because the script that calls train() lacks '
                "if __name__ == '__main__': reduce data.workers (0 starts no processes)"
            ) from error


def _views(
    memory: dict[str, ctypes.Array], flags: ctypes.Array, features: Features, slots: int
) -> tuple[HostBatch, np.ndarray]:
    """The shared memory as arrays: one per feature, (slots, size, …), and flags of loaded examples, (slots, size)."""
    loaded = np.frombuffer(memoryview(flags), bool).reshape(slots, -1)
    arrays = {
        feature: np.frombuffer(memoryview(memory[feature]), x.dtype).reshape(*loaded.shape, *x.shape)
        for feature, x in features.items()
    }
    return arrays, loaded


class _Worker:
    """The state of a decoding process; the training process does not use it."""

    load: Callable[[int], Example]
    arrays: HostBatch
    loaded: np.ndarray
    pool: Executor

    @classmethod
    def start(
        cls,
        load: bytes,
        memory: dict[str, ctypes.Array],
        flags: ctypes.Array,
        features: Features,
        slots: int,
        threads: int,
        parent_end: Connection,
    ) -> None:
        # Only the training process handles Ctrl-C and SIGTERM, although Slurm sends SIGTERM to every process: the
        # training process needs batches until all hosts have agreed on the last step. This process ends when the
        # training process closes the pipe.
        for number in HANDLED_BY_PARENT:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_BY_PARENT)
        cls.load = staticmethod(pickle.loads(load))
        cls.arrays, cls.loaded = _views(memory, flags, features, slots)
        cls.pool = ThreadPoolExecutor(threads)
        threading.Thread(target=cls.end_with_parent, args=(parent_end,), daemon=True).start()

    @classmethod
    def end_with_parent(cls, parent_end: Connection) -> None:
        parent: Any = multiprocessing.parent_process()  # None only in the main process
        multiprocessing.connection.wait([parent.sentinel, parent_end])
        os._exit(1)

    @classmethod
    def fill(cls, number: int, slot: int) -> None:
        """Loads the examples of a batch into its slot."""
        batch, loaded = {feature: array[slot] for feature, array in cls.arrays.items()}, cls.loaded[slot]

        def put(position: int) -> None:
            _put(cls.load(number * len(loaded) + position), batch, position)
            loaded[position] = True

        list(cls.pool.map(put, range(len(loaded))))


def _put(example: Example, batch: HostBatch, position: int) -> None:
    """Copies an example into a batch.

    Raises:
        ValueError: the names, shapes or dtypes of the example do not match the batch.
    """
    given = {feature: (np.shape(x), np.asarray(x).dtype) for feature, x in example.items()}
    wanted = {feature: (array.shape[1:], array.dtype) for feature, array in batch.items()}
    if given != wanted:
        raise ValueError(f'an example does not match the features of its data set: it is {given}, not {wanted}')
    for feature, x in example.items():
        batch[feature][position] = x


def _result(done: Done, waiting: WaitCallback, missing: Callable[[], str]) -> Any:
    """The result of a call; between short waits for it, signals are handled and `waiting` is called."""
    start = time.monotonic()
    while True:
        seconds = time.monotonic() - start
        try:
            future = done.get(timeout=min(max(seconds / 20, 0.001), 0.1))
        except queue.Empty:
            waiting(time.monotonic() - start, missing)
        else:
            return future.result()


def _prefetch(calls: Iterator[Callable], count: int) -> Iterator:
    """The results of the calls, in order. Before it yields a result, it has made the next `count` calls."""
    pending: collections.deque = collections.deque()
    for call in calls:
        pending.append(call())
        if len(pending) > count:
            yield pending.popleft()
    yield from pending


@contextlib.contextmanager
def _closing(pool: Executor, stop_end: Connection) -> Generator[tuple[Executor, dict[int, Future]]]:
    """The pool, and a dict for its pending results. On exit `stop_end` is closed, which ends even hanging processes."""
    busy: dict[int, Future] = {}
    try:
        yield pool, busy
    finally:
        wait([future for future in busy.values() if not future.cancel()], CLOSE_TIMEOUT)
        stop_end.close()
        pool.shutdown(cancel_futures=True)
