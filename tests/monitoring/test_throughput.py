"""The speed that a run reports, and what slows it down."""

import io
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ONE_DEVICE, ROOT, SMALL_RUN, TIMEOUT
from PIL import Image

import train as train_command
from configs import imagenet1k
from convnext_jax.checkpoints.checkpoint import saved_steps
from convnext_jax.monitoring.records import read_records
from convnext_jax.monitoring.stalls import DataStalled, StallMonitor
from convnext_jax.monitoring.throughput import stragglers, utilisation
from convnext_jax.runtime.stop import Stop
from convnext_jax.tasks.classification import Classification


def test_the_recorded_times_and_speeds_of_a_run_are_consistent(finished_run):
    """Users who tune a run could not trust any value if a share were above 1, or a median above the maximum."""
    training = [record for record in read_records(finished_run) if record['split'] == 'train']
    for record in training:
        assert record['images_per_second_per_chip'] == record['images_per_second']
        assert 0 < record['step_ms_median'] <= record['step_ms_p99']
        # A step has 16 images. The 99th percentile of four steps is just below the longest one.
        mean = 1000 * 16 / record['images_per_second']
        assert record['step_ms_median'] / 2 <= mean <= record['step_ms_p99'] * 1.05
        assert 0 <= record['data_wait_share'] <= 1
        assert 0.1 < record['host_memory_gib'] < 100
        assert 1 < record['param_norm'] < 1000
        assert 'mfu' not in record, 'a CPU has no peak in the table'
        assert 'device_memory_gib' not in record, 'a CPU does not report device memory'
    assert training[0]['param_norm'] != training[1]['param_norm']
    (events,) = (finished_run / 'tensorboard').glob('events*')
    for name in ('step_ms_median', 'step_ms_p99', 'data_wait_share', 'images_per_second_per_chip', 'param_norm'):
        assert f'train/{name}'.encode() in events.read_bytes()


@pytest.mark.parametrize(
    ('device_kind', 'dtype', 'peak'),
    [('TPU v5 lite', 'bfloat16', 197e12), ('TPU v5', 'bfloat16', 459e12), ('NVIDIA A100-SXM4-80GB', 'float32', 156e12)],
)
def test_utilisation_follows_from_the_flops_in_the_paper(device_kind, dtype, peak):
    """Users could not compare the MFU with other work.

    ConvNeXt-T has 4.46 G multiply-adds (arXiv:2201.03545, table 9), and a step does six FLOPs for each.
    """
    config = imagenet1k.get_config('tiny')
    config.model.num_classes, config.model.dtype = 1000, dtype
    assert utilisation(config, 1000.0, device_kind)['mfu'] == pytest.approx(6 * 4.46e9 * 1000 / peak, rel=2e-3)
    assert utilisation(config, 1000.0, 'cpu') == {}


def test_the_host_that_delays_the_others_is_named():
    """If one of a thousand hosts has a slow disk, all are slow, and users could not find the cause."""
    names, even = [f'host{process}' for process in range(4)], np.full(4, 0.02)
    assert stragglers(names, even, even, 0.5) == {}
    assert stragglers(names, np.full(4, 0.4), even, 0.5) == {}, 'all hosts wait for data equally'
    slow = np.array([0.02, 0.02, 0.2, 0.02])
    assert stragglers(names, slow, even, 0.5) == {
        'process 2 (host2)': 'process 2 (host2) delays the others: it spends 200 ms of a 500 ms step waiting for data, '
        'the median host 20 ms'
    }
    (line,) = stragglers(names, even, slow, 0.5).values()
    assert '200 ms of a 500 ms step on other work of the host' in line


def test_a_stall_is_reported_with_growing_intervals_until_a_signal(capsys):
    """A run that waits for data would not say so, or would fill the log, or could not be stopped."""
    stop = Stop()
    monitor = StallMonitor(300, stop, lambda: 'train after step 7')

    def said(*seconds):
        for second in seconds:
            monitor(second, lambda: 'a/b.jpg')
        return capsys.readouterr().err.splitlines()

    assert said(0.001, 299) == []
    assert said(301, 302, 599) == ['train after step 7: no batch for 301 s, still waiting for a/b.jpg']
    assert len(said(*range(600, 5000, 10))) == 4, 'one report each at 602, 1204, 2408 and 4816 s'
    assert said(0.001, 100) == [], 'the wait for the next batch starts at zero'
    assert len(said(310)) == 1
    stop.received = signal.SIGTERM
    monitor(1, lambda: 'a/b.jpg')  # the batch may still arrive
    with pytest.raises(DataStalled):
        monitor(10, lambda: 'a/b.jpg')


class Stderr(io.StringIO):
    """Sets an event when the run reports a stall."""

    def __init__(self):
        super().__init__()
        self.reported = threading.Event()

    def write(self, text):
        if 'no batch for' in text:
            self.reported.set()
        return super().write(text)


