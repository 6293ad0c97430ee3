"""A Slurm cluster on this machine: munged, slurmctld and one slurmd for each node, in a temporary folder.

Slurm runs as the user of the tests, with its own key, configuration and ports, so an installed Slurm is not touched.
The nodes are named 127.0.0.1, 127.0.0.2 and so on, because JAX connects to the name of a node, and Linux answers on all
of these addresses. Their CPUs and GPUs are simulated.
"""

import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'scontrol', 'scancel')
ENDED = ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL')
"""The states of a job that will not run again."""

CONFIG = """
ClusterName=tests
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=1
MinJobAge=86400
SchedulerParameters=batch_sched_delay=1,sched_interval=2
KillWait={kill_wait}
JobRequeue=1
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""
NODE = 'NodeName={name} NodeAddr={name} NodeHostname=localhost Port={port} CPUs=8 RealMemory=1000 Gres=gpu:2'


def missing_programs() -> list[str]:
    """The programs of Slurm and MUNGE that are not installed. Debian has the daemons in /usr/sbin."""
    return [name for name in PROGRAMS if not program(name)]


def program(name: str) -> str | None:
    return shutil.which(name, path=f'{os.environ["PATH"]}:/usr/sbin:/usr/local/sbin')


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(('127.0.0.1', 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


class Slurm:
    """A running cluster. Use as a context manager: leaving it cancels all jobs and stops all daemons.

    Args:
        nodes: number of nodes.
        kill_wait: seconds between SIGTERM and SIGKILL when Slurm ends a job.
    """

    def __init__(self, nodes: int, kill_wait: int = 30):
        self.folder = Path(tempfile.mkdtemp(prefix='slurm'))  # short, because the path of a socket has 108 bytes
        self.nodes = [f'127.0.0.{number + 1}' for number in range(nodes)]
        self._daemons: list[subprocess.Popen] = []
        controller_port, *ports = free_ports(nodes + 1)
        lines = [NODE.format(name=name, port=port) for name, port in zip(self.nodes, ports, strict=True)]
        values = {'folder': self.folder, 'user': getpass.getuser(), 'controller_port': controller_port}
        config = CONFIG.format(**values, kill_wait=kill_wait, nodes='\n'.join(lines))
        (self.folder / 'slurm.conf').write_text(config)
        (self.folder / 'gres.conf').write_text('Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n')
        (self.folder / 'cgroup.conf').write_text('CgroupPlugin=cgroup/v1\n')
        (self.folder / 'state').mkdir()
        self.environment = os.environ | {'SLURM_CONF': str(self.folder / 'slurm.conf')}

    def __enter__(self) -> 'Slurm':
        try:
            self._start_munge()
            self._start('slurmctld', '-D')
            for node in self.nodes:
                self._start('slurmd', '-D', '-N', node)
            wait_for(
                lambda: self('sinfo', '--noheader', '--states=idle', '--format=%D').strip() == str(len(self.nodes))
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if len(self._daemons) > 1:
                # Job steps would continue to run after slurmd has stopped.
                subprocess.run(['scancel', f'--user={getpass.getuser()}'], env=self.environment, check=False)
                wait_for(lambda: not self('squeue', '--noheader').strip(), 120)
        finally:
            for daemon in reversed(self._daemons):
                daemon.terminate()
            for daemon in self._daemons:
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start_munge(self) -> None:
        key = self.folder / 'munge.key'
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        # --force: the folder for temporary files is writable for others.
        files = [f'--{name}-file={self.folder / f"munge.{name}"}' for name in ('key', 'pid', 'log', 'seed')]
        self._start('munged', '--foreground', '--force', f'--socket={self.folder}/munge.socket', *files)
        wait_for((self.folder / 'munge.socket').exists)

    def _start(self, name: str, *arguments: str) -> None:
        with open(self.folder / f'{name}{len(self._daemons)}.log', 'w') as log:
            daemon = subprocess.Popen(
                [str(program(name)), *arguments], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self._daemons.append(daemon)

    def __call__(self, *command: str) -> str:
        """Runs a command of Slurm and returns its output."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f'{command}: {done.stdout}{done.stderr}'
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`, such as JobState, ExitCode and Restarts."""
        return dict(re.findall(r'(\w+)=(\S*)', self('scontrol', 'show', 'job', job)))

    def wait_for_state(self, job: str, *states: str, timeout: float = 600) -> dict[str, str]:
        """Waits until a job is in one of the states or has ended, asserts that it is, and returns its fields."""
        wait_for(lambda: self.job(job)['JobState'] in (*states, *ENDED), timeout, lambda: str(self.job(job)))
        fields = self.job(job)
        assert fields['JobState'] in states, fields
        return fields


def wait_for(condition: Callable[[], object], timeout: float = 60, about: Callable[[], str] = str) -> None:
    """Waits until a condition is true; fails after `timeout` seconds."""
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, f'not true within {timeout} s: {about()}'
        time.sleep(0.2)
