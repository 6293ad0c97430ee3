"""A run that is told to stop saves first: the real loop, and the loop on steps that cost nothing."""

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
from conftest import LONGEST, SMALL_TRAIN, STEPS, fingerprints

from configs.fashion_mnist import get_config
from convnext_jax.checkpoints.checkpoint import saved_steps
from convnext_jax.checkpoints.manager import NotSaved
from convnext_jax.data.loading import no_word
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
def test_told_to_stop_it_saves_first_and_says_how_to_resume(commands, finished_run, tmp_path, number):
    run = tmp_path / 'run'
    process = commands.start(*SMALL_TRAIN, f'--workdir={run}', '--config.checkpoint_every_steps=1000')
    while process.poll() is None and not read_records(run):
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=LONGEST)
    assert process.returncode == 128 + number, out + err
    assert 'Traceback' not in err
    step = saved_steps(run / 'checkpoints')[-1]
    assert f'stopped by {number.name} at step {step}, saved; the same command resumes it' in out
    assert 4 <= step < STEPS
    if number == signal.SIGTERM:
        resumed = commands.train(run, '--config.checkpoint_every_steps=1000')
        assert f'resumes at step {step} of {STEPS}' in resumed.stdout
        assert fingerprints(run) == fingerprints(finished_run)


def test_told_to_stop_in_an_evaluation_it_saves_at_once_and_evaluates_when_resumed(train_here, tmp_path):
    """An evaluation of ImageNet takes longer than the notice that a preempted machine is given."""
    run = tmp_path / 'run'
    split = 'test[:400]'
    arguments = (
        f'--config.data.eval_split={split}',
        '--config.log_every_steps=10',
        '--config.checkpoint_every_steps=1000',
    )
    ended = threading.Event()

    def notice():
        while not read_records(run):
            if ended.wait(0.01):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=notice)
    thread.start()
    try:
        with pytest.raises(Stopped, match='stopped by SIGTERM at step 10, saved') as stopped:
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
    """A training step that costs nothing."""

    def lower(self, *_):
        return self

    def compile(self, options=None):
        names = ('loss', 'learning_rate', 'grad_norm', 'param_norm', 'skipped', 'skips_in_a_row')
        metrics = dict.fromkeys(names, np.zeros(()))
        return lambda state, batch: (state, metrics)


class Saves:
    """Checkpoints in name: remembers what it was told to save; with an `error`, every save fails."""

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
    """Runs for so many steps, then come a signal and the error, if there is one."""
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
    run.go(SimpleNamespace(step=0), tmp_path)


def test_a_stop_hides_no_error(tmp_path, monkeypatch):
    """A save that fails, or a broken image, in the moment of the signal: 'saved' would be a lie."""
    monkeypatch.setattr(loop, 'SAVE_AGAIN', (0,))
    with pytest.raises(
        NotSaved, match=r'^not saved: step 2 \(the disk is full\); there is no checkpoint yet. Free disk space'
    ):
        stopped_run(tmp_path, monkeypatch, full := Saves('the disk is full'), None)
    assert full.steps == [2, 2], 'not tried again'
    with pytest.raises(NotSaved, match=r'^7.jpg is broken; not saved: step 1 \(the disk is full\)'):
        stopped_run(tmp_path, monkeypatch, Saves('the disk is full'), UserError('7.jpg is broken'))
    with pytest.raises(UserError, match='^7.jpg is broken$'):
        stopped_run(tmp_path, monkeypatch, Saves(), UserError('7.jpg is broken'))


def test_a_state_whose_save_failed_is_not_told_as_saved(tmp_path, monkeypatch):
    """The save of the very step that the run stops at has failed: it is tried again, and its end is told."""
    monkeypatch.setattr(loop, 'SAVE_AGAIN', (0,))
    for error, end in (
        (UserError('7.jpg is broken'), pytest.raises(UserError, match='^7.jpg is broken$')),
        (DataStalled(), pytest.raises(Stopped, match='stopped by SIGTERM at step 1, saved')),
    ):
        with pytest.raises(NotSaved, match=r'not saved: step 1 \(the disk is full\)'):
            stopped_run(tmp_path, monkeypatch, full := Saves('the disk is full'), error, every=1)
        assert full.steps == [1, 1, 1], 'as the config says, and twice at the end'
        with end:
            stopped_run(tmp_path, monkeypatch, saves := Saves(), error, every=1)
        assert saves.steps == [1], 'saved twice'


@pytest.mark.parametrize('error', [UserError('0.jpg is broken'), DataStalled()])
def test_before_the_first_step_there_is_nothing_to_save(tmp_path, monkeypatch, capsys, error):
    """'saved at step 0' would be a lie, and a checkpoint of it would fix a config that nothing was trained with."""
    with pytest.raises(type(error) if isinstance(error, UserError) else Stopped):
        stopped_run(tmp_path, monkeypatch, saves := Saves(), error, after=0)
    assert saves.steps == []
    assert 'saved' not in capsys.readouterr().out


def test_a_signal_in_an_evaluation_made_up_for_stops_at_once(tmp_path, monkeypatch):
    """Compiling and one more step could take longer than the notice of a preemption."""
    run, stop, evaluated = make_run(get_config(), saves := Saves()), Stop(), []
    step = run.durations.eval_every_steps

    def evaluate(log, at, state, stop, waiting):
        evaluated.append(at)
        stop.received = signal.SIGTERM

    monkeypatch.setattr(run, '_evaluate', evaluate)
    monkeypatch.setattr(run, 'compile', lambda *_: pytest.fail('goes on'))
    monkeypatch.setattr(loop, 'stop_signal', lambda: contextlib.nullcontext(stop))
    with pytest.raises(Stopped, match=f'at step {step}, saved'):
        run.go(SimpleNamespace(step=step), tmp_path)
    assert (evaluated, saves.steps) == ([step], [])


def test_an_evaluation_stops_within_a_batch(tmp_path):
    """Of 1,000 images in batches of 8, none is evaluated after the signal."""
    config = get_config()
    config.batch_size = 8
    run, stop, batches = make_run(config, checkpoints=None), Stop(), []

    def eval_step(parameters, batch):
        batches.append(batch)
        stop.received = signal.SIGTERM if len(batches) == 3 else None
        names = ('count', 'loss', 'top1', 'top5', 'bin_hits', 'bin_confidence')
        return Measured(dict.fromkeys(names, np.zeros(()))), np.ones(8)

    run.eval_step = eval_step
    state = jax.eval_shape(run.fresh_state)
    state.ema = {}
    with RunLog(tmp_path, 0, run.durations.total_steps, run.task.headline) as log:
        assert run._evaluate(log, 1, state, stop, no_word) is None
    assert len(batches) == 3
    assert read_records(tmp_path) == []
