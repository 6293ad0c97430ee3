"""launch/tpu_pod.sh with a simulated gcloud, which prints given states of a queued resource."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

# The python3 of a host. It makes a virtual environment whose python records its arguments.
PYTHON3 = """#!/bin/sh
case "$*" in
*'uv venv'*)
    mkdir -p .venv/bin
    cp "$STAND_IN/python" .venv/bin/python ;;
esac
"""
PYTHON = """#!/bin/bash
for argument; do echo "$argument" >>"$STAND_IN/trained"; done
echo training
/bin/sleep "${TRAINING_SECONDS:-0}"
echo trained
exit "$(sed -n "$(grep -c train.py "$STAND_IN/trained")p" "$STAND_IN/statuses")"
"""


@pytest.fixture
def pod(tmp_path):
    """Runs the script with a list of states of the resource, and a list of exit statuses of train.py."""
    (tmp_path / 'bin').mkdir()
    gcloud = f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("gcloud.py")} "$@"\n'
    sleep = '#!/bin/sh\nexec /bin/sleep 0.1\n'
    for name, text in {'bin/gcloud': gcloud, 'bin/python3': PYTHON3, 'bin/sleep': sleep, 'python': PYTHON}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = {'ZONE': 'here', 'TYPE': 'v5litepod-16', 'VERSION': 'v2', 'STAND_IN': str(tmp_path)}
    environment = os.environ | variables | {'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}'}

    def run(states, *statuses, lost=None, **more):
        (tmp_path / 'scenario.json').write_text(json.dumps({'states': states, 'lost': lost}))
        (tmp_path / 'statuses').write_text('\n'.join(map(str, statuses)))
        command = [ROOT / 'launch' / 'tpu_pod.sh', 'pod', '--config=x', "--workdir=/a run's"]
        done = subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=120)
        calls = [line.split()[0] for line in (tmp_path / 'calls').read_text().splitlines()]
        trained = (tmp_path / 'trained').read_text().splitlines() if (tmp_path / 'trained').exists() else []
        assert trained == len(statuses) * ['train.py', '--config=x', "--workdir=/a run's"]
        return done, calls

    return run


TRAIN = ['ssh', 'scp', 'ssh', 'ssh']  # setup, copy, install, train


def test_a_run_ends_with_its_status_and_the_pod_is_deleted(pod):
    """A pod would stay and cost money, or a script around the launcher would not see the error."""
    done, calls = pod(['ACCEPTED', 'PROVISIONING', 'ACTIVE', 'ACTIVE'], 2)
    assert done.returncode == 2, done.stderr
    assert calls == ['create', 'describe', 'describe', 'describe', *TRAIN, 'describe', 'delete']
    assert 'training\ntrained\n' in done.stdout


@pytest.mark.parametrize(
    ('after', 'status', 'line'),
    [
        ('ACTIVE', 143, 'train.py was stopped or its hosts were lost (status 143)'),
        ('ACTIVE', 255, 'train.py was stopped or its hosts were lost (status 255)'),
        ('SUSPENDED', 1, 'pod was SUSPENDED: it is created again'),
        ('SUSPENDING', 0, 'pod was SUSPENDING: it is created again'),
        ('ERROR', 1, 'pod was UNKNOWN: it is created again'),
    ],
)
def test_a_preempted_pod_is_created_again(pod, after, status, line):
    """A run on a spot pod would end at the first preemption."""
    done, calls = pod(['ACTIVE', after, 'ACTIVE', 'ACTIVE'], status, 0)
    assert done.returncode == 0, done.stderr
    assert line in done.stderr
    assert calls == 2 * ['create', 'describe', *TRAIN, 'describe', 'delete']


def test_a_pod_that_is_preempted_before_it_is_ready_is_created_again(pod):
    """The launcher would end before the run has started."""
    done, calls = pod(['PROVISIONING', 'SUSPENDED', 'ACTIVE', 'ACTIVE'], 0)
    assert done.returncode == 0, done.stderr
    assert calls[:5] == ['create', 'describe', 'describe', 'delete', 'create']


def test_a_pod_that_cannot_be_created_ends_the_launcher(pod):
    """With a wrong type or no quota, the launcher would wait forever."""
    done, calls = pod(['ACCEPTED', 'ERROR', 'FAILED'])
    assert done.returncode == 1
    assert 'pod is FAILED: see gcloud compute tpus queued-resources describe pod --zone=here' in done.stderr
    assert calls == ['create', 'describe', 'describe', 'describe']


def test_a_lost_connection_does_not_start_the_run_a_second_time(pod):
    """A second train.py on a host where the first one still runs would fail, and end the run on all hosts."""
    done, _ = pod(['ACTIVE', 'ACTIVE'], 0, lost=2, TRAINING_SECONDS='2')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('training\n') == 2  # both connections show it
    assert 'trained\n' in done.stdout


def test_a_failed_setup_ends_the_launcher_and_deletes_the_pod(pod):
    """Pods would be created without end, or the pod would stay and cost money."""
    done, calls = pod(['ACTIVE', 'ACTIVE'], SETUP='exit 255')
    assert done.returncode == 255
    assert calls == ['create', 'describe', 'ssh', 'describe', 'delete']


def test_a_pod_of_several_slices(pod, tmp_path):
    """gcloud would refuse to create the pod: several slices need other arguments than one slice."""
    assert pod(['ACTIVE', 'ACTIVE'], 0, SLICES='2')[0].returncode == 0
    created = (tmp_path / 'calls').read_text().splitlines()[0]
    assert (
        created
        == 'create pod --node-count=2 --node-prefix=pod --accelerator-type=v5litepod-16 --runtime-version=v2 --spot'
    )


def test_a_missing_variable_is_named(pod, tmp_path):
    """The launcher would create a pod of a wrong type."""
    command = [ROOT / 'launch' / 'tpu_pod.sh', 'pod']
    done = subprocess.run(command, env=os.environ | {'ZONE': 'here'}, capture_output=True, text=True)
    assert done.returncode != 0
    assert 'TYPE' in done.stderr
