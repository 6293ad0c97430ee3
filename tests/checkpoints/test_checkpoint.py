"""Checkpoints are restored bit for bit, or refused."""

import errno
import json
import os
import resource
import shutil
import tarfile
import time
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from convnext_jax.checkpoints import manager
from convnext_jax.checkpoints.checkpoint import DamagedCheckpoint, read_about, restore, restore_parameters, saved_steps
from convnext_jax.checkpoints.manager import Checkpoints
from convnext_jax.checkpoints.state import TrainState, initial_state
from convnext_jax.errors import UserError
from convnext_jax.models import Role
from convnext_jax.training.optimizer import adamw
from convnext_jax.training.sharding import make_mesh, replicated


def make_state(step: int = 0, width: int = 300) -> TrainState:
    rng = np.random.default_rng(step)
    parameters = {
        'head.kernel': jnp.asarray(rng.normal(size=(width, 40)), jnp.float32),
        'head.bias': jnp.asarray(rng.normal(size=40), jnp.float32),
    }
    optimizer = adamw(dict.fromkeys(parameters, 1.0), dict.fromkeys(parameters, Role()), weight_decay=0)
    state = initial_state(parameters, optimizer, ema=True)
    state.step = jnp.asarray(step, jnp.int32)
    return state


def like(state: TrainState) -> TrainState:
    whole = replicated(make_mesh())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), state)


def assert_equal(a: TrainState, b: TrainState) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Checkpoints of steps 1, 2 and 3; step 1 has the best score."""
    directory = tmp_path / 'checkpoints'
    with Checkpoints(directory, keep=2, best_metric='top1') as checkpoints:
        for step, top1 in ((1, 90.0), (2, 80.0), (3, 85.0)):
            checkpoints.save(make_state(step), {'config': {'seed': step}}, {'top1': top1})
    return directory


def newest(directory: Path) -> tuple[TrainState, list[str]]:
    with Checkpoints(directory, keep=2, best_metric='top1') as checkpoints:
        return checkpoints.restore_newest(like(make_state()))


def biggest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)


def test_the_whole_state_is_restored(directory):
    """A resumed run continues from wrong values if any array is lost."""
    state, notes = newest(directory)
    assert_equal(state, make_state(3))
    assert notes == []
    assert read_about(directory, 3) == {'config': {'seed': 3}}


def test_the_format_of_a_checkpoint_of_an_earlier_version_is_unchanged(tmp_path):
    """An upgrade of the package makes a run unreadable. Like version 0.1.0, this state has no statistics."""
    with tarfile.open(Path(__file__).parent / 'checkpoint_of_0.1.0.tar.gz') as stored:
        stored.extractall(tmp_path, filter='data')
    assert_equal(restore(tmp_path / 'checkpoints', 3, like(make_state(width=2))), make_state(3, width=2))
    with Checkpoints(tmp_path / 'now', keep=2, best_metric='top1') as checkpoints:
        checkpoints.save(make_state(3, width=2), {'config': {}}, None)
    then, now = (json.loads((tmp_path / name / '3/manifest/metadata').read_text()) for name in ('checkpoints', 'now'))
    assert now == then
    items = [sorted(path.name for path in (tmp_path / name / '3').iterdir()) for name in ('checkpoints', 'now')]
    assert items[0] == items[1]


def test_checkpoints_in_a_bucket_are_read_and_moved_like_local_ones(tmp_path):
    """A run on a pod fails at its first save, in code for local paths only. epath.Path stands for a gs:// path."""
    directory = epath.Path(tmp_path) / 'checkpoints'
    with Checkpoints(directory, keep=2, best_metric='top1') as checkpoints:
        for step in (1, 2):
            checkpoints.save(make_state(step), {'config': {}}, None)
    assert saved_steps(directory) == [1, 2]
    (tmp_path / 'checkpoints' / '2' / 'manifest' / 'metadata').write_text('')
    state, (note,) = newest(directory)
    assert_equal(state, make_state(1))
    assert 'checkpoint 2 is damaged' in note
    assert (tmp_path / 'damaged' / '2.0').is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(('lowest', 'best'), [(False, 2), (True, 1)])
def test_the_best_outlives_newer_ones(tmp_path, lowest, best):
    """The best checkpoint, by the highest accuracy or the lowest loss, is deleted when newer ones are saved."""
    with Checkpoints(tmp_path / 'c', keep=2, best_metric='top1', lowest=lowest) as checkpoints:
        for step, top1 in ((1, 80.0), (2, 90.0), (3, 85.0), (4, None), (5, 85.0), (6, None)):
            checkpoints.save(make_state(step), {}, None if top1 is None else {'top1': top1})
    assert saved_steps(tmp_path / 'c') == [best, 5, 6]
    with Checkpoints(tmp_path / 'c', keep=2, best_metric='top1', lowest=lowest) as resumed:
        for step in (7, 8):
            resumed.save(make_state(step), {}, {'top1': 85.0})
    assert saved_steps(tmp_path / 'c') == [best, 7, 8]


