"""A batch that does not come: the run says where it waits, and a signal ends the wait."""

from collections.abc import Callable

import jax

from convnext_jax.output import say
from convnext_jax.runtime.stop import Stop

GIVES_UP = 5.0
"""Seconds that a run waits for a batch, in all, once a signal has come."""


class DataStalled(Exception):
    """A signal came while the run waited for data in vain."""


class StallMonitor:
    """Hears of a batch that is not there, as `loading.Waiting`: says where the wait is, again after twice the time.

    A read that hangs cannot be broken off, and may come back: the wait goes on, unless a signal ends it. Every process
    speaks for itself, on stderr.

    Args:
        seconds: before the first word.
        stop: the signal, if one came.
        at: says what the batch is for.

    Raises:
        DataStalled: when called, of a signal.
    """

    def __init__(self, seconds: float, stop: Stop, at: Callable[[], str]):
        self._seconds, self._stop, self._at = seconds, stop, at
        self._next = seconds

    def __call__(self, seconds: float, example: Callable[[], str]) -> None:
        if seconds < self._seconds:
            self._next = self._seconds
        elif seconds >= self._next:
            self._next = 2 * seconds
            host = f'process {jax.process_index()}: ' if jax.process_count() > 1 else ''
            line = f'{host}{self._at()}: no batch for {seconds:.0f} s, still waiting for {example()}'
            say(line, error=True)
        if self._stop.received and seconds >= GIVES_UP:
            raise DataStalled
