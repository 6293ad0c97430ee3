"""A job of sixteen processes on this machine, with one CPU device each."""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ONE_DEVICE, ROOT, SMALL_TRAIN, TIMEOUT

from convnext_jax.checkpoints.checkpoint import saved_steps
from convnext_jax.monitoring.records import read_records

pytestmark = pytest.mark.cluster
COUNT = 16
SILENCE = 120
"""`--process_timeout` in seconds. On two cores, the processes need a minute to start."""


def start(*arguments):
    """Starts a command in all processes."""
    with socket.create_server(('127.0.0.1', 0)) as free:
        coordinator = f'127.0.0.1:{free.getsockname()[1]}'
    flags = (f'--coordinator={coordinator}', f'--process_count={COUNT}', f'--process_timeout={SILENCE}')
    return [
        subprocess.Popen(
            [sys.executable, *arguments, *flags, f'--process_id={number}'],
            cwd=ROOT,
            env=os.environ | ONE_DEVICE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(COUNT)
    ]


def end(processes):
    """Waits for the end of all processes; returns their exit statuses, outputs and errors."""
    outputs, errors = zip(*[process.communicate(timeout=TIMEOUT) for process in processes], strict=True)
    return [process.returncode for process in processes], outputs, errors


def wait_for_step(processes, run, step):
    until = time.monotonic() + TIMEOUT
    while max([record['step'] for record in read_records(run)], default=0) < step:
        assert [process.poll() for process in processes] == [None] * COUNT, end(processes)
        assert time.monotonic() < until
        time.sleep(0.2)


def peak_memory(pid):
    """The peak of the resident memory of a process, in MB."""
    (line,) = [line for line in Path(f'/proc/{pid}/status').read_text().splitlines() if line.startswith('VmHWM')]
    return int(line.split()[1]) / 1000


def processor_seconds(pid):
    fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def show_cost(what, measure, processes):
    first, *others = [measure(process.pid) for process in processes]
    print(f'{what}: process 0 {first:.1f}, median of the others {statistics.median(others):.1f}')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return tmp_path_factory.mktemp('many') / 'run'


ENDLESS = ('--config.steps=1000000', '--config.eval_every_epochs=100000', '--config.log_every_steps=1')


def test_a_signal_to_one_process_saves_all_at_one_step(run):
    """A pod of many hosts would lose the steps since its last checkpoint, or its hosts would save different steps."""
    began = time.monotonic()
    processes = start(*SMALL_TRAIN, *ENDLESS, '--config.checkpoint_every_steps=100000', f'--workdir={run}')
    wait_for_step(processes, run, 1)
    print(f'first step after {time.monotonic() - began:.0f} s')
    wait_for_step(processes, run, 20)
    show_cost('peak memory in MB', peak_memory, processes)
    show_cost('processor time in s', processor_seconds, processes)
    began = time.monotonic()
    processes[7].send_signal(signal.SIGTERM)
    statuses, outputs, errors = end(processes)
    print(f'saved and ended after {time.monotonic() - began:.1f} s')
    assert statuses == [143] * COUNT, errors
    (step,) = saved_steps(run / 'checkpoints')
    assert f'stopped by SIGTERM at step {step}, which is saved' in outputs[0]
    assert ''.join(outputs[1:]) == ''


def test_many_processes_evaluate_as_one(run, commands):
    """The accuracy would depend on the number of hosts."""
    began = time.monotonic()
    statuses, outputs, errors = end(start('tests/small.py', 'eval.py', f'--workdir={run}'))
    print(f'evaluated after {time.monotonic() - began:.0f} s')
    assert statuses == [0] * COUNT, errors
    one = commands.run('tests/small.py', 'eval.py', f'--workdir={run}').stdout
    results = [json.loads(output.splitlines()[-1]) for output in (outputs[0], one)]
    assert results[0]['images'] == 40
    for name, value in results[1].items():
        assert results[0][name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name


def test_all_processes_end_with_one_line_when_one_is_lost(run):
    """A stack trace of JAX would hide the reason on the other hosts."""
    processes = start(*SMALL_TRAIN, *ENDLESS, f'--workdir={run}')
    before = max(record['step'] for record in read_records(run))
    wait_for_step(processes, run, before + 1)
    processes[9].kill()
    began = time.monotonic()
    statuses, _, errors = end(processes)
    print(f'ended after {time.monotonic() - began:.0f} s')
    assert statuses == [1 if number != 9 else -signal.SIGKILL for number in range(COUNT)], errors
    line = (
        f'error: process 9 has not responded for {SILENCE} s: see its output, and run the same command on all hosts to '
        'resume'
    )
    for number, text in enumerate(errors):
        assert [text for text in text.splitlines() if 'error' in text.lower()] == ([line] if number != 9 else [])
