"""StallMonitor: reports when the input pipeline delivers no batch, and lets a signal end the wait."""

from collections.abc import Callable

import jax

from convnext_jax.output import say
from convnext_jax.runtime.stop import Stop

MAX_WAIT_AFTER_SIGNAL = 5.0
"""After a signal, a wait for a batch ends when it has lasted this many seconds in total."""


class DataStalled(Exception):
    """A signal was received while the run waited for data."""


class StallMonitor:
    """A wait callback (`loading.WaitCallback`) that reports a stalled input pipeline, with exponential back-off.

    A blocked read cannot be cancelled, and may succeed later, so the run keeps waiting until a signal is received.
    Every process reports its own waits on stderr.

    Args:
        seconds: time until the first report.
        stop: holds the signal once it is received.
        at: returns a description of the batch that the run waits for.
    """

    def __init__(self, seconds: float, stop: Stop, at: Callable[[], str]):
        self._seconds, self._stop, self._at = seconds, stop, at
        self._next = seconds

    def __call__(self, seconds: float, example: Callable[[], str]) -> None:
        """Reports the wait if it is time to.

        Args:
            seconds: duration of the wait so far.
            example: returns the name of the first example that is not loaded yet.

        Raises:
            DataStalled: a signal was received, and the wait has lasted `MAX_WAIT_AFTER_SIGNAL`.
        """
        if seconds < self._seconds:
            self._next = self._seconds
        elif seconds >= self._next:
            self._next = 2 * seconds
            host = f'process {jax.process_index()}: ' if jax.process_count() > 1 else ''
            line = f'{host}{self._at()}: no batch for {seconds:.0f} s, still waiting for {example()}'
            say(line, error=True)
        if self._stop.received and seconds >= MAX_WAIT_AFTER_SIGNAL:
            raise DataStalled
