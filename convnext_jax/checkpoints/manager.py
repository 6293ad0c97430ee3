"""Checkpoints: saves the state of a run in the background, keeps the newest and the best, and reports failures."""

import contextlib
import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from convnext_jax.checkpoints.checkpoint import DamagedCheckpoint, contents, read_manifest, restore
from convnext_jax.checkpoints.state import TrainState
from convnext_jax.checkpoints.workdir import checkpoints_for_orbax, is_local
from convnext_jax.errors import UserError, first_line
from convnext_jax.output import say
from convnext_jax.runtime.processes import all_gather_objects, is_main_process, is_multiprocess

UNFINISHED = '.orbax-checkpoint-tmp'
"""Part of the name of an Orbax checkpoint folder while it is written. The name of a finished folder is the step."""


class _Manager(ocp.CheckpointManager):
    """A CheckpointManager that exposes the error of a background write immediately.

    The base class raises the error only after the other processes have timed out at a barrier.

    Attributes:
        write_error: the error of this process in the save in progress.
    """

    write_error: Exception | None = None

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.write_error = error
            raise

    def reached_preemption(self, step: int) -> bool:
        """Disabled: the training loop itself polls JAX's preemption sync point and decides when to save."""
        return False


class NewestAndBest:
    """An Orbax preservation policy: keeps the newest checkpoints and the checkpoint with the highest score.

    The scores are stored here, not as Orbax metrics: Orbax fails at start if one of its metrics files is damaged.

    Args:
        newest: number of newest checkpoints to keep.

    Attributes:
        scores: step → score, for the checkpoints that were evaluated.
    """

    def __init__(self, newest: int):
        self.scores: dict[int, float] = {}
        self._newest = newest

    def should_preserve(self, checkpoints: Sequence, *, context: object) -> list[bool]:
        """Whether to keep each checkpoint. `checkpoints` are in ascending order of steps."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        scored = [step for step in steps if step in self.scores]
        best = max(scored, key=lambda step: (self.scores[step], step), default=None)
        return [step == best or step in steps[-self._newest :] for step in steps]


class NotSaved(UserError):
    """The newest state of the run could not be saved."""


class NotWritable(Exception):
    """The directory is full or read-only. All processes raise this error before any of them starts to write."""


class Checkpoints:
    """The checkpoints of one workdir. Use as a context manager: leaving it waits for the save in progress.

    If a save fails, immediately or in the background, the failure is reported, the files of the save are removed, and
    earlier checkpoints are kept. In a job of several processes, a failure after they have started to write raises
    `NotSaved`.

    Args:
        directory: workdir/checkpoints.
        keep: number of newest checkpoints to keep.
        best_metric: name of the metric by which the best checkpoint is kept as well.
        lowest: whether lower values of the metric are better.
        report: called with a line about each failed save.

    Attributes:
        failed: step → reason, for the saves that failed since the last successful one.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        best_metric: str,
        lowest: bool = False,
        report: Callable[[str], None] = say,
    ):
        self._kept = NewestAndBest(keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._kept, cleanup_tmp_directories=True)
        self.directory = directory
        self.failed: dict[int, str] = {}
        self._best_metric, self._sign, self._report = best_metric, -1 if lowest else 1, report
        self._saving_step: int | None = None
        self._manager = _Manager(checkpoints_for_orbax(directory), options=options)
        for step in self.steps():
            with contextlib.suppress(DamagedCheckpoint):
                self._note_score(step, read_manifest(directory, step)['metrics'])

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind and is_multiprocess():
            return  # the save in progress may wait for processes that have ended
        self.wait()
        try:
            self._manager.close()
        except Exception:  # Orbax may raise an error again that was already reported
            if not self.failed:
                raise

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in ascending order, as process 0 sees them."""
        return all_gather_objects(sorted(map(int, self._manager.all_steps())))[0]

    def save(self, state: TrainState, about: dict, metrics: dict[str, float] | None) -> None:
        """Starts a save in the background. After the call, the buffers of the state may be donated.

        Args:
            state: the training state.
            about: JSON to store in the manifest, such as the config.
            metrics: the results of an evaluation of this state, or None.

        Raises:
            NotSaved: the save failed on this process after all processes had started to write.
        """
        self.wait()
        step = int(state.step)
        if self.failed:
            self._remove_unfinished()
            self.failed.pop(step, None)
        items, manifest = contents(state, about, metrics)
        args: dict[str, ocp.args.CheckpointArgs] = {'manifest': ocp.args.JsonSave(manifest)}
        args |= {item: ocp.args.StandardSave(arrays) for item, arrays in items.items() if arrays}
        self._saving_step = step
        self._note_score(step, metrics)
        try:
            self._check_writable(sum(array.nbytes for arrays in items.values() for array in arrays.values()))
            self._manager.save(
                step, args=ocp.args.Composite(**args), force=True
            )  # force: Orbax's save policy is unused
        except Exception as error:  # Orbax and TensorStore have no common error class for a full disk
            self._fail(error)

    def check(self) -> None:
        """Reports a failure of the save in progress, if it has failed; does not block."""
        if self._saving_step is not None and (self._manager.write_error or not self._manager.is_saving_in_progress()):
            self.wait()

    def wait(self) -> None:
        """Blocks until the save in progress, if there is one, has finished or failed."""
        if self._saving_step is None:
            return
        while is_multiprocess() and self._manager.is_saving_in_progress():
            if self._manager.write_error:
                self._fail(self._manager.write_error)
            time.sleep(0.02)
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as in `save`
            self._fail(error)
        self._saving_step = None

    def last_saved(self) -> str:
        """A part of a sentence that names the newest checkpoint, for messages."""
        steps = self.steps()
        return f'the last checkpoint is of step {steps[-1]}' if steps else 'there is no checkpoint yet'

    def _note_score(self, step: int, metrics: dict[str, float] | None) -> None:
        if metrics and metrics[self._best_metric] is not None:  # in a manifest, None stands for NaN or infinity
            self._kept.scores[step] = self._sign * metrics[self._best_metric]

    def _fail(self, error: Exception) -> None:
        step, self._saving_step, self._manager.write_error = self._saving_step, None, None
        assert step is not None  # only a save in progress can fail
        if is_multiprocess() and isinstance(error, jax.errors.JaxRuntimeError):
            raise error  # another process has ended
        if is_multiprocess() and not isinstance(error, NotWritable):  # the others already wait for this process
            raise NotSaved(f'step {step} could not be saved to {self.directory}: {_reason(error)}') from error
        self.failed[step] = _reason(error)
        self._kept.scores.pop(step, None)
        self._remove_unfinished()
        self._manager.reload()  # Orbax has already dropped the checkpoints that this save would have replaced
        self._report(f'step {step} could not be saved: {self.failed[step]}; {self.last_saved()}')

    def _remove_unfinished(self) -> None:
        if is_main_process():
            for folder in self.directory.glob(f'*{UNFINISHED}*'):
                shutil.rmtree(folder, ignore_errors=True)

    def _check_writable(self, needed: int) -> None:
        problem = next(filter(None, all_gather_objects(self._problem(needed))), None)
        if problem:
            raise NotWritable(problem)

    def _problem(self, needed: int) -> str | None:
        """The reason why this process cannot write `needed` bytes; None if the check finds no reason."""
        if not is_local(self.directory):
            return None
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            sizes = f'a checkpoint needs {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free'
            return f'the disk of {self.directory} is full: {sizes}'
        return None if os.access(self.directory, os.W_OK) else f'no permission to write to {self.directory}'

    def restore_newest(self, like: TrainState) -> tuple[TrainState, list[str]] | None:
        """Restores the newest checkpoint that is not damaged.

        If newer checkpoints are damaged, they are moved to workdir/damaged. Nothing is deleted.

        Args:
            like: a state with the expected shapes, dtypes and shardings (`jax.ShapeDtypeStruct`).

        Returns:
            The state and a message about each damaged checkpoint, or None if there is no checkpoint.

        Raises:
            UserError: the checkpoint is from another model or optimizer, or all checkpoints are damaged.
        """
        damaged = {}
        for step in reversed(self.steps()):
            try:
                state = restore(self.directory, step, like)
            except DamagedCheckpoint as error:
                damaged[step] = error
            else:
                return state, [self._set_aside(step, error) for step, error in damaged.items()]
        if damaged:
            reasons = '; '.join(f'{step}: {error}' for step, error in damaged.items())
            raise UserError(f'all checkpoints in {self.directory} are damaged ({reasons}): use another workdir')
        return None

    def _set_aside(self, step: int, error: DamagedCheckpoint) -> str:
        folder = self.directory.parent / 'damaged'
        target = next(path for number in itertools.count() if not (path := folder / f'{step}.{number}').exists())
        if is_main_process():
            folder.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(target)
        all_gather_objects(None)  # a barrier: the other processes read the directory only after the move
        self._manager.reload()
        return f'checkpoint {step} is damaged ({error}): moved to {target}'


def _reason(error: Exception) -> str:
    """The operating system's message for a failed write, if the error contains the errno; else its first line."""
    if number := re.search(r"(?:os_error_code='|\[Errno )(\d+)", str(error)):
        return os.strerror(int(number[1]))
    # TensorStore appends the specification of the array and the lines of its source code, in brackets.
    return re.sub(r' \[(tensorstore_spec|source loc).*', '', first_line(error))
