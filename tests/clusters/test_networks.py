"""Training on two hosts whose network fails."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ONE_DEVICE, SMALL_RUN, TIMEOUT, fingerprints
from network import Network
from small_clone import make_small_clone

from convnext_jax.monitoring.records import read_records

pytestmark = pytest.mark.cluster
STEPS = 30
SILENCE = 20
"""`--process_timeout` in seconds, in the test in which a link or a host is lost for good."""
GRACE = 5
"""Additional seconds in which the processes must exit."""


@pytest.fixture(scope='module', autouse=True)
def namespaces():
    try:
        with Network():
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, 'stderr', '').strip() or error
        pytest.skip(f'no network namespaces or TUN devices, which need Linux, iproute2 and root: {reason}')


class Runs:
    """Starts small runs on the two hosts of a network.

    Args:
        folder: folder of the workdirs.
    """

    def __init__(self, folder):
        self.folder = folder
        (folder / 'clone').mkdir()
        self._clone = make_small_clone(folder / 'clone')

    def start(self, network, name, *arguments, seconds=0.0, hostname=None):
        """Starts both processes of a run with the workdir folder/name.

        Args:
            seconds: additional duration of a step.
            hostname: as for `Host.command`.
        """
        run = (*SMALL_RUN, f'--config.steps={STEPS}', '--config.log_every_steps=1', f'--workdir={self.folder / name}')
        flags = (f'--coordinator={network.hosts[0].address}:8476', '--process_count=2')
        return [
            subprocess.Popen(
                host.command(
                    *(sys.executable, 'train.py', *run, *flags, f'--process_id={number}', *arguments),
                    hostname=hostname,
                ),
                cwd=self._clone,
                env=os.environ | ONE_DEVICE | {'STEP_SECONDS': str(seconds)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number, host in enumerate(network.hosts)
        ]

    def wait_for_records(self, processes, name, count):
        """Waits until a run has logged `count` more records."""
        count += len(read_records(self.folder / name))
        until = time.monotonic() + TIMEOUT
        while len(read_records(self.folder / name)) < count:
            assert [process.poll() for process in processes] == [None, None], end(processes)
            assert time.monotonic() < until
            time.sleep(0.1)


def end(processes):
    """Waits for the end of both processes; returns their exit statuses and their outputs."""
    outputs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp('networks'))


@pytest.fixture(scope='module')
def expected(runs):
    """The fingerprints of a run over a link without faults."""
    with Network() as network:
        statuses, outputs = end(runs.start(network, 'unbroken'))
    assert statuses == [0, 0], outputs
    assert '2 × cpu, mesh data=2 × fsdp=1, 2 process(es)' in outputs[0]
    return fingerprints(runs.folder / 'unbroken', STEPS)


@pytest.mark.parametrize(('delay', 'loss'), [(0.01, 0), (0.001, 0.02)], ids=['slow', 'lossy'])
def test_a_bad_link_changes_no_bit(runs, expected, delay, loss):
    """On a busy network, a run would end, or train another model."""
    name = f'delay{delay}'
    began = time.monotonic()
    with Network(delay, loss) as network:
        statuses, outputs = end(runs.start(network, name))
    print(f'{time.monotonic() - began:.0f} s')
    assert statuses == [0, 0], outputs
    assert fingerprints(runs.folder / name, STEPS) == expected


def test_a_run_survives_a_break_of_a_third_of_the_timeout(runs, expected):
    """Every restart of a switch would end the run."""
    with Network() as network:
        processes = runs.start(network, 'break', '--process_timeout=30', seconds=0.2)
        runs.wait_for_records(processes, 'break', 5)
        network.connected = False
        time.sleep(10)
        network.connected = True
        began = time.monotonic()
        runs.wait_for_records(processes, 'break', 2)
        print(f'went on after {time.monotonic() - began:.1f} s')
        statuses, outputs = end(processes)
    assert statuses == [0, 0], outputs
    assert fingerprints(runs.folder / 'break', STEPS) == expected


def test_a_run_ends_on_all_hosts_when_one_is_lost_and_resumes(runs, expected):
    """The other hosts would wait, and cost money, until somebody notices; or the run could not resume."""
    losses = [
        ('the link breaks', None, [1, 1]),
        ('host 1 vanishes', 1, [1, -signal.SIGKILL]),
        ('host 0 vanishes', 0, [-signal.SIGKILL, 1]),
    ]
    for what, lost, expected_statuses in losses:
        with Network() as network:
            processes = runs.start(network, 'lost', f'--process_timeout={SILENCE}', seconds=0.4)
            runs.wait_for_records(processes, 'lost', 6)
            network.connected = False
            for pid in [] if lost is None else network.hosts[lost].processes():
                os.kill(pid, signal.SIGKILL)
            began = time.monotonic()
            statuses, outputs = end(processes)
        seconds = time.monotonic() - began
        print(f'{what}: ended after {seconds:.1f} s')
        assert statuses == expected_statuses, outputs
        assert SILENCE < seconds < 1.25 * SILENCE + GRACE
        for number, output in enumerate(outputs):
            line = (
                f'error: process {1 - number} has not responded for {SILENCE} s: see its output, and run the same '
                'command on all hosts to resume'
            )
            errors = [text for text in output.splitlines() if 'error' in text.lower()]
            assert errors == ([] if number == lost else [line]), output
            assert 'Traceback' not in output
    with Network() as network:
        statuses, outputs = end(runs.start(network, 'lost'))
    assert statuses == [0, 0], outputs
    assert 'resumes at step' in outputs[0]
    assert fingerprints(runs.folder / 'lost', STEPS) == expected


def test_a_hostname_that_means_the_host_itself_is_explained(runs):
    """On Debian, the name of a host resolves to 127.0.1.1, and users would see a traceback from gloo."""
    with Network() as network:
        statuses, outputs = end(runs.start(network, 'hostname', hostname='localhost'))
    assert statuses == [2, 2], outputs
    assert 'error: the CPU devices of this job cannot connect: ' in ''.join(outputs)
    assert 'its name (here localhost) must resolve to an address that the other hosts can reach' in outputs[0]
    assert 'Traceback' not in ''.join(outputs)