class Slow:
    """A source with one read that blocks until the run reports a stall."""

    def __init__(self, source, reported):
        self._source, self._reported, self._reads = source, reported, itertools.count()

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        if next(self._reads) == 100:
            self.slow = self.name(index)
            self._reported.wait()
        return self._source[index]


def test_a_slow_source_shows_in_the_wait_share_and_is_reported(one_device, tmp_path, monkeypatch, finished_run):
    """Users would need a profiler to see that data slows a run down, and which file."""
    err, sources = Stderr(), []

    opened = Classification.open

    def slow(task):
        train, evaluation = opened(task)
        sources.append(Slow(train.source, err.reported))
        train.source = sources[0]
        return train, evaluation

    monkeypatch.setattr(Classification, 'open', slow)
    monkeypatch.setattr(sys, 'stderr', err)
    run = tmp_path / 'run'
    train_command.main(['train.py', *SMALL_RUN, f'--workdir={run}', '--config.data.patience_seconds=5'])
    ours, one = (read_records(workdir) for workdir in (run, finished_run))
    assert [record['step'] for record in ours] == [record['step'] for record in one]
    np.testing.assert_allclose([record['loss'] for record in ours], [record['loss'] for record in one], rtol=1e-3)
    shares = {record['step']: record['data_wait_share'] for record in read_records(run) if record['split'] == 'train'}
    assert max(shares.values()) > 0.1
    assert shares[24] < max(shares.values()) / 2, 'the images must be cached in memory'
    assert all(0 <= share <= 1 for share in shares.values())
    (line,) = (line for line in err.getvalue().splitlines() if 'no batch for' in line)
    assert re.fullmatch(
        rf'train\[:160\] after step \d: no batch for \d s, still waiting for {re.escape(sources[0].slow)}', line
    ), line


@pytest.mark.parametrize('workers', [0, 2])
def test_a_read_that_hangs_is_named_and_a_signal_still_saves(commands, tmp_path, workers):
    """When a file server fails, users could not see which file a run waits for, nor stop it without losing steps.

    The file is a named pipe without a writer: opening it blocks, and nothing can interrupt that.
    """
    for split, images in (('train', 8), ('val', 2)):
        for name in ('cat', 'dog'):
            (tmp_path / 'photos' / split / name).mkdir(parents=True)
            for number in range(images):
                pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / 'photos' / split / name / f'{number}.jpg')
    run = tmp_path / 'run'
    process = commands.start(
        'tests/small.py',
        'train.py',
        '--config=configs/image_folder.py:convnextv2_atto',
        f'--config.data.dir={tmp_path / "photos"}',
        f'--config.data.workers={workers}',
        '--config.data.image_size=32',
        '--config.data.patience_seconds=2',
        '--config.batch_size=8',
        '--config.steps=100000',
        '--config.optimizer.warmup_steps=1',
        '--config.eval_every_epochs=1000',
        '--config.log_every_steps=2',
        '--config.augment.policy=',  # RandAugment takes long to compile
        f'--workdir={run}',
    )
    while process.poll() is None and not read_records(run):
        time.sleep(0.02)
    file = tmp_path / 'photos' / 'train' / 'dog' / '3.jpg'
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'pipe').rename(file)

    heard = rf'train after step (\d+): no batch for \d+ s, still waiting for {file}\n'
    said = next(filter(None, (re.fullmatch(heard, line) for line in process.stderr)))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + signal.SIGTERM, out + err
    (step,) = saved_steps(run / 'checkpoints')
    assert step == int(said[1])
    assert f'stopped by SIGTERM at step {step}, which is saved' in out
    assert 'Traceback' not in err


PROGRAM = """
import sys, time
import jax, jax.numpy as jnp
from configs.fashion_mnist import get_config
from convnext_jax.runtime.stop import Stop
from convnext_jax.monitoring.throughput import StepTimer

process = int(sys.argv[2])
jax.distributed.initialize(sys.argv[1], 2, process)
timer = StepTimer(get_config(), 0, Stop())
lines = []
for lap in range(2):
    for batch in timer.batches(range(3)):
        time.sleep(0.5 * process)
        timer.dispatched({'loss': jnp.zeros(())})
    lines += timer.summary()[1]
print(lines, flush=True)
"""


@pytest.mark.slow
def test_every_process_names_a_straggling_process(tmp_path):
    """The log of the main process would not name another host that is slow, or would name it every time."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        coordinator = f'localhost:{free.getsockname()[1]}'
    (tmp_path / 'program.py').write_text(PROGRAM)
    processes = [
        subprocess.Popen(
            [sys.executable, tmp_path / 'program.py', coordinator, str(process)],
            cwd=ROOT,
            env=os.environ | ONE_DEVICE | {'PYTHONPATH': str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, err
        (named,) = re.findall(r'(process \d) \(.+?\) delays the others: it spends .* on other work', out)
        assert named == 'process 1'
