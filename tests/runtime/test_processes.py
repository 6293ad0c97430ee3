"""Jobs of two real processes, as on a pod: they train as one, write one set of files and end together."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import SMALL_TRAIN, STEPS, TIMEOUT

import eval as eval_command
from convnext_jax.checkpoints.checkpoint import restore_parameters, saved_steps
from convnext_jax.errors import UserError
from convnext_jax.monitoring.records import read_records
from convnext_jax.runtime import processes
from convnext_jax.training.sharding import batch_sharding, make_mesh
from launch import local

TWO = ('launch/local.py', 2, '--')
JOB = (*TWO, *SMALL_TRAIN)
# Evaluates 200 images after each step, which leaves time to interrupt the run.
SLOW = ('--config.data.eval_split=test[:200]', '--config.eval_every_epochs=0.1')
ENDLESS = ('--config.steps=1000000', '--config.eval_every_epochs=1000')


def losses(workdir: Path) -> list[float]:
    return [record['loss'] for record in read_records(workdir)]


def start_and_wait_for_a_record(commands, run: Path, *arguments: str, step: int = 1):
    """Starts a job and waits until it has logged `step`; returns it, and the ids of its processes in order."""
    job = commands.start(*JOB, f'--workdir={run}', '--config.log_every_steps=1', *arguments)
    while job.poll() is None and step not in [record['step'] for record in read_records(run)]:
        time.sleep(0.05)
    assert job.poll() is None, job.communicate()
    children = map(int, Path(f'/proc/{job.pid}/task/{job.pid}/children').read_text().split())
    return job, sorted(children, key=lambda pid: Path(f'/proc/{pid}/cmdline').read_bytes().split(b'--process_id=')[1])


@pytest.fixture(scope='module')
def two_processes(commands, tmp_path_factory):
    """The small run on two processes: its workdir, and the command with its output."""
    run = tmp_path_factory.mktemp('two') / 'run'
    return run, commands.run(*JOB, f'--workdir={run}')


def test_two_processes_train_as_one(two_processes, finished_run):
    """A recipe tried on one machine would train on other examples, or in another order, on a pod."""
    run, _ = two_processes
    kinds = [[(record['split'], record['step']) for record in read_records(w)] for w in (run, finished_run)]
    assert kinds[0] == kinds[1]
    np.testing.assert_allclose(losses(run), losses(finished_run), rtol=1e-3)


def test_only_the_main_process_writes_and_prints(two_processes, finished_run):
    """Two processes that write to one file would damage it, and a pod of 64 hosts would print each line 64 times."""
    run, done = two_processes
    assert done.stdout.count('devices    2 × cpu, mesh data=2 × fsdp=1, 2 process(es)') == 1
    assert done.stdout.count('finished: top-1') == 1
    assert done.stdout.count('step 24/24') == 2  # of training and of the evaluation
    assert done.stderr == ''
    assert {path.name for path in run.iterdir()} == {path.name for path in finished_run.iterdir()}
    assert len(list((run / 'tensorboard').iterdir())) == 1


def test_one_process_restores_what_two_processes_saved(two_processes, finished_run):
    """A run on a pod could not resume on a pod of another size, or be evaluated on a laptop."""
    run, _ = two_processes
    assert saved_steps(run / 'checkpoints') == saved_steps(finished_run / 'checkpoints')
    ours, one = (restore_parameters(w / 'checkpoints', STEPS, 'ema') for w in (run, finished_run))
    for name, value in one.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-3, err_msg=name)


def test_two_processes_evaluate_as_one(commands, one_device, finished_run, capsys):
    """The accuracy would depend on the number of hosts."""
    outputs = [commands.run(*TWO, 'tests/small.py', 'eval.py', f'--workdir={finished_run}').stdout]
    eval_command.main(['eval.py', f'--workdir={finished_run}'])
    outputs.append(capsys.readouterr().out)
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert results[0]['images'] == 40
    for name, value in results[1].items():
        assert results[0][name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name


def test_two_processes_resume_from_one_checkpoint_and_a_signal_to_one_saves_both(
    commands, train_here, finished_run, tmp_path
):
    """If each process chose its own checkpoint, a damaged one would make them resume at different steps.

    Only the preempted host gets the signal; unless the others save with it, there would be no checkpoint.
    """
    run = shutil.copytree(finished_run, tmp_path / 'run')
    shutil.rmtree(run / 'checkpoints' / str(STEPS) / 'optimizer')
    rarely = '--config.checkpoint_every_steps=1000'
    job, (_, second) = start_and_wait_for_a_record(commands, run, *SLOW, rarely, step=21)
    os.kill(second, signal.SIGTERM)
    out, err = job.communicate(timeout=TIMEOUT)
    assert job.returncode == 128 + signal.SIGTERM, out + err
    assert out.count(f'checkpoint {STEPS} is damaged') == 1
    assert f'resumes at step 20 of {STEPS}' in out
    assert len(list((run / 'damaged').iterdir())) == 1
    step = saved_steps(run / 'checkpoints')[-1]
    assert 20 < step < STEPS
    assert f'stopped by SIGTERM at step {step}, which is saved: run the same command again to resume' in out
    assert 'Traceback' not in err
    resumed = train_here(run, SLOW[0], '--config.eval_every_epochs=100')
    assert f'resumes at step {step} of {STEPS}' in resumed
    ours, unbroken = (restore_parameters(w / 'checkpoints', STEPS, 'parameters') for w in (run, finished_run))
    for name, value in unbroken.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-3, err_msg=name)


def test_when_a_process_is_killed_the_other_ends_with_an_error(commands, tmp_path):
    """After one host failed, the others would wait, and cost money, until somebody noticed."""
    job, (_, second) = start_and_wait_for_a_record(commands, tmp_path / 'run', *ENDLESS, '--process_timeout=20')
    os.kill(second, signal.SIGKILL)
    _, err = job.communicate(timeout=TIMEOUT)
    assert job.returncode == 128 + signal.SIGKILL
    assert sorted(line for line in err.splitlines() if 'preemption' not in line) == [
        'error: process 1 has not responded for 20 s: see its output, and run the same command on all hosts to resume',
        'launch/local.py: process 1 was ended by SIGKILL',
    ]


def test_a_failed_write_of_one_process_ends_all_immediately(commands, tmp_path):
    """The pod would wait for twenty minutes, the timeout of the barriers in Orbax, before it shows the error."""
    job, (_, second) = start_and_wait_for_a_record(commands, tmp_path / 'run', *ENDLESS)
    resource.prlimit(second, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    _, err = job.communicate(timeout=TIMEOUT)
    assert job.returncode == 2, err
    problem = re.search(r'^error: process 1 failed: step (\d+) could not be saved to .*: File too large$', err, re.M)
    assert problem, err
    assert 'Traceback' not in err
    assert all(step < int(problem[1]) for step in saved_steps(tmp_path / 'run' / 'checkpoints'))


def test_when_the_first_process_is_killed_the_other_ends(commands, tmp_path):
    """The other hosts would wait forever. JAX ends them when it loses its coordination service in process 0."""
    job, (first, _) = start_and_wait_for_a_record(commands, tmp_path / 'run', *ENDLESS, '--process_timeout=20')
    os.kill(first, signal.SIGKILL)
    _, err = job.communicate(timeout=TIMEOUT)
    assert job.returncode == 128 + signal.SIGKILL
    assert 'launch/local.py: process 0 was ended by SIGKILL' in err
    assert 'another task died' in err


def test_an_error_of_one_process_ends_all_and_each_shows_it(commands, tmp_path):
    """The other hosts would wait for one that has failed, here because the shared folder is not mounted on it."""
    with socket.create_server(('127.0.0.1', 0)) as free:
        flags = (f'--coordinator=127.0.0.1:{free.getsockname()[1]}', '--process_count=2')
    processes = [
        commands.start(*SMALL_TRAIN, f'--workdir={tmp_path / str(number)}', *flags, f'--process_id={number}')
        for number in range(2)
    ]
    errors = [process.communicate(timeout=TIMEOUT)[1].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    text = f'workdir {tmp_path / "1"} differs from the one of process 0: all hosts must share a file system'
    assert errors == [[f'error: process 1 failed: {text}'], [f'error: {text}']]


@pytest.mark.parametrize(
    ('process', 'line'),
    [
        (0, 'error: not all of 2 processes have connected within 4 s: '),
        (1, 'error: there is no coordinator at 127.0.0.1:1 (Connection refused) within 4 s: '),
    ],
)
def test_a_process_that_cannot_connect_to_the_others_ends(commands, tmp_path, process, line):
    """With a wrong address in a script, a pod would wait forever."""
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1] if process == 0 else 1
    flags = (f'--coordinator=127.0.0.1:{port}', '--process_count=2', f'--process_id={process}', '--process_timeout=4')
    refused = commands.run(*SMALL_TRAIN, f'--workdir={tmp_path}', *flags, status=1)
    assert [text.startswith(line) for text in refused.stderr.splitlines()] == [True]
    assert refused.stdout == ''


@pytest.mark.parametrize(
    ('flags', 'problem'),
    [
        (('10.0.0.1:8476', 2, None), 'give all three of'),
        (('10.0.0.1', 2, 0), "HOST:PORT, for example 10.0.0.1:8476, not '10.0.0.1'"),
        (('10.0.0.1:8476', 2, 2), 'must be between 0 and process_count − 1 = 1'),
    ],
)
def test_inconsistent_flags_are_refused_immediately(flags, problem):
    """Users would learn of a wrong flag only after the timeout."""
    with pytest.raises(UserError, match=problem):
        processes.start(*flags, timeout=60)


def test_processes_of_open_mpi_5_are_refused(monkeypatch):
    """JAX does not detect Open MPI 5: each process would be a job of its own, and all but one would find a lock."""
    monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '4')
    with pytest.raises(UserError, match='mpirun started 4 processes, but JAX detects only Open MPI 4'):
        processes.start(None, None, None, timeout=60)


def test_a_host_name_that_the_others_cannot_use_is_explained(monkeypatch):
    """On Debian, the name of a host resolves to 127.0.1.1, and users would see a traceback from gloo."""

    def fail(_):
        raise jax.errors.JaxRuntimeError('UNKNOWN: Gloo context initialization failed: Connection refused')

    monkeypatch.setattr(processes, 'all_gather_objects', fail)
    with pytest.raises(UserError, match='must resolve to an address that the other hosts can reach'):
        processes.connect_devices()


def test_each_process_loads_the_examples_of_its_own_devices():
    """A batch would be in another order on a mesh where the devices of a host are not neighbours."""
    mesh = make_mesh(-1)
    assert list(processes.local_batch_indices(batch_sharding(mesh), 16)) == list(range(16))

    class Scattered:
        def addressable_devices_indices_map(self, shape):
            return {0: (slice(8, 12),), 1: (slice(None, 4),)}

    assert processes.local_batch_indices(Scattered(), 16) == [0, 1, 2, 3, 8, 9, 10, 11]


def test_one_process_alone_is_a_complete_job():
    """A run on a laptop would wait for other processes, or print nothing."""
    assert processes.all_gather_objects({'a': 1}) == [{'a': 1}]
    assert processes.is_main_process()
    assert not processes.is_multiprocess()
    np.testing.assert_array_equal(processes.make_global_array(np.arange(3), jax.devices()[0]), [0, 1, 2])


def test_the_local_launcher_ends_all_when_one_fails(monkeypatch, capfd):
    """A job would hang, or exit with status 0, although a process failed."""
    monkeypatch.setattr(local, 'EXIT_TIMEOUT', 0.5)
    code = 'import sys, time; last = sys.argv[-1] == "--process_id=1"; sys.exit(7) if last else time.sleep(100)'
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert local.main(['launch/local.py', '2', '--', '-c', code]) == 7
        assert local.main(['launch/local.py', '2', '--', '-c', 'pass']) == 0
        assert local.main(['launch/local.py', 'train.py']) == 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert 'process 1 ended with status 7' in capfd.readouterr().err
