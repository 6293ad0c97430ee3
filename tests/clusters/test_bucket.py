"""Runs whose workdir is in a bucket, on a storage server on this machine."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ONE_DEVICE, ROOT, SMALL_TRAIN, STEPS, TIMEOUT, fingerprints

NEEDED = ('gcp_storage_emulator', 'gcsfs', 'google.cloud.storage')


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


MISSING = [name for name in NEEDED if not installed(name)]
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(MISSING), reason=f'not installed: {", ".join(MISSING)}'),
]
if not MISSING:
    from bucket import Bucket, broken, every, forbidden, slow, unavailable
else:
    broken = every = slow = unavailable = None


@pytest.fixture
def bucket():
    with Bucket() as running:
        yield running


def start(bucket, *arguments):
    """Starts a command of the project that sees the bucket."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | ONE_DEVICE | bucket.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(bucket, *arguments, status=0):
    """Runs a command to its end, asserts its exit status, and returns its output."""
    process = start(bucket, *arguments)
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == status, output
    assert 'Traceback' not in output, output
    return output


def stored_fingerprints(bucket, name):
    """Like `conftest.fingerprints`, of the last checkpoint of a run in the bucket."""
    return json.loads(bucket.read(f'{name}/checkpoints/{STEPS}/manifest/metadata'))['arrays']


def records(text):
    """The steps and splits of metrics.jsonl."""
    return [(record['step'], record['split']) for record in map(json.loads, text.splitlines())]


def test_a_run_in_a_bucket_resumes_and_can_be_evaluated(bucket, small_run):
    """A run on a preemptible pod would lose steps, records or checkpoints, or could not be evaluated."""
    killed = start(bucket, *SMALL_TRAIN, '--workdir=gs://bucket/run')
    until = time.monotonic() + TIMEOUT
    while not any('checkpoints/8/commit_success' in name for name in bucket.names()):
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    output = run(bucket, *SMALL_TRAIN, '--workdir=gs://bucket/run')
    assert 'resumes at step' in output
    assert stored_fingerprints(bucket, 'run') == fingerprints(small_run)
    assert records(bucket.read('run/metrics.jsonl')) == records((small_run / 'metrics.jsonl').read_bytes())
    assert bucket.read('run/curves.png').startswith(b'\x89PNG')
    evaluated = run(bucket, 'tests/small.py', 'eval.py', '--workdir=gs://bucket/run')
    assert json.loads(evaluated.splitlines()[-1])['images'] == 40


def test_one_process_resumes_in_a_bucket_what_two_processes_saved(bucket):
    """A run could not move to a pod of another size."""
    steps = f'--config.steps={STEPS // 2}'
    two = ('launch/local.py', '2', '--', *SMALL_TRAIN, '--workdir=gs://bucket/two')
    assert '2 process(es)' in run(bucket, *two, steps)
    output = run(bucket, *SMALL_TRAIN, '--workdir=gs://bucket/two')
    assert f'resumes at step {STEPS // 2} of {STEPS}' in output
    assert 'is damaged' not in output


@pytest.mark.parametrize('fault', [unavailable, slow, broken], ids=['unavailable', 'slow', 'broken'])
def test_nothing_is_lost_if_some_requests_fail(bucket, small_run, fault):
    """A busy storage service would end the run, or leave out checkpoints or records."""
    bucket.fault = every(40, fault)
    run(bucket, *SMALL_TRAIN, '--workdir=gs://bucket/run')
    bucket.fault = None
    assert stored_fingerprints(bucket, 'run') == fingerprints(small_run)
    assert records(bucket.read('run/metrics.jsonl')) == records((small_run / 'metrics.jsonl').read_bytes())


def test_a_save_that_the_bucket_refuses_is_reported_and_the_last_one_is_retried(bucket, small_run):
    """Training would end at the first refused write, or the end of the run would not be saved."""

    def refuse(handler):
        refused = handler.command == 'POST' and any(
            f'checkpoints%2F{step}%2Fparameters' in handler.path for step in (8, STEPS)
        )
        refusals.append(refused)
        if refused and sum(refusals) < 3:
            handler.fail(403)
            return True
        return False

    refusals = []
    bucket.fault = refuse
    output = run(bucket, *SMALL_TRAIN, '--workdir=gs://bucket/run')
    (line,) = [line for line in output.splitlines() if 'step 8 could not be saved: ' in line]
    assert len(line) < 400
    assert stored_fingerprints(bucket, 'run') == fingerprints(small_run)


def test_a_bucket_that_cannot_be_written_is_refused_before_training(bucket):
    """The run would train for hours and fail at its first save."""
    output = run(bucket, *SMALL_TRAIN, '--workdir=gs://no-bucket/run', status=2)
    assert output.splitlines()[-1].startswith('error: workdir gs://no-bucket/run cannot be written: ')
    bucket.fault = forbidden
    output = run(bucket, *SMALL_TRAIN, '--workdir=gs://bucket/run', status=2)
    assert output.splitlines()[-1].startswith('error: workdir gs://bucket/run cannot be written: Forbidden')