@pytest.mark.slow
def test_a_donated_state_is_saved_as_it_was(tmp_path):
    """The checkpoint contains values of a later step, because the loop donates the state while the save is written."""
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = jax.tree.map(lambda x: jax.device_put(x, replicated(make_mesh())), make_state(7, width=200_000))
    with Checkpoints(tmp_path / 'c', keep=1, best_metric='top1') as checkpoints:
        checkpoints.save(state, {}, None)
        for _ in range(3):
            state = overwrite(state)
    assert_equal(restore(tmp_path / 'c', 7, like(make_state(7, width=200_000))), make_state(7, width=200_000))


@pytest.mark.parametrize('item', ['parameters', 'optimizer', 'ema'])
def test_a_flipped_bit_falls_back_to_the_checkpoint_before(directory, item):
    """A run continues from silently altered weights."""
    path = biggest_file(directory / '3' / item)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    state, notes = newest(directory)
    assert_equal(state, make_state(2))
    assert len(notes) == 1
    assert 'checkpoint 3 is damaged' in notes[0]
    assert (directory.parent / 'damaged' / '3.0').is_dir()


def test_an_altered_manifest_is_refused(directory):
    """A run resumes at a wrong position in the data, or with a wrong config."""
    path = directory / '3' / 'manifest' / 'metadata'
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 7'))
    with pytest.raises(DamagedCheckpoint, match='manifest: altered'):
        read_about(directory, 3)
    assert_equal(newest(directory)[0], make_state(2))


@pytest.mark.parametrize('damage', ['truncated', 'missing', 'manifest'])
def test_damaged_files_fall_back_to_the_checkpoint_before(directory, damage):
    """One damaged file makes the whole run unusable, instead of repeating a few steps."""
    path = biggest_file(directory / '3' / 'parameters')
    if damage == 'truncated':
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == 'missing':
        path.unlink()
    else:
        (directory / '3' / 'manifest' / 'metadata').write_text('{"about": {}, "arr')
    state, notes = newest(directory)
    assert_equal(state, make_state(2))
    assert 'checkpoint 3 is damaged' in notes[0]


def test_a_run_saves_a_step_whose_checkpoint_was_damaged(directory):
    """A resumed run stops when it reaches the step of the damaged checkpoint again."""
    shutil.rmtree(directory / '3' / 'parameters')
    with Checkpoints(directory, keep=2, best_metric='top1') as checkpoints:
        checkpoints.restore_newest(like(make_state()))
        checkpoints.save(make_state(3), {}, None)
    assert_equal(newest(directory)[0], make_state(3))


def test_when_all_are_damaged_the_run_does_not_restart_from_step_0(directory):
    """Weeks of training are replaced by a new run without any message."""
    for step in saved_steps(directory):
        shutil.rmtree(directory / str(step) / 'parameters')
    for _ in range(2):
        with pytest.raises(UserError, match='all checkpoints in .* are damaged'):
            newest(directory)


def test_another_shape_or_name_is_refused_with_the_difference(directory):
    """Orbax alone silently restores the part that fits."""
    with pytest.raises(UserError, match=r'head.kernel is float32\[300, 40\], not float32\[301, 40\]'):
        restore(directory, 3, like(make_state(width=301)))
    other = make_state()
    other.ema = {'stem.bias': other.ema['head.bias'], 'head.kernel': other.ema['head.kernel']}
    with pytest.raises(UserError, match='stem.bias is missing; head.bias is unexpected'):
        restore(directory, 3, like(other))


def test_a_full_disk_is_reported_and_the_next_save_tries_again(directory, monkeypatch):
    """A disk that is full for an hour ends the run, or leaves it without checkpoints."""
    reports = []
    free_bytes = namedtuple('Usage', 'free')(1000)
    with Checkpoints(directory, keep=2, best_metric='top1', report=reports.append) as checkpoints:
        with monkeypatch.context() as full:
            full.setattr(shutil, 'disk_usage', lambda path: free_bytes)
            checkpoints.save(make_state(4), {}, None)
        (line,) = reports
        assert line.startswith('step 4 could not be saved: the disk of')
        assert 'is full: a checkpoint needs 0 MB' in line
        assert line.endswith('the last checkpoint is of step 3')
        assert saved_steps(directory) == [1, 2, 3]
        checkpoints.save(make_state(5), {}, None)
    assert checkpoints.failed.keys() == {4}
    assert saved_steps(directory) == [1, 3, 5]


