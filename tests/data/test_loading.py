"""Batches by threads and by processes: the same, in order, and nothing is left behind however they end."""

import dataclasses
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from convnext_jax.data import loading
from convnext_jax.data.labelled_images import TrainImages
from convnext_jax.data.loading import decoders, load_batches
from convnext_jax.data.pipeline import Share, Unreadable, train_batches
from convnext_jax.data.sources import open_source
from convnext_jax.errors import UserError

SHAPE = (2, 3, 1)
FEATURES = {'image': jax.ShapeDtypeStruct(SHAPE, np.uint8), 'label': jax.ShapeDtypeStruct((), np.int32)}


@dataclasses.dataclass
class Load:
    """A row of its own number; slow where the number says so, an error or the end of the process at one of them."""

    broken: int = -1
    deadly: int = -1
    stuck: int = -1
    pipe: str = ''

    def __call__(self, row):
        if row == self.stuck:
            open(self.pipe).close()  # waits for somebody who writes, whatever comes
        time.sleep(0.01 * (row % 3 == 0))
        if row == self.broken:
            raise UserError(f'row {row} is broken')
        if row == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return {'image': np.full(SHAPE, row % 256, np.uint8), 'label': np.int32(row)}


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_come_in_order_and_whole(workers):
    """A batch that overtakes another, or images of another batch in a slot that was given back too early."""
    batches = list(itertools.islice(load_batches(Load(), itertools.count(5), 4, FEATURES, workers), 12))
    assert [batch['label'].tolist() for batch in batches] == [list(range(4 * b, 4 * b + 4)) for b in range(5, 17)]
    for batch in batches:
        assert (batch['image'] == batch['label'][:, None, None, None]).all()
        assert {name: (rows.shape, rows.dtype.name) for name, rows in batch.items()} == {
            'image': ((4, *SHAPE), 'uint8'),
            'label': ((4,), 'int32'),
        }
    assert len(list(load_batches(Load(), range(3), 4, FEATURES, workers))) == 3


@pytest.mark.parametrize('workers', [0, 2])
def test_an_error_comes_through(workers):
    """An error in a thread or process must reach the training with its text, not hang it."""
    batches = load_batches(Load(broken=9), itertools.count(), 4, FEATURES, workers)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(UserError, match='^row 9 is broken$'):
        next(batches)


@pytest.mark.parametrize('workers', [0, 2])
def test_an_example_of_another_shape_is_no_example(workers):
    """A row of a mask that NumPy spreads over all of it trains, and nobody sees why it trains badly."""
    features = FEATURES | {'image': jax.ShapeDtypeStruct((4, *SHAPE), np.uint8)}
    with pytest.raises(
        ValueError, match=r'an example does not fit the features .*image.*\(2, 3, 1\).*not.*\(4, 2, 3, 1\)'
    ):
        next(load_batches(Load(), range(3), 4, features, workers))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_read_that_hangs_is_heard_of_and_can_be_given_up(workers, tmp_path, monkeypatch):
    """A file server that is gone must not keep the training from saving and ending."""
    monkeypatch.setattr(loading, 'GRACE', 0.5)
    os.mkfifo(tmp_path / 'pipe')
    heard, name = [], 'example {}'.format

    def waiting(seconds, example):
        heard.append((seconds, example()))
        if example() == 'example 9' and seconds > 0.3:
            raise InterruptedError

    load = Load(stuck=9, pipe=str(tmp_path / 'pipe'))
    batches = load_batches(load, itertools.count(), 4, FEATURES, workers, waiting, name)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(InterruptedError):
        next(batches)
    assert [example for _, example in heard][-5:] == ['example 9'] * 5
    assert 0.3 < heard[-1][0] < 30
    assert multiprocessing.active_children() == []
    with open(os.open(tmp_path / 'pipe', os.O_RDWR | os.O_NONBLOCK), 'w'):
        time.sleep(0.1)  # lets the thread go


def test_a_killed_process_is_told():
    """The kernel kills what takes too much memory: the training must say so instead of waiting for ever."""
    with pytest.raises(UserError, match='a process that decodes images ended: out of memory.*Lower data.workers'):
        list(load_batches(Load(deadly=9), range(10), 4, FEATURES, workers=2))


