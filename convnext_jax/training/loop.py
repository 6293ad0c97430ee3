"""train(config, workdir): trains a run from its first step, or resumes it from its newest checkpoint."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Generator, Iterable, Sequence
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
from convnext_jax.data.loading import WaitCallback, ignore_wait
from convnext_jax.data.pipeline import Batch, Share, Unreadable, eval_batches, prefetch_to_device, train_batches
from convnext_jax.errors import UserError
from convnext_jax.interop import Licence
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
from convnext_jax.tasks import Evaluation, make_task
from convnext_jax.training.data_facts import check_same_data, data_facts, evaluation_change
from convnext_jax.training.describe import describe, final_message
from convnext_jax.training.durations import Durations, make_durations
from convnext_jax.training.evaluation import compute_metrics, evaluate, make_eval_step, make_figures
from convnext_jax.training.program import Program
from convnext_jax.training.sharding import check_batch_size, make_mesh, replicated
from convnext_jax.training.step import MAX_SKIPS_IN_A_ROW
from convnext_jax.training.weights import licence_of_run, load_weights

SAVE_RETRY_DELAYS = (1, 3, 9)
"""Seconds to wait before each retry of a save that must not fail: in total, less than the notice of a preemption."""

LAST_VALUES = ('learning_rate', 'grad_norm', 'param_norm', 'skipped', 'skips_in_a_row')
"""Metrics that are recorded with their value at the newest step. The loss and the task's terms are recorded as means
over the steps since the last record."""

REPORT_CHECK_SECONDS = 3
"""If checking the evaluation images takes longer than this, the run reports the end of the check."""


def train(config: ConfigDict, workdir: Path, profile: ProfileWindow | None = None) -> None:
    """Trains, evaluates and saves a run. Calling it again resumes the run, or reports that it has finished.

    Args:
        config: from `default_config`. The task sets the fields that follow from the data, and paths become absolute.
        workdir: folder of the run; created if it does not exist.
        profile: the steps to trace.

    Raises:
        UserError: a problem that the user can fix.
        Stopped: SIGTERM or Ctrl-C was received, and the run is saved.
    """
    check_values(config)
    resolve_paths(config)
    cache_compiled(config.compilation_cache_dir)
    with locked_by_main_process(workdir):
        task = make_task(config)
        train_set, eval_set = task.open()
        more_evaluations = task.open_evaluations()
        durations = make_durations(config, len(train_set))
        mesh = make_mesh(**config.mesh)
        check_batch_size(config.batch_size, config.accumulation_steps, mesh)
        for line in write_config(workdir, config) if is_main_process() else ():
            say(f'changed since the run began: {line}')
        headline, keep = task.headline, config.keep_checkpoints
        best = f'ema_{headline.name}' if config.ema.decay else headline.name
        saved = workdir / CHECKPOINTS
        with Checkpoints(saved, keep=keep, best_metric=best, lowest=headline.lowest, report=say) as checkpoints:
            run = Run(config, durations, mesh, train_set, eval_set, checkpoints, more_evaluations)
            state = run.restored_state()
            if state is None or not run.is_done(int(state.step), workdir):
                for line in describe(config, durations, mesh, run.model, train_set, eval_set, workdir):
                    say(line)
                run.run_steps(state or run.first_state(), workdir, profile)
        say(final_message(workdir, config, headline))


class NotFinite(UserError):
    """The loss or its gradient was not finite in `MAX_SKIPS_IN_A_ROW` consecutive steps."""


class Run(Program):
    """A training run: the compiled program, its datasets and its checkpoints.

    Args:
        config, durations, mesh: as for `Program`.
        train_set, eval_set: the open splits.
        checkpoints: the checkpoints of the workdir.
        more_evaluations: from `Task.open_evaluations`.

    Attributes:
        unreadable: the training images that could not be read.
        evaluations: the evaluation of the evaluation split, then `more_evaluations`.
        eval_steps: for each evaluation the step from `make_eval_step`, jitted.
        figures: from `make_figures`, jitted.
        licence: licence of the weights that the run started from; None if unknown.
    """

    def __init__(
        self,
        config: ConfigDict,
        durations: Durations,
        mesh: jax.sharding.Mesh,
        train_set: Dataset,
        eval_set: Dataset,
        checkpoints: Checkpoints,
        more_evaluations: Sequence[Evaluation] = (),
    ):
        super().__init__(config, durations, mesh)
        self.checkpoints = checkpoints
        self.train_set, self.eval_set = train_set, eval_set
        self.unreadable = Unreadable(train_set)
        self.licence: Licence | None = None
        main = Evaluation(eval_set, self.task.evaluator(eval_set), self.task.headline)
        self.evaluations = [main, *more_evaluations]
        specs = jax.tree.map(lambda sharding: sharding.spec, self.state_sharding.weights)
        eval_steps = [make_eval_step(each.evaluator, self.model, mesh, specs) for each in self.evaluations]
        self.eval_steps = [jax.jit(eval_step, out_shardings=replicated(mesh)) for eval_step in eval_steps]
        self.figures = jax.jit(make_figures(self.task, self.model, mesh), out_shardings=replicated(mesh))

    def restored_state(self) -> TrainState | None:
        """The state of the newest undamaged checkpoint, or None if there is no checkpoint.

        Raises:
            UserError: the checkpoint is from another model, optimizer or data set, or all checkpoints are damaged.
        """
        restored = self.checkpoints.restore_newest(self.abstract_state)
        if restored is None:
            return None
        state, notes = restored
        about = read_about(self.checkpoints.directory, int(state.step))
        facts = data_facts(self.train_set, self.eval_set)
        for note in [*notes, *evaluation_change(about['data'], facts)]:
            say(note)
        check_same_data(about['data'], facts)
        self.licence = licence_of_run(about)
        return state

    def first_state(self) -> TrainState:
        """The state before the first step: random from the seed, or from the weights that `config.init` names."""
        state = jax.jit(self.newly_initialised_state, out_shardings=self.state_sharding)()
        if not self.config.init.weights:
            return state
        weights, notes, self.licence = load_weights(self.task, state.weights, self.train_set.facts)
        for note in notes + ([self.licence.line] if self.licence else []):
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
        """Whether the last step is finished and evaluated."""
        return step >= self.durations.total_steps and self._evaluated(step, workdir)

    def _evaluated(self, step: int, workdir: Path) -> bool:
        split = self.config.data.eval_split
        records = read_records(workdir) if is_main_process() else []
        return all_gather_objects(any((record['step'], record['split']) == (step, split) for record in records))[0]

    def run_steps(self, state: TrainState, workdir: Path, profile: ProfileWindow | None = None) -> None:
        """Trains from a state to the last step.

        Args:
            state: the training state; the first step donates it.
            workdir, profile: as for `train`.

        Raises:
            UserError, Stopped: as for `train`.
        """
        step = saved = int(state.step)
        with (
            RunLog(workdir, step, self.durations.total_steps, *(each.headline for each in self.evaluations))
            if is_main_process()
            else NullLog() as log,
            agreed_stop() if is_multiprocess() else stop_signal() as stop,
            contextlib.nullcontext(StepTimer(self.config, step, stop)) as timer,
            Trace(profile, workdir / TENSORBOARD, self.durations.total_steps - step, timer.paused, log.say) as trace,
            contextlib.closing(self.train_batches(step, timer.waiting)) as batches,
        ):
            pending: list[dict[str, jax.Array]] = []
            stall_monitor = timer.stall_monitor(self.config.data.eval_split)
            try:
                if step:
                    log.say(f'resumes at step {step} of {self.durations.total_steps}')
                    last = step >= self.durations.total_steps
                    if (last or step % self.durations.eval_every_steps == 0) and not self._evaluated(step, workdir):
                        # A signal or an error interrupted this evaluation.
                        self._evaluate(log, step, state, Stop() if last else stop, stall_monitor)
                    if last:
                        return
                    if stop.received:
                        raise Stopped(stop.received, step)
                else:
                    for number, evaluation in enumerate(self.evaluations):
                        title = f'{evaluation.headline.title} evaluation' if number else self.config.data.eval_split
                        self._check_images(evaluation.dataset, title, log, stop, stall_monitor)
                first = next(batches)
                log.say('compiling the training step …')
                began = time.perf_counter()
                train_step = self.compile(state, first)
                log.say(f'compiled in {time.perf_counter() - began:.1f} s')
                for batch in timer.batches(itertools.chain([first], batches)):
                    with trace.step(step):
                        state, metrics = train_step(state, batch)
                    step += 1
                    pending.append(metrics)
                    timer.dispatched(metrics)
                    log.advance()
                    stop.poll()
                    self.checkpoints.check()
                    last = step == self.durations.total_steps
                    if step % self.config.log_every_steps == 0 or last:
                        self._log(log, step, pending, timer)
                        pending = []
                    results = None
                    if step % self.durations.eval_every_steps == 0 or last:
                        with timer.paused():
                            self._check_finite(step, metrics)
                            # A signal does not interrupt the last evaluation, so that the run can finish.
                            results = self._evaluate(log, step, state, Stop() if last else stop, stall_monitor)
                    stopped_by = None if last else stop.received
                    if results or step % self.config.checkpoint_every_steps == 0 or last or stopped_by:
                        with timer.paused():
                            self._check_finite(step, metrics)
                            saved = step
                            save = self._save_with_retries if last or stopped_by else self._save
                            save(state, step, results)
                    if stopped_by:
                        raise Stopped(stopped_by, step)
                    if last:
                        break
            except (NotFinite, NotSaved):
                raise
            except DataStalled:
                if is_multiprocess():  # no save: the other processes are in a step that needs this process
                    self.checkpoints.wait()
                else:
                    self._save_if_new(state, step, saved)
                    saved = step
                assert stop.received is not None  # only a signal raises DataStalled
                raise Stopped(stop.received, saved) from None
            except UserError as error:  # for example a damaged image: the run resumes here once the user has fixed it
                if not is_multiprocess():  # the other processes may be at another step
                    try:
                        self._save_if_new(state, step, saved)
                    except NotSaved as unsaved:
                        raise NotSaved(f'{error}; {unsaved}') from error
                    if step:
                        log.say(f'saved at step {step}')
                raise
            if self.checkpoints.failed:
                steps = ', '.join(map(str, self.checkpoints.failed))
                log.say(f'some saves failed, at step {steps}; step {step} is saved')

    def _share(self, batch_size: int) -> Share:
        return Share(batch_size, local_batch_indices(self.batch_sharding, batch_size))

    def train_batches(self, start_step: int, waiting: WaitCallback = ignore_wait) -> Generator[Batch, None, None]:
        """Global training batches on the devices, beginning with the batch of the next step.

        Args:
            start_step: number of finished steps.
            waiting: called while the next batch is not ready.
        """
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

    def _check_images(
        self, dataset: Dataset, split: str, log: RunLog | NullLog, stop: Stop, waiting: WaitCallback
    ) -> None:
        """Decodes evaluation images before the first step; otherwise an unreadable image ends the run much later.

        Raises:
            UserError: images cannot be read. All processes raise it.
            Stopped: a signal was received.
        """
        began = time.perf_counter()
        parts = find_unreadable(dataset, process=jax.process_index(), processes=jax.process_count(), waiting=waiting)
        with contextlib.closing(parts):
            errors: dict[int, str] = {}
            for found in itertools.takewhile(lambda _: not stop.poll(), parts):
                errors |= found
        if stop.received:
            raise Stopped(stop.received, 0)
        # Pairs, because JSON turns the keys of a dict into strings.
        errors = dict(itertools.chain.from_iterable(all_gather_objects(list(errors.items()))))
        if errors:
            raise UserError(describe_unreadable(errors, len(dataset), split))
        seconds = time.perf_counter() - began
        if seconds > REPORT_CHECK_SECONDS:
            log.say(f'checked {len(dataset):,} images of {split} in {seconds:.0f} s: all can be read')

    def _evaluate(
        self, log: RunLog | NullLog, step: int, state: TrainState, stop: Stop, waiting: WaitCallback
    ) -> dict[str, float] | None:
        """Runs all evaluations, and records and returns their metrics; None if a signal interrupted it."""
        share = self._share(self.config.batch_size // self.config.accumulation_steps)
        weights = {'': state.weights} | ({'ema_': state.ema} if state.ema else {})
        results: dict[str, float] = {}
        first_batches = []
        for evaluation, eval_step in zip(self.evaluations, self.eval_steps, strict=True):
            batches = prefetch_to_device(eval_batches(evaluation.dataset, share, waiting), self.batch_sharding)
            until_stopped = itertools.takewhile(lambda _: not stop.poll(), batches)
            first = next(until_stopped, None)
            rest: Iterable[Batch] = until_stopped if first is None else itertools.chain([first], until_stopped)
            images, measured = evaluate(eval_step, weights, rest)
            if stop.received:
                return None
            first_batches.append(first)
            # The first evaluation sets `images`, the number of images of the evaluation split.
            results = compute_metrics(evaluation.evaluator, images, measured) | results
        if stop.received:
            return None
        split = self.config.data.eval_split
        log.evaluation(step, self.durations.epoch(step), split, results)
        log.figures(step, split, jax.device_get(self.figures(state.ema or state.weights, first_batches[0])))
        return results

    def _log(self, log: RunLog | NullLog, step: int, pending: list[dict[str, jax.Array]], timer: StepTimer) -> None:
        speeds, stragglers = timer.summary()
        fetched = jax.device_get(pending)
        self.unreadable.merge(all_gather_objects(self.unreadable.errors()))
        newest = fetched[-1]
        means = [name for name in newest if name not in LAST_VALUES]
        metrics = {
            **{name: float(np.mean([metrics[name] for metrics in fetched])) for name in means},
            'learning_rate': float(newest['learning_rate']),
            **speeds,
            'grad_norm': float(newest['grad_norm']),
            'param_norm': float(newest['param_norm']),
            'skipped': int(newest['skipped']),
            'unreadable': len(self.unreadable),
        }
        seconds_left = (self.durations.total_steps - step) * self.config.batch_size / metrics['images_per_second']
        log.train(step, self.durations.epoch(step), metrics, seconds_left)
        for line in [*self.unreadable.new_messages(), *stragglers]:
            log.say(line)
        skips = sum(metrics['skips_in_a_row'] > 0 for metrics in fetched)
        if skips:
            log.say(f'step {step}: {skips} updates skipped because the loss or its gradient was not finite')
        self._check_finite(step, newest)

    def _check_finite(self, step: int, metrics: dict[str, jax.Array]) -> None:
        skips = int(metrics['skips_in_a_row'])
        if skips >= MAX_SKIPS_IN_A_ROW:
            self.checkpoints.wait()
            raise NotFinite(
                f'the loss or its gradient has not been finite since step {step - skips + 1}; '
                f'{self.checkpoints.last_saved()}; try a lower optimizer.learning_rate, a longer warm-up, '
                'optimizer.clip_norm=1, or model.dtype=float32'
            )

    def _save(self, state: TrainState, step: int, results: dict[str, float] | None) -> None:
        epoch, batch = divmod(step, self.durations.steps_per_epoch)
        about = {
            'config': as_dict(self.config),
            'position': {'epoch': epoch, 'batch': batch},
            'data': data_facts(self.train_set, self.eval_set),
            **({'licence': dataclasses.asdict(self.licence)} if self.licence else {}),
        }
        self.checkpoints.save(state, about, results)

    def _save_with_retries(self, state: TrainState, step: int, results: dict[str, float] | None) -> None:
        """Saves the last state of this process, and waits until it is on disk.

        Raises:
            NotSaved: the save and all retries failed.
        """
        for seconds in (0, *SAVE_RETRY_DELAYS):
            time.sleep(seconds)
            self._save(state, step, results)
            self.checkpoints.wait()
            if step not in self.checkpoints.failed:
                return
        steps, why = ', '.join(map(str, self.checkpoints.failed)), self.checkpoints.failed[step]
        raise NotSaved(
            f'not saved: step {steps} ({why}); {self.checkpoints.last_saved()}. Free disk space, or make '
            f'{self.checkpoints.directory} writable, and run the same command again'
        )

    def _save_if_new(self, state: TrainState, step: int, saved: int) -> None:
        """Saves the state with retries, unless its checkpoint exists. `saved` is the last step that was saved."""
        self.checkpoints.wait()
        if step > saved or step in self.checkpoints.failed:
            self._save_with_retries(state, step, None)
