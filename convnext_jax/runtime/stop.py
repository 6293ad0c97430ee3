"""SIGTERM and Ctrl-C: the run saves first."""

import contextlib
import dataclasses
import signal
from collections.abc import Iterator

from convnext_jax.output import say_in_handler


class Stopped(Exception):
    """The run was told to stop, and saved first; `status` is the exit status that a shell expects."""

    def __init__(self, by: signal.Signals, step: int):
        what = (
            f'at step {step}, saved; the same command resumes it'
            if step
            else 'before a step was saved; the same command starts it again'
        )
        super().__init__(f'stopped by {by.name} {what}')
        self.status = 128 + by


@dataclasses.dataclass
class Stop:
    """The signal that came, if one did."""

    received: signal.Signals | None = None

    def poll(self) -> bool:
        """Whether to stop; the loop asks after each step and before each batch of an evaluation."""
        return self.received is not None


@contextlib.contextmanager
def stop_signal() -> Iterator[Stop]:
    """Notes SIGTERM and Ctrl-C for the loop to act on; the second one ends the process as usual."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: object) -> None:
        stop.received = signal.Signals(number)
        restore()
        say_in_handler('stops and saves at the next step; once more to stop without saving')

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()
