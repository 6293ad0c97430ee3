"""Profiles some training steps, for TensorBoard's profile plugin and XProf."""

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
    """The steps to profile.

    Attributes:
        start: number of steps that this process runs before the first profiled step.
        steps: number of profiled steps.
    """

    start: int
    steps: int

    @classmethod
    def parse(cls, text: str) -> 'ProfileWindow':
        """Parses START:STEPS, for example '20:5'.

        Raises:
            UserError: the text has another form.
        """
        match = re.fullmatch(r'(\d+):([1-9]\d*)', text)
        if not match:
            raise UserError(
                f"--profile needs START:STEPS, not '{text}'; for example, 20:5 profiles five steps after the first 20"
            )
        return cls(int(match[1]), int(match[2]))


class Trace:
    """Profiles whole steps on process 0. Use as a context manager: leaving it finishes the trace, also after an error.

    Args:
        window: the steps to profile; None to profile no steps.
        folder: the trace is written to FOLDER/plugins/profile/TIME, where TensorBoard finds it.
        steps_left: number of steps until the end of the run.
        paused: a context manager that waits for the steps in flight, and excludes its body from the step times.
        say: prints a line.

    Raises:
        UserError: the run ends before the first profiled step.
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
            raise UserError(
                f'--profile={window.start}:{window.steps}, but only {steps_left} steps are left: lower START'
            )
        self._window = window if jax.process_index() == 0 else None
        self._folder, self._paused, self._say = folder, paused, say
        self._steps = 0
        self._running = False

    def step(self, step: int) -> contextlib.AbstractContextManager:
        """The context in which to dispatch a step.

        Args:
            step: number of steps of the run before this one.
        """
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
        except (OSError, RuntimeError) as error:  # for example a full disk, which must not end the run
            self._say(f'the trace could not be written to {self._folder}: {first_line(error)}')
        else:
            self._say(
                f'the trace is in {self._folder}/plugins/profile; to view it: pip install xprof; xprof {self._folder}'
            )

    def __enter__(self) -> 'Trace':
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._finish()
        elif self._window and self._steps <= self._window.start:
            self._say(f'no trace: the run stopped before step {self._window.start + 1} of this process')
