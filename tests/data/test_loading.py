"""Batches loaded by threads and by processes: contents, order, errors, and clean shutdown."""

import dataclasses
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
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
    """Index → example filled with the index; some examples are slow, and one may fail, hang or kill the process."""

    broken: int = -1
    killing: int = -1
    hanging: int = -1
    pipe: str = ''

    def __call__(self, index):
        if index == self.hanging:
            open(self.pipe).close()  # blocks until another process opens the pipe for writing
        time.sleep(0.01 * (index % 3 == 0))
        if index == self.broken:
            raise UserError(f'example {index} is broken')
        if index == self.killing:
            os.kill(os.getpid(), signal.SIGKILL)
        return {'image': np.full(SHAPE, index % 256, np.uint8), 'label': np.int32(index)}


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_are_complete_and_in_order(workers):
    """Batches could come in another order, or have images of a later batch from a reused slot."""
    batches = list(itertools.islice(load_batches(Load(), itertools.count(5), 4, FEATURES, workers), 12))
    assert [batch['label'].tolist() for batch in batches] == [list(range(4 * b, 4 * b + 4)) for b in range(5, 17)]
    for batch in batches:
        assert (batch['image'] == batch['label'][:, None, None, None]).all()
        assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
            'image': ((4, *SHAPE), 'uint8'),
            'label': ((4,), 'int32'),
        }
    assert len(list(load_batches(Load(), range(3), 4, FEATURES, min(workers, 1)))) == 3


@pytest.mark.parametrize('workers', [0, 1])
def test_an_error_is_raised_in_the_training_process(workers):
    """An error in a thread or process would block the training, or lose its message."""
    batches = load_batches(Load(broken=9), itertools.count(), 4, FEATURES, workers)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(UserError, match='^example 9 is broken$'):
        next(batches)


@pytest.mark.parametrize('workers', [0, 1])
def test_an_example_of_another_shape_is_an_error(workers):
    """NumPy would silently broadcast, for instance, one row of a mask to the whole mask."""
    features = FEATURES | {'image': jax.ShapeDtypeStruct((4, *SHAPE), np.uint8)}
    with pytest.raises(
        ValueError, match=r'an example does not match the features .*image.*\(2, 3, 1\).*not.*\(4, 2, 3, 1\)'
    ):
        next(load_batches(Load(), range(3), 4, features, workers))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_read_that_hangs_is_reported_and_can_be_cancelled(workers, tmp_path, monkeypatch):
    """A file server that does not answer would prevent the training from saving and ending."""
    monkeypatch.setattr(loading, 'CLOSE_TIMEOUT', 0.5)
    os.mkfifo(tmp_path / 'pipe')
    calls, name = [], 'example {}'.format

    def waiting(seconds, example):
        calls.append((seconds, example()))
        if example() == 'example 9' and seconds > 0.3:
            raise InterruptedError

    load = Load(hanging=9, pipe=str(tmp_path / 'pipe'))
    batches = load_batches(load, itertools.count(), 4, FEATURES, workers, waiting, name)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(InterruptedError):
        next(batches)
    assert [example for _, example in calls][-5:] == ['example 9'] * 5
    assert 0.3 < calls[-1][0] < 30
    assert multiprocessing.active_children() == []
    with open(os.open(tmp_path / 'pipe', os.O_RDWR | os.O_NONBLOCK), 'w'):
        time.sleep(0.1)  # unblocks the thread


@pytest.mark.slow
def test_a_killed_process_is_reported():
    """After the kernel has killed a process for lack of memory, the training would wait forever."""
    with pytest.raises(UserError, match='a decoding process has ended, because memory ran out.*reduce data.workers'):
        list(load_batches(Load(killing=9), range(10), 4, FEATURES, workers=2))


@pytest.mark.slow
def test_decoding_continues_after_a_signal_to_all_processes():
    """Slurm sends SIGTERM to every process of a job, but the hosts still need batches to stop at one step."""
    batches = load_batches(Load(), itertools.count(), 4, FEATURES, workers=2)
    next(batches)
    for process in multiprocessing.active_children():
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(process.pid, number)
    assert [next(batches)['label'][0] for _ in range(10)] == list(range(4, 44, 4))
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


def test_processes_and_threads_give_equal_batches():
    """Another number of workers would change the run."""
    images = TrainImages(open_source('fashion_mnist_mini', '', 'train'), 28, 1, crop_scale=(0.3, 1.0))
    options = {'seed': 0, 'start_step': 3, 'unreadable': Unreadable(images)}
    by_threads, by_processes = (
        list(itertools.islice(train_batches(images, Share(16), workers=workers, **options), 3)) for workers in (0, 2)
    )
    for ours, theirs in zip(by_threads, by_processes, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_too_little_shared_memory_is_an_error(monkeypatch):
    """With the /dev/shm of 64 MB in a container, the process would end with a bus error and no message."""
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: SimpleNamespace(free=100))
    with pytest.raises(
        UserError, match='2 processes need 0.0 GB of shared memory.*enlarge /dev/shm, or reduce data.wor'
    ):
        next(load_batches(Load(), range(3), 8, FEATURES, workers=2))


def test_the_number_of_processes_and_threads(monkeypatch):
    """A laptop would start processes for each evaluation, or the host of a pod would decode in one process."""
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
    fields = [line.split() for line in lines.splitlines()]
    return [int(pid) for pid, other, state in fields if int(other) == session and not state.startswith('Z')]


def shared_memory():
    """Names of the shared memory blocks that Python has created on this machine."""
    names = os.listdir('/dev/shm') if os.path.isdir('/dev/shm') else []
    return {name for name in names if name.startswith(('psm_', 'pym-'))}


@pytest.mark.slow
def test_processes_can_be_started_under_ipython_run(monkeypatch):
    """Under IPython's %run `__main__` has no `__spec__`: `multiprocessing` would raise an AttributeError."""
    monkeypatch.delattr(sys.modules['__main__'], '__spec__')
    (batch,) = load_batches(Load(), [0], 4, FEATURES, workers=1)
    assert len(batch['image']) == 4


@pytest.mark.slow
@pytest.mark.parametrize('how', ['interrupt', 'interrupt while they start', 'kill'])
def test_no_process_or_shared_memory_remains(how, tmp_path):
    """Processes that survive Ctrl-C or a kill would hold memory for days."""
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


def test_the_main_thread_takes_no_lock_of_a_future_while_it_waits(monkeypatch):
    """An interrupt in `Condition.__enter__` leaves the lock taken: the thread that sets the result blocks forever."""
    waits, entered, enter = [], [], threading.Condition.__enter__

    def load(index):
        while len(waits) < 3:
            time.sleep(0.01)
        return Load()(index)

    def enter_and_note(condition):
        if waits and threading.current_thread() is threading.main_thread():
            entered.append(condition)
        return enter(condition)

    monkeypatch.setattr(threading.Condition, '__enter__', enter_and_note)
    batches = load_batches(load, [0], 4, FEATURES, workers=0, waiting=lambda seconds, _: waits.append(seconds))
    next(batches)
    held = list(entered[:-1])  # the last is that of `Future.result`, when the call has ended
    batches.close()
    assert len(waits) >= 3
    assert held == []
