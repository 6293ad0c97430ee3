"""A run that gets a stop signal saves first: real runs, and the loop with a training step that does nothing."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import SMALL_TRAIN, STEPS, TIMEOUT, fingerprints

from configs.fashion_mnist import get_config
from convnext_jax.checkpoints.checkpoint import saved_steps
from convnext_jax.checkpoints.manager import NotSaved
from convnext_jax.data.loading import ignore_wait
from convnext_jax.errors import UserError
from convnext_jax.monitoring.logging import RunLog
from convnext_jax.monitoring.records import read_records
from convnext_jax.monitoring.stalls import DataStalled
from convnext_jax.runtime.stop import Stop, Stopped
from convnext_jax.tasks import Measured, make_task
from convnext_jax.training import loop
from convnext_jax.training.durations import make_durations
from convnext_jax.training.loop import Run
from convnext_jax.training.sharding import make_mesh


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_gets_a_signal_saves_and_says_how_to_resume(commands, train_here, finished_run, tmp_path, number):
    """A preempted job would lose the steps since its last checkpoint."""
    run = tmp_path / 'run'
    process = commands.start(*SMALL_TRAIN, f'--workdir={run}', '--config.checkpoint_every_steps=1000')
    while process.poll() is None and not read_records(run):
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + number, out + err
    assert 'Traceback' not in err
    step = saved_steps(run / 'checkpoints')[-1]
    assert f'stopped by {number.name} at step {step}, which is saved: run the same command again to resume' in out
    assert 4 <= step < STEPS
    if number == signal.SIGTERM:
        resumed = train_here(run, '--config.checkpoint_every_steps=1000')
        assert f'resumes at step {step} of {STEPS}' in resumed
        assert fingerprints(run) == fingerprints(finished_run)


def test_a_signal_in_an_evaluation_saves_immediately_and_the_resumed_run_evaluates(train_here, tmp_path):
    """A preempted machine would be gone before an evaluation of ImageNet ends, and nothing would be saved."""
    run = tmp_path / 'run'
    split = 'test[:400]'
    arguments = (
        f'--config.data.eval_split={split}',
        '--config.log_every_steps=10',
        '--config.checkpoint_every_steps=1000',
    )
    ended = threading.Event()

    def send_sigterm():
        while not read_records(run):
            if ended.wait(0.01):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send_sigterm)
    thread.start()
    try:
        with pytest.raises(Stopped, match='stopped by SIGTERM at step 10, which is saved') as stopped:
            train_here(run, *arguments)
    finally:
        ended.set()
        thread.join()
    assert stopped.value.status == 128 + signal.SIGTERM
    assert saved_steps(run / 'checkpoints') == [10]
    assert [record['split'] for record in read_records(run)] == ['train']
    train_here(run, *arguments)
    assert [record['step'] for record in read_records(run) if record['split'] == split] == [10, 20, 24]


class Steps:
    """A training step that does nothing."""

    def lower(self, *_):
        return self

    def compile(self, options=None):
        names = ('loss', 'learning_rate', 'grad_norm', 'param_norm', 'skipped', 'skips_in_a_row')
        metrics = dict.fromkeys(names, np.zeros(()))
        return lambda state, batch: (state, metrics)


class Saves:
    """A fake `Checkpoints` that records which steps it should save; with an `error`, every save fails."""

    directory = Path('checkpoints')

    def __init__(self, error=None):
        self.steps, self.failed, self._error = [], {}, error

    def save(self, state, about, results):
        step = about['position']['batch']
        self.steps.append(step)
        if self._error:
            self.failed[step] = self._error

    def check(self):
        pass

    def wait(self):
        pass

    def last_saved(self):
        return 'there is no checkpoint yet'


def make_run(config, checkpoints):
    train_set, eval_set = make_task(config).open()
    durations = make_durations(config, len(train_set))
    run = Run(config, durations, make_mesh(), train_set, eval_set, checkpoints)
    run.train_step = Steps()
    return run


def stopped_run(tmp_path, monkeypatch, checkpoints, error, every=1000, after=1):
    """Runs for `after` steps; then comes a signal, and the error if there is one."""
    config, stop = get_config(), Stop()
    config.checkpoint_every_steps = every
    run = make_run(config, checkpoints)

    def batches(start_step, waiting):
        yield from [{}] * after
        stop.received = signal.SIGTERM
        if error:
            raise error
        yield {}

    monkeypatch.setattr(run, 'train_batches', batches)
    monkeypatch.setattr(loop, 'stop_signal', lambda: contextlib.nullcontext(stop))
    run.run_steps(SimpleNamespace(step=0), tmp_path)


def test_a_stop_signal_hides_no_error(tmp_path, monkeypatch):
    """A run would claim that it is saved, although a save failed or an image was broken at the moment of the signal."""
    monkeypatch.setattr(loop, 'SAVE_RETRY_DELAYS', (0,))
    with pytest.raises(
        NotSaved, match=r'^not saved: step 2 \(the disk is full\); there is no checkpoint yet. Free disk space'
    ):
        stopped_run(tmp_path, monkeypatch, full := Saves('the disk is full'), None)
    assert full.steps == [2, 2], 'the failed save must be retried once'
    with pytest.raises(NotSaved, match=r'^7.jpg is broken; not saved: step 1 \(the disk is full\)'):
        stopped_run(tmp_path, monkeypatch, Saves('the disk is full'), UserError('7.jpg is broken'))
    with pytest.raises(UserError, match='^7.jpg is broken$'):
        stopped_run(tmp_path, monkeypatch, Saves(), UserError('7.jpg is broken'))


def test_a_state_whose_save_failed_is_not_reported_as_saved(tmp_path, monkeypatch):
    """A run would stop at a step whose save has failed, without a second attempt and without an error."""
    monkeypatch.setattr(loop, 'SAVE_RETRY_DELAYS', (0,))
    for error, end in (
        (UserError('7.jpg is broken'), pytest.raises(UserError, match='^7.jpg is broken$')),
        (DataStalled(), pytest.raises(Stopped, match='stopped by SIGTERM at step 1, which is saved')),
    ):
        with pytest.raises(NotSaved, match=r'not saved: step 1 \(the disk is full\)'):
            stopped_run(tmp_path, monkeypatch, full := Saves('the disk is full'), error, every=1)
        assert full.steps == [1, 1, 1], 'one save as the config says, and two attempts at the end'
        with end:
            stopped_run(tmp_path, monkeypatch, saves := Saves(), error, every=1)
        assert saves.steps == [1], 'saved twice'


@pytest.mark.parametrize('error', [UserError('0.jpg is broken'), DataStalled()])
def test_nothing_is_saved_before_the_first_step(tmp_path, monkeypatch, capsys, error):
    """A checkpoint of step 0 would prevent changes to a config with which nothing was trained."""
    with pytest.raises(type(error) if isinstance(error, UserError) else Stopped):
        stopped_run(tmp_path, monkeypatch, saves := Saves(), error, after=0)
    assert saves.steps == []
    assert 'saved' not in capsys.readouterr().out


def test_a_signal_in_the_evaluation_at_a_resume_stops_immediately(tmp_path, monkeypatch):
    """A preempted machine would be gone before the run has compiled and done another step."""
    run, stop, evaluated = make_run(get_config(), saves := Saves()), Stop(), []
    step = run.durations.eval_every_steps

    def evaluate(log, at, state, stop, waiting):
        evaluated.append(at)
        stop.received = signal.SIGTERM

    monkeypatch.setattr(run, '_evaluate', evaluate)
    monkeypatch.setattr(run, 'compile', lambda *_: pytest.fail('the run continues'))
    monkeypatch.setattr(loop, 'stop_signal', lambda: contextlib.nullcontext(stop))
    with pytest.raises(Stopped, match=f'at step {step}, which is saved'):
        run.run_steps(SimpleNamespace(step=step), tmp_path)
    assert (evaluated, saves.steps) == ([step], [])


def test_an_evaluation_stops_within_a_batch(tmp_path):
    """A preempted machine would be gone before the remaining images of the split are evaluated."""
    config = get_config()
    config.batch_size = 8
    run, stop, batches = make_run(config, checkpoints=None), Stop(), []

    def eval_step(parameters, batch):
        batches.append(batch)
        stop.received = signal.SIGTERM if len(batches) == 3 else None
        names = ('count', 'loss', 'top1', 'top5', 'bin_hits', 'bin_confidence')
        return Measured(dict.fromkeys(names, np.zeros(()))), np.ones(8)

    run.eval_steps = [eval_step]
    state = jax.eval_shape(run.newly_initialised_state)
    state.ema = {}
    with RunLog(tmp_path, 0, run.durations.total_steps, run.task.headline) as log:
        assert run._evaluate(log, 1, state, stop, ignore_wait) is None
    assert len(batches) == 3
    assert read_records(tmp_path) == []
