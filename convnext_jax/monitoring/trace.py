"""A trace of some steps, for TensorBoard's profile plugin and XProf."""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import jax

from convnext_jax.checkpoints.workdir import is_local
from convnext_jax.errors import UserError, first_line
from convnext_jax.paths import plain_path


@dataclasses.dataclass(frozen=True)
class ProfileWindow:
    """The steps to trace.

    Attributes:
        start: steps done since this start of the run, before the first that is traced.
        steps: how many.
    """

    start: int
    steps: int

    @classmethod
    def parse(cls, text: str) -> 'ProfileWindow':
        """Of START:STEPS.

        Raises:
            UserError: it is something else.
        """
        match = re.fullmatch(r'(\d+):([1-9]\d*)', text)
        if not match:
            raise UserError(
                f"--profile is START:STEPS, as 20:5 for five steps after the first twenty of this start, not '{text}'"
            )
        return cls(int(match[1]), int(match[2]))


class Trace:
    """Traces whole steps of process 0, whose devices do what all do. Its end finishes the trace, however it comes.

    Args:
        window: the steps; None for none.
        folder: where it goes: as plugins/profile/TIME in it, where TensorBoard looks for it.
        steps_left: of the run.
        paused: waits for the steps under way; around what takes time and is no training.
        say: prints a line.

    Raises:
        UserError: the run ends before the first of them.
    """

    def __init__(
        self,
        window: ProfileWindow | None,
        folder: Path,
        steps_left: int,
        paused: Callable[[], contextlib.AbstractContextManager],
        say: Callable[[str], None],
    ):
        if window and window.start >= steps_left:
            raise UserError(f'--profile={window.start}:{window.steps}, but only {steps_left} steps are left')
        self._window = window if jax.process_index() == 0 else None
        self._folder, self._paused, self._say = folder, paused, say
        self._steps = 0
        self._running = False

    def step(self, step: int) -> contextlib.AbstractContextManager:
        """To be around the dispatch of each step, given its number in the run."""
        done = self._steps
        self._steps += 1
        if self._window and done == self._window.start:
            with self._paused():
                folder = plain_path(self._folder) if is_local(self._folder) else self._folder
                jax.profiler.start_trace(folder)
            self._running = True
        if self._running and self._window and done == self._window.start + self._window.steps:
            with self._paused():
                self._finish()
        return jax.profiler.StepTraceAnnotation('train', step_num=step) if self._running else contextlib.nullcontext()

    def _finish(self) -> None:
        self._running = False
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:  # of a full disk, say: the run has better things to do than to end
            self._say(f'the trace could not be written to {self._folder}: {first_line(error)}')
        else:
            self._say(
                f'the trace is in {self._folder}/plugins/profile; pip install xprof, and xprof {self._folder} shows it'
            )

    def __enter__(self) -> 'Trace':
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._finish()
        elif self._window and self._steps <= self._window.start:
            self._say(f'no trace: the run stopped before it had done {self._window.start} steps')
