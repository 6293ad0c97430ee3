"""The checkpoints of a run: saved in the background, the newest and the best kept, saves that fail told."""

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
"""Orbax has this in the name of a folder until all of the checkpoint is written; then the name is the step alone."""


class _Manager(ocp.CheckpointManager):
    """Orbax's, with the error of a write known at once: its own thread tells it once all processes have timed out.

    Attributes:
        broken: the error of this process's part of the save under way.
    """

    broken: Exception | None = None

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.broken = error
            raise

    def reached_preemption(self, step: int) -> bool:
        """The loop asks JAX for it, and numbers its questions in another way; whether to save is its to decide."""
        return False


class NewestAndBest:
    """Which checkpoints Orbax keeps. The scores are ours: Orbax reads its own at start, and fails if one is damaged.

    Attributes:
        scores: step → score, for those that have one.
    """

    def __init__(self, newest: int):
        self.scores: dict[int, float] = {}
        self._newest = newest

    def should_preserve(self, checkpoints: Sequence, *, context: object) -> list[bool]:
        """For each of the checkpoints, in order of steps, whether to keep it."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        scored = [step for step in steps if step in self.scores]
        best = max(scored, key=lambda step: (self.scores[step], step), default=None)
        return [step == best or step in steps[-self._newest :] for step in steps]


class NotSaved(UserError):
    """The newest state is on no disk."""


class NoPlace(Exception):
    """A process has seen, before any has begun to write, that a checkpoint cannot be saved; all know it."""


class Checkpoints:
    """The checkpoints of one workdir, by step. Use as a context manager: leaving it waits for the save under way.

    A save that fails, at once or in the background, is told and leaves no trace; the checkpoints before it stay. Where
    there are several processes, one that fails after they have begun to write raises `NotSaved` instead.

    Args:
        directory: workdir/checkpoints.
        keep: how many of the newest to keep.
        best_metric: name of the metric whose best checkpoint is kept besides.
        lowest: whether the lowest value of it is the best.
        tell: takes a line about a save that failed.

    Attributes:
        failed: step → why it could not be saved.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        best_metric: str,
        lowest: bool = False,
        tell: Callable[[str], None] = say,
    ):
        self._kept = NewestAndBest(keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._kept, cleanup_tmp_directories=True)
        self.directory = directory
        self.failed: dict[int, str] = {}
        self._best_metric, self._sign, self._tell = best_metric, -1 if lowest else 1, tell
        self._under_way: int | None = None
        self._manager = _Manager(checkpoints_for_orbax(directory), options=options)
        for step in self.steps():
            with contextlib.suppress(DamagedCheckpoint):
                self._note_score(step, read_manifest(directory, step)['metrics'])

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind and is_multiprocess():
            return  # the save under way waits for processes that may never come
        self.wait()
        try:
            self._manager.close()
        except Exception:  # Orbax may raise once more what was told
            if not self.failed:
                raise

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first; where there are several processes, as the first sees them."""
        return all_gather_objects(sorted(map(int, self._manager.all_steps())))[0]

    def save(self, state: TrainState, about: dict, metrics: dict[str, float] | None) -> None:
        """Starts to save; returns when the state's buffers may be donated.

        Args:
            state: of the run.
            about: JSON to keep with it, such as the config.
            metrics: of an evaluation of this very state, or None.
        """
        self.wait()
        step = int(state.step)
        if self.failed:
            self._remove_unfinished()
            self.failed.pop(step, None)
        items, manifest = contents(state, about, metrics)
        args = {item: ocp.args.StandardSave(arrays) for item, arrays in items.items() if arrays}
        args['manifest'] = ocp.args.JsonSave(manifest)
        self._under_way = step
        self._note_score(step, metrics)
        try:
            self._check_place(sum(array.nbytes for arrays in items.values() for array in arrays.values()))
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)  # whether to, the loop has decided
        except Exception as error:  # Orbax and TensorStore have no common error for a disk that is full
            self._fail(error)

    def check(self) -> None:
        """Tells of the save under way if it has failed by now; waits for nothing."""
        if self._under_way is not None and (self._manager.broken or not self._manager.is_saving_in_progress()):
            self.wait()

    def wait(self) -> None:
        """Returns when the save under way, if there is one, is on disk or has failed."""
        if self._under_way is None:
            return
        while is_multiprocess() and self._manager.is_saving_in_progress():
            if self._manager.broken:
                self._fail(self._manager.broken)
            time.sleep(0.02)
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as in `save`
            self._fail(error)
        self._under_way = None

    def last_saved(self) -> str:
        """Words for the newest checkpoint."""
        steps = self.steps()
        return f'the last checkpoint is of step {steps[-1]}' if steps else 'there is no checkpoint yet'

    def _note_score(self, step: int, metrics: dict[str, float] | None) -> None:
        if metrics and metrics[self._best_metric] is not None:  # None: not finite, as a manifest holds it
            self._kept.scores[step] = self._sign * metrics[self._best_metric]

    def _fail(self, error: Exception) -> None:
        step, self._under_way, self._manager.broken = self._under_way, None, None
        if is_multiprocess() and isinstance(error, jax.errors.JaxRuntimeError):
            raise error  # another process is gone, or ended with an error of its own
        if is_multiprocess() and not isinstance(error, NoPlace):  # the others wait for this one's part: all end
            raise NotSaved(f'step {step} could not be saved to {self.directory}: {_reason(error)}') from error
        self.failed[step] = _reason(error)
        self._kept.scores.pop(step, None)
        self._remove_unfinished()
        self._manager.reload()  # for Orbax, what the save would have replaced is gone already
        self._tell(f'step {step} could not be saved: {self.failed[step]}; {self.last_saved()}')

    def _remove_unfinished(self) -> None:
        if is_main_process():
            for folder in self.directory.glob(f'*{UNFINISHED}*'):
                shutil.rmtree(folder, ignore_errors=True)

    def _check_place(self, needed: int) -> None:
        problem = next(filter(None, all_gather_objects(self._problem(needed))), None)
        if problem:
            raise NoPlace(problem)

    def _problem(self, needed: int) -> str | None:
        """Why this process cannot save so many bytes, as far as can be seen beforehand."""
        if not is_local(self.directory):
            return None
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            sizes = f'a checkpoint takes {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free'
            return f'the disk of {self.directory} is full: {sizes}'
        return None if os.access(self.directory, os.W_OK) else f'there is no right to write to {self.directory}'

    def restore_newest(self, like: TrainState) -> tuple[TrainState, list[str]] | None:
        """The newest checkpoint that is whole, and a line about each damaged one that it had to pass over.

        Once an older one is found whole, the damaged are moved to `damaged/` beside the directory; none is deleted.

        Args:
            like: the state's shapes, types and shardings (`jax.ShapeDtypeStruct`).

        Returns:
            None if there is no checkpoint.

        Raises:
            UserError: the checkpoint is of another model or optimizer, or no checkpoint is whole.
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
            raise UserError(f'no checkpoint of {self.directory} is whole ({reasons}): take another workdir')
        return None

    def _set_aside(self, step: int, error: DamagedCheckpoint) -> str:
        folder = self.directory.parent / 'damaged'
        target = next(path for number in itertools.count() if not (path := folder / f'{step}.{number}').exists())
        if is_main_process():
            folder.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(target)
        all_gather_objects(None)  # the others read the directory after it was moved
        self._manager.reload()
        return f'checkpoint {step} is damaged ({error}): moved to {target}'


def _reason(error: Exception) -> str:
    """Of a write that failed: the system's own words, where TensorStore or Python tells their number."""
    number = re.search(r"(?:os_error_code='|\[Errno )(\d+)", str(error))
    return os.strerror(int(number[1])) if number else first_line(error)