def test_a_signal_to_all_processes_stops_no_decoding():
    """Slurm sends SIGTERM to every process of a job: the hosts need batches until they stop, all at the same step."""
    batches = load_batches(Load(), itertools.count(), 4, FEATURES, workers=2)
    next(batches)
    for process in multiprocessing.active_children():
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(process.pid, number)
    assert [next(batches)['label'][0] for _ in range(10)] == list(range(4, 44, 4))
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


def test_processes_give_the_batches_of_threads():
    """Another number of workers must not be another run; the sources must reach them."""
    images = TrainImages(open_source('fashion_mnist_mini', '', 'train'), 28, 1, crop_scale=(0.3, 1.0))
    options = {'seed': 0, 'start_step': 3, 'unreadable': Unreadable(images)}
    by_threads, by_processes = (
        list(itertools.islice(train_batches(images, Share(16), workers=workers, **options), 3)) for workers in (0, 2)
    )
    for ours, theirs in zip(by_threads, by_processes, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_too_little_shared_memory_is_told_before_it_is_taken(monkeypatch):
    """A container's /dev/shm of 64 MB ends the process by a bus error, without a line."""
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: SimpleNamespace(free=100))
    with pytest.raises(
        UserError, match='2 processes need 0.0 GB of shared memory.*enlarge /dev/shm, or lower data.work'
    ):
        next(load_batches(Load(), range(3), 8, FEATURES, workers=2))


def test_how_many_decode(monkeypatch):
    """A laptop must not start processes for each evaluation, nor a pod host decode by one process."""
    for cores, expected in {1: (0, 1), 2: (0, 1), 4: (0, 3), 8: (2, 4), 96: (24, 4)}.items():
        monkeypatch.setattr(os, 'sched_getaffinity', lambda _, cores=cores: range(cores), raising=False)
        assert decoders(-1) == expected
    assert decoders(0) == (0, 95)
    assert decoders(96) == (96, 1)


PROGRAM = """
import itertools, os, sys
from convnext_jax.data.loading import load_batches
from tests.data.test_loading import FEATURES, Load

if __name__ == '__main__':
    batches = load_batches(Load(), itertools.count(), 4, FEATURES, workers=2)
    try:
        print('starting', flush=True)
        next(batches)
        print('ready', flush=True)
        for batch in batches:
            pass
    except KeyboardInterrupt:
        print('interrupted', flush=True)
        sys.exit(130)
"""


def processes_of_session(session):
    lines = subprocess.run(['ps', '-eo', 'pid=,sess=,stat='], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in lines.splitlines()]
    return [int(pid) for pid, of_session, state in rows if int(of_session) == session and not state.startswith('Z')]


def shared_memory():
    """Names of the blocks of shared memory on this machine, of Python's both kinds."""
    names = os.listdir('/dev/shm') if os.path.isdir('/dev/shm') else []
    return {name for name in names if name.startswith(('psm_', 'pym-'))}


def test_processes_of_a_notebook_s_run(monkeypatch):
    """IPython's %run gives the script's module no `__spec__`, and `multiprocessing` ended with an AttributeError."""
    monkeypatch.delattr(sys.modules['__main__'], '__spec__')
    (batch,) = load_batches(Load(), [0], 4, FEATURES, workers=1)
    assert len(batch['image']) == 4


@pytest.mark.parametrize('how', ['interrupt', 'interrupt while they start', 'kill'])
def test_nothing_is_left_behind(how, tmp_path):
    """Processes that live on after Ctrl-C or a kill hold memory for days; their tracebacks hide ours."""
    path = tmp_path / 'program.py'
    path.write_text(textwrap.dedent(PROGRAM))
    before = shared_memory()
    process = subprocess.Popen(
        [sys.executable, path],
        env=os.environ | {'PYTHONPATH': os.pathsep.join(['.', *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == 'starting\n', process.stderr.read()
    while len(processes_of_session(process.pid)) < 4 and process.poll() is None:
        time.sleep(0.01)
    if how != 'interrupt while they start':
        assert process.stdout.readline() == 'ready\n', process.stderr.read()
    if how != 'kill':
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=900) == ('interrupted\n', '')
        assert process.returncode == 130
    else:
        process.kill()
        process.communicate(timeout=900)
    deadline = time.monotonic() + 300
    while processes_of_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of_session(process.pid) == []
    assert shared_memory() <= before