def test_no_process_starts_a_save_that_one_of_them_cannot_write(directory, monkeypatch):
    """If the disk of one host is full, the other hosts wait for its part of the checkpoint until they time out."""
    reports = []
    with Checkpoints(directory, keep=2, best_metric='top1', report=reports.append) as checkpoints:
        with monkeypatch.context() as of_two:
            of_two.setattr(manager, 'is_multiprocess', lambda: True)
            of_two.setattr(manager, 'all_gather_objects', lambda own: [own, 'the other disk is full'])
            checkpoints.save(make_state(4), {}, None)
        assert reports == ['step 4 could not be saved: the other disk is full; the last checkpoint is of step 3']
        checkpoints.save(make_state(5), {}, None)
    assert checkpoints.failed.keys() == {4}
    assert saved_steps(directory) == [1, 3, 5]


def test_a_process_that_has_ended_is_not_reported_as_a_failed_save(directory, monkeypatch):
    """'could not be saved' sends the user to a disk that is not full."""

    def all_gather_objects(own):
        raise jax.errors.JaxRuntimeError('the coordination service is gone')

    with Checkpoints(directory, keep=2, best_metric='top1') as checkpoints:
        with monkeypatch.context() as of_two:
            of_two.setattr(manager, 'is_multiprocess', lambda: True)
            of_two.setattr(manager, 'all_gather_objects', all_gather_objects)
            with pytest.raises(jax.errors.JaxRuntimeError, match='coordination service'):
                checkpoints.save(make_state(4), {}, None)
        assert not checkpoints.failed


def test_a_write_error_from_python_has_the_message_of_one_from_tensorstore(directory, monkeypatch):
    """Whether the message is clear depends on which library writes to the full disk first, TensorStore or Orbax."""

    def write(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'array_metadatas')

    reports = []
    with Checkpoints(directory, keep=2, best_metric='top1', report=reports.append) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, 'save', write)
        checkpoints.save(make_state(4), {}, None)
    assert reports == ['step 4 could not be saved: No space left on device; the last checkpoint is of step 3']


def test_the_report_leaves_out_the_specification_that_tensorstore_appends(directory, monkeypatch):
    """The reason of a failed save in a bucket is followed by two thousand characters of JSON."""

    def write(*_, **__):
        raise ValueError(
            "Error writing manifest.ocdbt: HTTP 403 [tensorstore_spec='{...}'] [source locations='a.cc:1']"
        )

    reports = []
    with Checkpoints(directory, keep=2, best_metric='top1', report=reports.append) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, 'save', write)
        checkpoints.save(make_state(4), {}, None)
    (line,) = reports
    assert line == (
        'step 4 could not be saved: Error writing manifest.ocdbt: HTTP 403; the last checkpoint is of step 3'
    )


def test_an_older_step_than_the_newest_is_saved_too(directory):
    """Orbax's own policy silently skips a step that the training loop decided to save."""
    with Checkpoints(directory, keep=10, best_metric='top1') as checkpoints:
        checkpoints.save(make_state(0), {}, None)
    assert saved_steps(directory) == [0, 1, 2, 3]


def test_a_write_error_in_the_background_is_reported_before_the_next_save(directory):
    """The user learns of a full disk late, its partial checkpoint keeps it full, or a good checkpoint is deleted."""
    reports, (soft, hard) = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(directory, keep=2, best_metric='top1', report=reports.append) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            checkpoints.save(make_state(4, width=3000), {}, {'top1': 99.0})
            until = time.monotonic() + 60
            while not reports and time.monotonic() < until:
                checkpoints.check()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(reports) == 1
        assert reports[0] == 'step 4 could not be saved: File too large; the last checkpoint is of step 3'
        assert saved_steps(directory) == [1, 2, 3]
        checkpoints.check()
        checkpoints.save(make_state(4), {}, None)
    assert len(reports) == 1
    assert not checkpoints.failed
    assert sorted(path.name for path in directory.iterdir()) == ['1', '3', '4'], 'the best is not what was never saved'
    assert_equal(newest(directory)[0], make_state(4))


def test_the_moving_average_is_restored_without_the_rest(directory):
    """An evaluation reads the optimizer state too, which takes twice the memory of the weights."""
    ema = restore_parameters(directory, 3, 'ema')
    np.testing.assert_array_equal(ema['head.kernel'], make_state(3).ema['head.kernel'])
    shutil.rmtree(directory / '3' / 'ema')
    with pytest.raises(DamagedCheckpoint):
        restore_parameters(directory, 3, 'ema')


@pytest.mark.parametrize('step', [1, 3])
def test_damaged_metadata_files_of_orbax_do_not_stop_a_run(directory, step):
    """A run with a damaged metadata file fails at start instead of using another checkpoint."""
    for path in (directory / str(step)).rglob('*'):
        if path.is_file() and path.stat().st_size < 2000:
            path.write_bytes(b'\xff' + path.read_bytes()[2:])
    state, _ = newest(directory)
    assert_equal(state, make_state(2 if step == 3 else 3))
    with Checkpoints(directory, keep=2, best_metric='top1') as checkpoints:
        checkpoints.save(make_state(4), {}, None)
    assert not checkpoints.failed
    assert saved_steps(directory)[-1] == 4
