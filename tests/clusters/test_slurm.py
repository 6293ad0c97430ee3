"""launch/slurm.sh on a real Slurm, whose two nodes are simulated on this machine."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from conftest import ONE_DEVICE, ROOT, SMALL_RUN, fingerprints
from slurm_cluster import ENDED, Slurm, missing_programs, wait_for
from small_clone import make_small_clone

from convnext_jax.config import read_config
from convnext_jax.monitoring.records import read_records

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(missing_programs()), reason=f'not installed: {", ".join(missing_programs())}'),
]
STEPS = 80
TWO_NODES = ('--nodes=2', '--ntasks-per-node=2', '--gpus-per-node=2', '--cpus-per-task=2')
ONE_PROCESS = ('--nodes=1', '--ntasks-per-node=1', '--gpus-per-node=1', '--cpus-per-task=2')


class Jobs:
    """Submits launch/slurm.sh to a cluster.

    Args:
        slurm: the running cluster.
        folder: folder for the workdirs.
        clone: folder in which the jobs run.
    """

    def __init__(self, slurm: Slurm, folder: Path, clone: Path):
        self.slurm, self.folder, self._clone = slurm, folder, clone

    def submit(self, name: str, *arguments: str, options: tuple[str, ...] = TWO_NODES, **variables: str) -> str:
        """Submits a run of the workdir folder/name, and returns the id of its job."""
        script = str(ROOT / 'launch' / 'slurm.sh')
        files = (f'--job-name={name}', f'--output={self.folder}/%x.log', f'--chdir={self._clone}')
        # If a flag is given twice, its last value counts.
        run = (*SMALL_RUN, f'--config.steps={STEPS}', '--config.log_every_steps=1', f'--workdir={self.folder / name}')
        self.slurm.environment |= ONE_DEVICE | {'STEP_SECONDS': '0', 'SLOW_PROCESS': ''} | variables
        return self.slurm('sbatch', '--parsable', *files, *options, script, *run, *arguments).strip()

    def wait_for_steps(self, name: str, count: int) -> None:
        """Waits until a run has trained `count` more steps."""

        def step() -> int:
            return max((record['step'] for record in read_records(self.folder / name)), default=0)

        begin = step()
        wait_for(lambda: step() >= begin + count, 600, lambda: self.log(name))

    def wait_for_restart(self, job: str, count: int) -> None:
        """Waits until a job runs again after its `count`-th requeue."""

        def restarted() -> bool:
            fields = self.slurm.job(job)
            return (fields['JobState'], fields['Restarts']) == ('RUNNING', str(count))

        wait_for(restarted, 600, lambda: str(self.slurm.job(job)))

    def log(self, name: str) -> str:
        """The output of the job of a run."""
        path = self.folder / f'{name}.log'
        return path.read_text() if path.exists() else ''


@pytest.fixture(scope='module')
def jobs(tmp_path_factory):
    """A cluster of two nodes."""
    folder = tmp_path_factory.mktemp('slurm')
    (folder / 'clone').mkdir()
    with Slurm(nodes=2) as slurm:
        yield Jobs(slurm, folder, make_small_clone(folder / 'clone'))


@pytest.fixture(scope='module')
def unbroken(jobs):
    """A run of two nodes with two processes each that nothing interrupts; the last process is slow."""
    return jobs.submit('unbroken', STEP_SECONDS='0.5', SLOW_PROCESS='3')


def test_two_nodes_train_as_one_job(jobs, unbroken):
    """A job would train one model in each process, print every line four times, or hide which host is slow."""
    job = jobs.slurm.wait_for_state(unbroken, *ENDED)
    log = jobs.log('unbroken')
    assert (job['JobState'], job['ExitCode'], job['Restarts']) == ('COMPLETED', '0:0', '0'), log
    assert log.count('devices    4 × cpu, mesh data=4 × fsdp=1, 4 process(es)') == 1
    assert log.count('finished: top-1') == 1
    assert re.search(r'^process 3 \(.+\) delays the others: it spends 5\d\d ms of a', log, re.M), log


def requeue(slurm, job, _workdir):
    slurm('scontrol', 'requeue', job)


def send_sigterm(slurm, job, _workdir):
    slurm('scancel', '--signal=TERM', job)


def reach_the_time_limit(slurm, job, _workdir):
    slurm('scontrol', 'update', f'JobId={job}', 'TimeLimit=3')  # SIGTERM is due three minutes before the limit
    slurm.wait_for_state(job, 'PENDING')
    slurm('scontrol', 'update', f'JobId={job}', 'TimeLimit=60')


def preempt(slurm, job, _workdir):
    other = slurm(
        'sbatch', '--parsable', '--partition=high', '--nodes=2', '--exclusive', '--output=/dev/null', '--wrap=true'
    )
    slurm.wait_for_state(other.strip(), 'COMPLETED')
    assert job


def set_a_node_down(slurm, job, _workdir):
    slurm('scontrol', 'update', f'NodeName={slurm.nodes[1]}', 'State=DOWN', 'Reason=test')
    slurm.wait_for_state(job, 'PENDING')
    slurm('scontrol', 'update', f'NodeName={slurm.nodes[1]}', 'State=RESUME')


def kill_a_process(_slurm, _job, workdir):
    os.kill(process_of(workdir, 3), signal.SIGKILL)


def kill_the_first_process(_slurm, _job, workdir):
    os.kill(process_of(workdir, 0), signal.SIGKILL)


def process_of(workdir, number):
    """The id of the process with this SLURM_PROCID that runs train.py with this workdir."""
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            command, environment = ((folder / name).read_bytes().split(b'\0') for name in ('cmdline', 'environ'))
        except OSError:
            continue  # it has ended
        trains = command[1:2] == [b'train.py'] and f'--workdir={workdir}'.encode() in command
        if trains and f'SLURM_PROCID={number}'.encode() in environment:
            return int(folder.name)
    return pytest.fail(f'there is no process {number} of {workdir}')


INTERRUPTIONS = {
    requeue: True,
    send_sigterm: True,
    reach_the_time_limit: True,
    preempt: True,
    set_a_node_down: None,  # the simulated node still runs, and may save
    kill_a_process: False,
    kill_the_first_process: False,
}
"""What interrupts a job → whether the run saves before it stops."""


def test_an_interrupted_job_is_requeued_and_its_result_does_not_change(jobs, unbroken):
    """Hours of training would be lost, or the job would stay out of the queue until somebody noticed."""
    workdir = jobs.folder / 'interrupted'
    job = jobs.submit('interrupted', STEP_SECONDS='1')
    for number, (interrupt, saves) in enumerate(INTERRUPTIONS.items()):
        jobs.wait_for_steps('interrupted', 3)
        stops = jobs.log('interrupted').count('stopped by SIGTERM at step')
        interrupt(jobs.slurm, job, workdir)
        jobs.wait_for_restart(job, number + 1)
        log = jobs.log('interrupted')
        assert log.count('stopped by SIGTERM at step') - stops in ({True, False} if saves is None else {saves}), log
        print(f'{interrupt.__name__}: requeued')
    ended = jobs.slurm.wait_for_state(job, *ENDED)
    log = jobs.log('interrupted')
    assert (ended['JobState'], ended['Restarts']) == ('COMPLETED', str(len(INTERRUPTIONS))), log
    assert log.count('resumes at step') == len(INTERRUPTIONS), log
    assert 'Traceback' not in log
    assert jobs.slurm.wait_for_state(unbroken, *ENDED)['JobState'] == 'COMPLETED'
    assert fingerprints(workdir, STEPS) == fingerprints(jobs.folder / 'unbroken', STEPS)


def test_a_job_of_one_process_saves_too(jobs):
    """Slurm signals the process and the script: a second SIGTERM would end a single process before it has saved."""
    job = jobs.submit('one', options=ONE_PROCESS, STEP_SECONDS='0.5')
    jobs.wait_for_steps('one', 6)
    jobs.slurm('scontrol', 'requeue', job)
    assert jobs.slurm.wait_for_state(job, *ENDED)['JobState'] == 'COMPLETED', jobs.log('one')
    assert 'stopped by SIGTERM at step' in jobs.log('one')


def test_an_error_of_the_user_ends_the_job_once(jobs):
    """The job would fail again each time it leaves the queue."""
    job = jobs.submit('error', '--config.batch_size=15')
    ended = jobs.slurm.wait_for_state(job, *ENDED)
    assert (ended['JobState'], ended['ExitCode'], ended['Restarts']) == ('FAILED', '2:0', '0'), jobs.log('error')
    assert 'error: ' in jobs.log('error')


def test_a_job_that_always_fails_is_not_requeued_without_end(jobs):
    """A job that runs out of memory would start again and again, and use the budget of its user."""
    script = jobs.folder / 'few.sh'
    script.write_text((ROOT / 'launch/slurm.sh').read_text().replace('MAX_RESTARTS=10', 'MAX_RESTARTS=1'))
    (jobs.folder / 'train.py').write_text('raise SystemError')
    (jobs.folder / '.venv').symlink_to(sys.prefix)
    options = (f'--chdir={jobs.folder}', f'--output={jobs.folder}/few.log')
    job = jobs.slurm('sbatch', '--parsable', *options, *ONE_PROCESS, str(script)).strip()
    ended = jobs.slurm.wait_for_state(job, *ENDED)
    log = (jobs.folder / 'few.log').read_text()
    assert (ended['JobState'], ended['Restarts']) == ('FAILED', '1'), log
    assert log.count('the job is requeued') == 1
    assert 'after 1 restarts' in log


def test_an_array_trains_several_runs(jobs):
    """Users would write a script for each run of a sweep."""
    job = jobs.submit('seed%a', '--config.seed=%a', options=(*ONE_PROCESS, '--array=1-2'))
    for task in (1, 2):
        assert jobs.slurm.wait_for_state(f'{job}_{task}', *ENDED)['JobState'] == 'COMPLETED', jobs.log('seed%a')
    configs = [read_config(jobs.folder / f'seed{task}' / 'config.json') for task in (1, 2)]
    assert [config.seed for config in configs] == [1, 2]


def test_a_cancelled_job_is_not_requeued(jobs):
    """A user could not end a job with `scancel`: it would start again and again."""
    job = jobs.submit('cancelled', options=ONE_PROCESS, STEP_SECONDS='0.5')
    jobs.wait_for_steps('cancelled', 2)
    jobs.slurm('scancel', job)
    ended = jobs.slurm.wait_for_state(job, *ENDED)
    assert (ended['JobState'], ended['Restarts']) == ('CANCELLED', '0'), jobs.log('cancelled')
    assert 'resume' in jobs.log('cancelled')  # the run is saved


def test_each_process_gets_the_cpus_of_the_job(jobs):
    """The images would be decoded on one CPU of each process.

    With SLURM_EXACT, a step gets the CPUs that srun requests, not all CPUs of the job.
    """
    job = jobs.submit('cpus', options=(*ONE_PROCESS, '--export=ALL,SLURM_EXACT=1'), STEP_SECONDS='60')
    jobs.slurm.wait_for_state(job, 'RUNNING')
    wait_for(lambda: f'StepId={job}.0' in jobs.slurm('scontrol', 'show', 'step'))
    step = jobs.slurm('scontrol', 'show', 'step', f'{job}.0')
    jobs.slurm('scancel', job)
    jobs.slurm.wait_for_state(job, *ENDED)
    assert 'CPUs=2' in step
