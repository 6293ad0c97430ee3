"""train(config, workdir): one run, from its first step or from where it stopped."""

import contextlib
import itertools
import time
import unicodedata
from collections.abc import Generator, Iterable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from convnext_jax.checkpoints.checkpoint import read_about
from convnext_jax.checkpoints.manager import Checkpoints, NotSaved
from convnext_jax.checkpoints.state import TrainState, initial_state
from convnext_jax.checkpoints.workdir import CHECKPOINTS, TENSORBOARD, locked_by_main_process, write_config
from convnext_jax.config import as_dict, check_values, resolve_paths
from convnext_jax.data.check import describe_unreadable, find_unreadable
from convnext_jax.data.dataset import Dataset
from convnext_jax.data.loading import Waiting, no_word
from convnext_jax.data.pipeline import Batch, Share, Unreadable, eval_batches, prefetch_to_device, train_batches
from convnext_jax.errors import UserError
from convnext_jax.monitoring.logging import NullLog, RunLog
from convnext_jax.monitoring.records import read_records
from convnext_jax.monitoring.stalls import DataStalled
from convnext_jax.monitoring.throughput import StepTimer
from convnext_jax.monitoring.trace import ProfileWindow, Trace
from convnext_jax.output import say
from convnext_jax.runtime.compilation_cache import cache_compiled
from convnext_jax.runtime.processes import (
    agreed_stop,
    all_gather_objects,
    is_main_process,
    is_multiprocess,
    local_batch_indices,
)
from convnext_jax.runtime.stop import Stop, Stopped, stop_signal
from convnext_jax.tasks import make_task
from convnext_jax.training.describe import describe, finished
from convnext_jax.training.durations import Durations, make_durations
from convnext_jax.training.evaluation import evaluate, make_eval_step, make_figures, metrics_of
from convnext_jax.training.program import Program
from convnext_jax.training.sharding import check_batch_size, make_mesh, replicated
from convnext_jax.training.step import SKIPS_IN_A_ROW
from convnext_jax.training.weights import load_weights

SAVE_AGAIN = (1, 3, 9)
"""Seconds to wait before a state that must not be lost is saved once more: less than the notice of a preemption."""

LAST = ('learning_rate', 'grad_norm', 'param_norm', 'skipped', 'skips_in_a_row')
"""Metrics of a step whose last value is recorded; of the loss and the task's terms it is the mean."""

CHECK_TOLD = 3
"""A check of the evaluation images that takes more seconds than this is reported."""


def train(config: ConfigDict, workdir: Path, profile: ProfileWindow | None = None) -> None:
    """Trains, evaluates and saves; the same call again resumes, and a finished run says so.

    Args:
        config: as `default_config`; the task sets what follows from the data, and paths become absolute.
        workdir: made if it is not there.
        profile: the steps to trace.

    Raises:
        UserError: something that the user can mend, with what to do.
        Stopped: SIGTERM or Ctrl-C came, and the run is saved.
    """
    check_values(config)
    resolve_paths(config)
    cache_compiled(config.compilation_cache_dir)
    with locked_by_main_process(workdir):
        task = make_task(config)
        train_set, eval_set = task.open()
        durations = make_durations(config, len(train_set))
        mesh = make_mesh(**config.mesh)
        check_batch_size(config.batch_size, config.accumulation_steps, mesh)
        for line in write_config(workdir, config) if is_main_process() else ():
            say(f'changed since the run began: {line}')
        headline, keep = task.headline, config.keep_checkpoints
        best = f'ema_{headline.name}' if config.ema.decay else headline.name
        saved = workdir / CHECKPOINTS
        with Checkpoints(saved, keep=keep, best_metric=best, lowest=headline.lowest, report=say) as checkpoints:
            run = Run(config, durations, mesh, train_set, eval_set, checkpoints)
            state = run.restored_state()
            if state is None or not run.is_done(int(state.step), workdir):
                for line in describe(config, durations, mesh, run.model, train_set, eval_set, workdir):
                    say(line)
                run.go(state or run.first_state(), workdir, profile)
        say(finished(workdir, config, headline))


class NotFinite(UserError):
    """The loss or its gradient was not finite too often in a row."""


