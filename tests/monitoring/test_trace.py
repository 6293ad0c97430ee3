"""Traces hold the requested steps, and are written where TensorBoard looks for them."""

import contextlib
import signal
import time

import jax
import jax.numpy as jnp
import pytest
from conftest import SMALL_TRAIN, TIMEOUT

from convnext_jax.checkpoints.checkpoint import saved_steps
from convnext_jax.errors import UserError
from convnext_jax.monitoring.records import read_records
from convnext_jax.monitoring.trace import ProfileWindow, Trace


def traced_steps(folder):
    """The numbers of the steps in the only trace below the TensorBoard folder of a run."""
    (path,) = folder.glob('plugins/profile/*/*.xplane.pb')
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
        if event.name == 'train'
    ]
    return sorted(int(dict(event.stats)['step_num']) for event in events)


@pytest.mark.parametrize(('steps', 'traced'), [(9, [12, 13, 14]), (4, [12, 13])])
def test_whole_steps_of_the_window_are_traced(tmp_path, steps, traced):
    """Users would see other steps than they asked for: `--profile` counts from step 10, where this run resumes."""
    said = []
    with Trace(ProfileWindow(2, 3), tmp_path, 100, contextlib.nullcontext, said.append) as trace:
        for step in range(10, 10 + steps):
            with trace.step(step):
                jnp.zeros(8).block_until_ready()
    assert traced_steps(tmp_path) == traced
    assert len(said) == 1
    assert str(tmp_path) in said[0]


def test_an_error_within_the_window_still_leaves_the_trace(tmp_path):
    """The trace would be missing when users need it most, after a run failed."""

    def fail():
        with Trace(ProfileWindow(0, 3), tmp_path, 100, contextlib.nullcontext, print) as trace:
            for step in range(2):
                with trace.step(step):
                    if step:
                        raise UserError('broken')

    with pytest.raises(UserError, match='broken'):
        fail()
    assert traced_steps(tmp_path) == [0, 1]


def test_a_window_without_steps_is_refused_or_reported(tmp_path):
    """Users would wait for a trace that is never written."""
    for text in ('5', '5:', '-1:2', '5:0', 'a:b', '1:2:3'):
        with pytest.raises(UserError, match='--profile needs START:STEPS'):
            ProfileWindow.parse(text)
    assert ProfileWindow.parse('20:5') == ProfileWindow(20, 5)
    with pytest.raises(UserError, match='--profile=20:5, but only 20 steps are left'):
        Trace(ProfileWindow(20, 5), tmp_path, 20, contextlib.nullcontext, print)
    said = []
    with Trace(ProfileWindow(2, 3), tmp_path, 100, contextlib.nullcontext, said.append) as trace, trace.step(0):
        pass
    assert said == ['no trace: the run stopped before step 3 of this process']


def test_a_run_stopped_in_the_window_writes_its_trace_and_caches_the_compiled_step(commands, tmp_path):
    """A preempted run would lose its trace, and the next start would compile its programs again."""
    run, cache = tmp_path / 'run', tmp_path / 'deep' / 'cache'
    arguments = ('--profile=2:100000', '--config.steps=100000', f'--config.compilation_cache_dir={cache}')
    process = commands.start(*SMALL_TRAIN, f'--workdir={run}', '--config.log_every_steps=5', *arguments)
    while process.poll() is None and not read_records(run):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + signal.SIGTERM, out + err
    last = saved_steps(run / 'checkpoints')[-1]
    assert traced_steps(run / 'tensorboard') == list(range(2, last))
    assert f'the trace is in {run}/tensorboard/plugins/profile' in out
    assert list(cache.glob('jit_train_step*'))
