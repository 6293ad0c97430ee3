"""train.py under mpirun of Open MPI 4, whose processes JAX connects without flags."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ONE_DEVICE, SMALL_RUN, TIMEOUT, fingerprints, kill
from small_clone import make_small_clone

from convnext_jax.monitoring.records import read_records


def version() -> str:
    """The version of the installed Open MPI, or ''."""
    if not shutil.which('mpirun'):
        return ''
    text = subprocess.run(['mpirun', '--version'], capture_output=True, text=True).stdout
    return ''.join(re.findall(r'Open MPI\) (\S+)', text))


pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        not version().startswith('4.'), reason=f'Open MPI 4 is needed, installed is {version() or None}'
    ),
]
STEPS = 60
# When mpirun ends its processes, it waits this number of seconds before SIGTERM, and again before SIGKILL.
MPIRUN = ('mpirun', '-n', '4', '--oversubscribe', '--mca', 'odls_base_sigkill_timeout', '20')


class Mpi:
    """Starts small runs of four processes."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / 'clone').mkdir()
        self._clone = make_small_clone(folder / 'clone')

    def start(self, name: str, *arguments: str, **variables: str) -> subprocess.Popen:
        """Starts a run of the workdir folder/name."""
        run = (*SMALL_RUN, f'--config.steps={STEPS}', '--config.log_every_steps=1', f'--workdir={self.folder / name}')
        root = {'OMPI_ALLOW_RUN_AS_ROOT': '1', 'OMPI_ALLOW_RUN_AS_ROOT_CONFIRM': '1'}
        return subprocess.Popen(
            [*MPIRUN, '.venv/bin/python', 'train.py', *run, *arguments],
            cwd=self._clone,
            env=os.environ | ONE_DEVICE | root | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start_slowly(self, name: str) -> tuple[subprocess.Popen, list[int]]:
        """Like `start`, with slow steps. Returns when the run has trained three steps, with its process ids."""
        before = len(read_records(self.folder / name))
        job = self.start(name, STEP_SECONDS='1')
        until = time.monotonic() + TIMEOUT
        while len(read_records(self.folder / name)) < before + 3:
            assert job.poll() is None, job.communicate()
            assert time.monotonic() < until
            time.sleep(0.1)
        children = Path(f'/proc/{job.pid}/task/{job.pid}/children').read_text().split()
        return job, sorted(map(int, children))


def end(job: subprocess.Popen) -> tuple[int, str]:
    """Waits for the end of a job; returns its exit status and its output."""
    try:
        output, _ = job.communicate(timeout=TIMEOUT)
    finally:
        kill([job.pid])
    return job.returncode, output


@pytest.fixture(scope='module')
def mpi(tmp_path_factory):
    return Mpi(tmp_path_factory.mktemp('mpi'))


@pytest.fixture(scope='module')
def unbroken(mpi):
    """A run that nothing interrupted: its exit status and its output."""
    return end(mpi.start('unbroken'))


def test_mpirun_trains_one_job(unbroken):
    """Each process would train its own model, or print every line."""
    status, output = unbroken
    assert status == 0, output
    assert output.count('devices    4 × cpu, mesh data=4 × fsdp=1, 4 process(es)') == 1
    assert output.count('finished: top-1') == 1


def test_an_interrupted_job_resumes_as_if_it_had_not_been(mpi, unbroken):
    """Hours of training would be lost, or the other processes would wait forever."""
    interruptions = [
        (send_sigterm_to_a_process, 143, True),
        (send_sigterm_to_mpirun, 1, True),
        (kill_a_process, 137, False),
    ]
    for interrupt, status, saves in interruptions:
        job, children = mpi.start_slowly('interrupted')
        interrupt(job, children)
        ended, output = end(job)
        print(f'{interrupt.__name__}: status {ended}')
        assert (ended, output.count('stopped by SIGTERM at step')) == (status, saves), output
    status, output = end(mpi.start('interrupted'))
    assert status == 0, output
    assert 'resumes at step' in output
    assert fingerprints(mpi.folder / 'interrupted', STEPS) == fingerprints(mpi.folder / 'unbroken', STEPS)


def send_sigterm_to_a_process(_job, children):
    os.kill(children[2], signal.SIGTERM)


def send_sigterm_to_mpirun(job, _children):
    os.kill(job.pid, signal.SIGTERM)


def kill_a_process(_job, children):
    os.kill(children[2], signal.SIGKILL)


def test_an_error_of_the_user_ends_the_job_with_status_2(mpi):
    """A script around mpirun could not tell an error of the user from a lost process."""
    status, output = end(mpi.start('error', '--config.batch_size=15'))
    assert status == 2, output
    assert 'error: ' in output
    assert 'Traceback' not in output
