"""SIGTERM and Ctrl-C: a run that receives one saves a checkpoint and then stops."""

import contextlib
import dataclasses
import signal
from collections.abc import Generator

from convnext_jax.output import say_in_handler


class Stopped(Exception):
    """A signal stopped the run, which has saved its state.

    Args:
        by: the signal.
        step: step of the saved state; 0 if nothing is saved.

    Attributes:
        status: exit status of the process, 128 + signal number.
    """

    def __init__(self, by: signal.Signals, step: int):
        what = (
            f'at step {step}, which is saved: run the same command again to resume'
            if step
            else 'before a step was saved: run the same command again to start from the beginning'
        )
        super().__init__(f'stopped by {by.name} {what}')
        self.status = 128 + by


@dataclasses.dataclass
class Stop:
    """Holds the signal that asks the run to stop, once it is received."""

    received: signal.Signals | None = None

    def poll(self) -> bool:
        """Whether to stop. The loop calls it after each step and before each evaluation batch."""
        return self.received is not None


@contextlib.contextmanager
def stop_signal() -> Generator[Stop]:
    """Records the first SIGTERM or Ctrl-C, so that the loop can save and stop. A second one ends the process."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, _frame: object) -> None:
        stop.received = signal.Signals(number)
        restore()
        say_in_handler('stopping: the run saves after this step; send the signal again to stop without saving')

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()