class Run(Program):
    """What a run computes, with the data that it goes over and the place that it is saved in.

    Attributes:
        evaluator: of the evaluation split.
        eval_step: jitted, as `make_eval_step`.
        figures: jitted, as `make_figures`.
    """

    def __init__(
        self,
        config: ConfigDict,
        durations: Durations,
        mesh: jax.sharding.Mesh,
        train_set: Dataset,
        eval_set: Dataset,
        checkpoints: Checkpoints,
    ):
        super().__init__(config, durations, mesh)
        self.checkpoints = checkpoints
        self.train_set, self.eval_set = train_set, eval_set
        self.unreadable = Unreadable(train_set)
        self.evaluator = self.task.evaluator(eval_set)
        specs = jax.tree.map(lambda sharding: sharding.spec, self.state_sharding.weights)
        eval_step = make_eval_step(self.evaluator, self.model, mesh, specs)
        self.eval_step = jax.jit(eval_step, out_shardings=replicated(mesh))
        self.figures = jax.jit(make_figures(self.task, self.model, mesh), out_shardings=replicated(mesh))

    def restored_state(self) -> TrainState | None:
        """The newest whole checkpoint, or None if there is none.

        Raises:
            UserError: it is of another model, optimizer or data set, or none is whole.
        """
        restored = self.checkpoints.restore_newest(self.abstract_state)
        if restored is None:
            return None
        state, notes = restored
        for note in notes:
            say(note)
        self._check_same_data(int(state.step))
        return state

    def first_state(self) -> TrainState:
        """The state before the first step, by seed or, where the config says so, from another run's weights."""
        state = jax.jit(self.fresh_state, out_shardings=self.state_sharding)()
        if not self.config.init.weights:
            return state
        weights, notes = load_weights(self.task, state.weights, self.train_set.facts)
        for note in notes:
            say(note)
        restart = jax.jit(
            lambda parameters, statistics: initial_state(
                parameters, self.optimizer, ema=self.config.ema.decay > 0, statistics=statistics
            ),
            out_shardings=self.state_sharding,
        )
        statistics = {name: weights.pop(name) for name in state.statistics}
        return restart(weights, statistics)

    def is_done(self, step: int, workdir: Path) -> bool:
        """Whether the last step is done and evaluated."""
        return step >= self.durations.total_steps and self._evaluated(step, workdir)

    def _evaluated(self, step: int, workdir: Path) -> bool:
        split = self.config.data.eval_split
        records = read_records(workdir) if is_main_process() else []
        return all_gather_objects(any((record['step'], record['split']) == (step, split) for record in records))[0]

    def go(self, state: TrainState, workdir: Path, profile: ProfileWindow | None = None) -> None:
        """From a state to the last step; the arguments as of `train`.

        Raises:
            UserError, Stopped: as `train`.
        """
        step = saved = int(state.step)
        with (
            RunLog(workdir, step, self.durations.total_steps, self.task.headline)
            if is_main_process()
            else NullLog() as log,
            agreed_stop() if is_multiprocess() else stop_signal() as stop,
            contextlib.nullcontext(StepTimer(self.config, step, stop)) as pace,
            Trace(profile, workdir / TENSORBOARD, self.durations.total_steps - step, pace.paused, log.say) as trace,
            contextlib.closing(self.train_batches(step, pace.waiting)) as batches,
        ):
            pending: list[dict[str, jax.Array]] = []
            patience = pace.patience(self.config.data.eval_split)
            try:
                if step:
                    log.say(f'resumes at step {step} of {self.durations.total_steps}')
                    last = step >= self.durations.total_steps
                    if (last or step % self.durations.eval_every_steps == 0) and not self._evaluated(step, workdir):
                        # A signal or an error cut it short.
                        self._evaluate(log, step, state, Stop() if last else stop, patience)
                    if last:
                        return
                    if stop.received:
                        raise Stopped(stop.received, step)
                else:
                    self._check_evaluation_images(log, stop, patience)
                first = next(batches)
                log.say('compiling the training step …')
                began = time.perf_counter()
                train_step = self.compile(state, first)
                log.say(f'compiled in {time.perf_counter() - began:.1f} s')
                for batch in pace.batches(itertools.chain([first], batches)):
                    with trace.step(step):
                        state, metrics = train_step(state, batch)
                    step += 1
                    pending.append(metrics)
                    pace.dispatched(metrics)
                    log.advance()
                    stop.poll()
                    self.checkpoints.check()
                    last = step == self.durations.total_steps
                    if step % self.config.log_every_steps == 0 or last:
                        self._log(log, step, pending, pace)
                        pending = []
                    results = None
                    if step % self.durations.eval_every_steps == 0 or last:
                        with pace.paused():
                            self._check_finite(step, metrics)
                            # The last evaluation takes its time: a checkpoint of the last step says that all is done.
                            results = self._evaluate(log, step, state, Stop() if last else stop, patience)
                    stopped_by = None if last else stop.received
                    if results or step % self.config.checkpoint_every_steps == 0 or last or stopped_by:
                        with pace.paused():
                            self._check_finite(step, metrics)
                            saved = step
                            save = self._save_surely if last or stopped_by else self._save
                            save(state, step, results)
                    if stopped_by:
                        raise Stopped(stopped_by, step)
                    if last:
                        break
            except (NotFinite, NotSaved):
                raise
            except DataStalled:
                if is_multiprocess():  # the others cannot end the step they are in
                    self.checkpoints.wait()
                else:
                    self._save_rest(state, step, saved)
                    saved = step
                assert stop.received is not None  # only a signal ends the wait
                raise Stopped(stop.received, saved) from None
            except UserError as error:  # a broken image, say: mended, the same command goes on from here
                if not is_multiprocess():  # else the others may be at another step
                    try:
                        self._save_rest(state, step, saved)
                    except NotSaved as unsaved:
                        raise NotSaved(f'{error}; {unsaved}') from error
                    if step:
                        log.say(f'saved at step {step}')
                raise
            if self.checkpoints.failed:
                steps = ', '.join(map(str, self.checkpoints.failed))
                log.say(f'saving failed for a time, at step {steps}; step {step} is saved')

    def _share(self, batch_size: int) -> Share:
        return Share(batch_size, local_batch_indices(self.batch_sharding, batch_size))

    def train_batches(self, start_step: int, waiting: Waiting = no_word) -> Generator[Batch, None, None]:
        """Global batches on the devices, from a step on; `waiting` hears of one that is not there yet."""
        batches = train_batches(
            self.train_set,
            self._share(self.config.batch_size),
            seed=self.config.seed,
            start_step=start_step,
            repeats=self.config.data.repeats,
            unreadable=self.unreadable if self.config.data.on_error == 'replace' else None,
            workers=self.config.data.workers,
            waiting=waiting,
        )
        return prefetch_to_device(batches, self.batch_sharding)

    def _check_evaluation_images(self, log: RunLog | NullLog, stop: Stop, waiting: Waiting) -> None:
        """Decodes the evaluation split before the first step: an unreadable image would end the run after an epoch.

        Raises:
            UserError: images cannot be read; all processes raise it.
            Stopped: a signal came.
        """
        began = time.perf_counter()
        split = self.config.data.eval_split
        parts = find_unreadable(
            self.eval_set, process=jax.process_index(), processes=jax.process_count(), waiting=waiting
        )
        with contextlib.closing(parts):
            errors: dict[int, str] = {}
            for found in itertools.takewhile(lambda _: not stop.poll(), parts):
                errors |= found
        if stop.received:
            raise Stopped(stop.received, 0)
        # Pairs, since the keys of an object in JSON are strings.
        errors = dict(itertools.chain.from_iterable(all_gather_objects(list(errors.items()))))
        if errors:
            raise UserError(describe_unreadable(errors, len(self.eval_set), split))
        seconds = time.perf_counter() - began
        if seconds > CHECK_TOLD:
            log.say(f'all {len(self.eval_set):,} images of {split} can be read ({seconds:.0f} s)')

    def _evaluate(
        self, log: RunLog | NullLog, step: int, state: TrainState, stop: Stop, waiting: Waiting
    ) -> dict[str, float] | None:
        """The metrics over the evaluation split, or None if the run was told to stop before they were whole."""
        share = self._share(self.config.batch_size // self.config.accumulation_steps)
        batches = eval_batches(self.eval_set, share, waiting)
        weights = {'': state.weights} | ({'ema_': state.ema} if state.ema else {})
        until_stopped = itertools.takewhile(lambda _: not stop.poll(), prefetch_to_device(batches, self.batch_sharding))
        first = next(until_stopped, None)
        rest: Iterable[Batch] = until_stopped if first is None else itertools.chain([first], until_stopped)
        results = metrics_of(self.evaluator, *evaluate(self.eval_step, weights, rest))
        if stop.received:
            return None
        split = self.config.data.eval_split
        log.evaluation(step, self.durations.epoch(step), split, results)
        log.figures(step, split, jax.device_get(self.figures(state.ema or state.weights, first)))
        return results

    def _log(self, log: RunLog | NullLog, step: int, pending: list[dict[str, jax.Array]], pace: StepTimer) -> None:
        speeds, stragglers = pace.lap()
        fetched = jax.device_get(pending)
        self.unreadable.merge(all_gather_objects(self.unreadable.errors()))
        newest = fetched[-1]
        means = [name for name in newest if name not in LAST]
        metrics = {
            **{name: float(np.mean([metrics[name] for metrics in fetched])) for name in means},
            'learning_rate': float(newest['learning_rate']),
            **speeds,
            'grad_norm': float(newest['grad_norm']),
            'param_norm': float(newest['param_norm']),
            'skipped': int(newest['skipped']),
            'unreadable': len(self.unreadable),
        }
        left = (self.durations.total_steps - step) * self.config.batch_size / metrics['images_per_second']
        log.train(step, self.durations.epoch(step), metrics, left)
        for line in [*self.unreadable.news(), *stragglers]:
            log.say(line)
        skips = sum(metrics['skips_in_a_row'] > 0 for metrics in fetched)
        if skips:
            log.say(f'step {step}: {skips} updates left out because the loss or its gradient was not finite')
        self._check_finite(step, newest)

    def _check_finite(self, step: int, metrics: dict[str, jax.Array]) -> None:
        skips = int(metrics['skips_in_a_row'])
        if skips >= SKIPS_IN_A_ROW:
            self.checkpoints.wait()
            raise NotFinite(
                f'the loss or its gradient has not been finite since step {step - skips + 1}; '
                f'{self.checkpoints.last_saved()}. Try a lower optimizer.learning_rate, a longer warm-up, '
                'optimizer.clip_norm=1, or model.dtype=float32'
            )

    def _save(self, state: TrainState, step: int, results: dict[str, float] | None) -> None:
        epoch, batch = divmod(step, self.durations.steps_per_epoch)
        about = {
            'config': as_dict(self.config),
            'position': {'epoch': epoch, 'batch': batch},
            'data': self._data_facts(),
        }
        self.checkpoints.save(state, about, results)

    def _save_surely(self, state: TrainState, step: int, results: dict[str, float] | None) -> None:
        """Saves a state that nothing will come after, and waits until it is on disk.

        Raises:
            NotSaved: it could not be saved, and not a little later either.
        """
        for seconds in (0, *SAVE_AGAIN):
            time.sleep(seconds)
            self._save(state, step, results)
            self.checkpoints.wait()
            if step not in self.checkpoints.failed:
                return
        steps, why = ', '.join(map(str, self.checkpoints.failed)), self.checkpoints.failed[step]
        raise NotSaved(
            f'not saved: step {steps} ({why}); {self.checkpoints.last_saved()}. Make room, or make '
            f'{self.checkpoints.directory} writable, and run the same command again'
        )

    def _save_rest(self, state: TrainState, step: int, saved: int) -> None:
        """As `_save_surely`, unless the state is on disk: `saved` is the step that was last to be saved."""
        self.checkpoints.wait()
        if step > saved or step in self.checkpoints.failed:
            self._save_surely(state, step, None)

    def _data_facts(self) -> dict:
        """What is saved about the data. When the run resumes, the evaluation images alone may have changed."""
        images = {'training images': len(self.train_set), 'evaluation images': len(self.eval_set)}
        return {**images, **self.train_set.facts}

    def _check_same_data(self, step: int) -> None:
        then, now = read_about(self.checkpoints.directory, step)['data'], self._data_facts()
        old, new = (facts.pop('evaluation images') for facts in (then, now))
        if old != new:
            say(f'changed since the run began: evaluation images were {old}, are {new}')
        differences = [line for fact in {**then, **now} for line in _differences(fact, then.get(fact), now.get(fact))]
        if differences:
            raise UserError(
                f'the run began on another data set: {"; ".join(differences[:5])}. '
                'Bring back the old one, or take another workdir'
            )


def _differences(fact: str, old: object, new: object) -> list[str]:
    """A line for each difference of a fact of the data, whose values are as JSON holds them."""
    if isinstance(old, list) and isinstance(new, list):
        pairs = enumerate(itertools.zip_longest(old, new))
        return [line for place, (a, b) in pairs for line in _differences(f'{fact} [{place}]', a, b)]
    if isinstance(old, str) and isinstance(new, str):  # file systems of Macs give 'é' as two characters
        same = unicodedata.normalize('NFC', old) == unicodedata.normalize('NFC', new)
    else:
        same = old == new
    return [] if same else [f'{fact}: {old!r} became {new!r}']
