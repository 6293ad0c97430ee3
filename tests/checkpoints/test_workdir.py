"""The workdir: its lock, its config, and workdirs in buckets."""

import importlib.util
import json
import threading
from pathlib import Path

import pytest
from etils import epath

from convnext_jax.checkpoints import workdir
from convnext_jax.checkpoints.workdir import (
    CHECKPOINTS,
    CONFIG,
    LOCK,
    locked,
    locked_by_main_process,
    open_to_append,
    workdir_path,
    write_config,
)
from convnext_jax.config import as_dict, default_config, from_dict, read_config, resolve_paths
from convnext_jax.errors import UserError
from convnext_jax.monitoring.logging import RunLog
from convnext_jax.monitoring.records import read_records
from convnext_jax.tasks import Headline

STORED = Path(__file__).parent / 'config_of_0.1.0.json'
"""The config.json that version 0.1.0 wrote for the demo. Later versions must read it; do not change it."""


def test_a_locked_workdir_is_refused_until_it_is_unlocked(tmp_path):
    """Two runs write into one workdir and destroy each other's checkpoints."""
    with locked(tmp_path / 'run'), pytest.raises(UserError, match='in use by process'), locked(tmp_path / 'run'):
        pass
    with locked(tmp_path / 'run'):
        pass


def test_a_lock_may_become_visible_late_on_a_network_file_system(tmp_path, monkeypatch):
    """A job of many hosts ends because one host reads the lock file a moment too early."""
    lock = tmp_path / LOCK
    lock.write_text('of the run before')
    monkeypatch.setattr(workdir, 'is_main_process', lambda: False)
    monkeypatch.setattr(workdir, 'all_gather_objects', lambda own: ['of this run'])
    timer = threading.Timer(0.5, lock.write_text, ['of this run'])
    timer.start()
    with locked_by_main_process(tmp_path):
        pass
    timer.join()
    monkeypatch.setattr(workdir, 'VISIBLE_TIMEOUT', 0.3)
    lock.write_text("of another folder's run")
    with pytest.raises(UserError, match='all hosts must share a file system'), locked_by_main_process(tmp_path):
        pass


def test_a_workdir_that_cannot_be_created_is_refused(tmp_path):
    """The user sees a traceback for a mistyped path."""
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be written'), locked(tmp_path / 'file' / 'run'):
        pass


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A workdir with a checkpoint."""
    write_config(tmp_path, default_config())
    (tmp_path / CHECKPOINTS / '100').mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ('field', 'value', 'line'),
    [
        ('seed', 1, 'seed was 0, is now 1'),
        ('data.train_split', 'half', 'data.train_split was train, is now half'),
        ('data.exact', True, 'data.exact was False, is now True'),
        ('model.name', 'convnext_small', 'model.name was convnext_tiny, is now convnext_small'),
        ('data.name', 'folder', 'data.name was imagenet2012, is now folder'),
        ('batch_size', 8, 'batch_size was 4096, is now 8'),
    ],
)
def test_another_model_data_set_or_seed_is_refused_with_the_difference(begun, field, value, line):
    """A run resumes as a different experiment, without a message."""
    other = default_config()
    other.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=line):
        write_config(begun, other)
    assert read_config(begun / CONFIG) == default_config()


def test_before_the_first_checkpoint_anything_may_change(tmp_path):
    """After a typo in the first command, the workdir cannot be used any more."""
    write_config(tmp_path, default_config())
    other = default_config()
    other.seed = 1
    assert write_config(tmp_path, other) == []
    assert read_config(tmp_path / CONFIG) == other


def test_a_longer_run_or_a_moved_data_set_is_not_another_run(begun):
    """A finished run cannot be extended, or a run is lost when its data moves."""
    longer = default_config()
    longer.epochs = 600.0
    longer.data.dir = '/elsewhere'
    assert write_config(begun, longer) == ['data.dir was , is now /elsewhere', 'epochs was 300.0, is now 600.0']
    assert read_config(begun / CONFIG) == longer


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('accumulation_steps', 2),
        ('init.weights', 'runs/other'),
        ('init.params', 'ema'),
        ('data.dir', 'elsewhere'),
        ('data.eval_split', 'test'),
        ('data.crop_pct', 0.9),
        ('model.dtype', 'bfloat16'),
    ],
)
def test_fields_that_change_no_step_may_change(begun, field, value):
    """A run is lost if it needs less memory or its data was moved."""
    other = default_config()
    other.update_from_flattened_dict({field: value})
    (line,) = write_config(begun, other)
    assert line.startswith(f'{field} was ')
    assert line.endswith('no effect: the run resumes from its checkpoint)') == field.startswith('init.')
    assert read_config(begun / CONFIG) == other


def test_the_config_of_an_earlier_version_is_read(begun):
    """No run of an earlier version can be resumed after a config field was added."""
    stored = json.loads(STORED.read_text())
    assert stored['data']['name'] == 'fashion_mnist_mini'
    config = from_dict(stored)
    assert {field: value for field, value in flat(as_dict(config)).items() if field in flat(stored)} == flat(stored)
    del stored['accumulation_steps'], stored['data']['patience_seconds']
    (begun / CONFIG).write_text(json.dumps(stored))
    assert write_config(begun, config) == []


def test_a_field_of_a_later_version_is_named(begun):
    """An older version of the package silently ignores the field, and trains another model."""
    stored = as_dict(default_config())
    stored['model']['attention'] = True
    (begun / CONFIG).write_text(json.dumps(stored))
    for read in (lambda: read_config(begun / CONFIG), lambda: write_config(begun, default_config())):
        with pytest.raises(
            UserError, match='^another version of convnext_jax wrote .* has no config field model.attention; use'
        ):
            read()


def flat(values, prefix=''):
    pairs = {}
    for name, value in values.items():
        pairs |= flat(value, f'{prefix}{name}.') if isinstance(value, dict) else {f'{prefix}{name}': value}
    return pairs


def test_a_config_is_unchanged_by_json():
    """A resumed run refuses its own config."""
    config = default_config()
    config.data.crop_scale = ()
    assert from_dict(json.loads(json.dumps(as_dict(config)))) == config


@pytest.mark.parametrize('change', [{'sead': 1}, {'seed': 'one'}, {'seed': None}])
def test_a_config_with_an_unknown_field_or_a_wrong_type_is_refused(change):
    """A damaged config.json changes the run or ends in a traceback."""
    with pytest.raises(UserError, match=next(iter(change))):
        from_dict(as_dict(default_config()) | change)


def test_a_damaged_or_missing_config_is_a_one_line_error(tmp_path):
    """The user sees a traceback for a wrong workdir."""
    with pytest.raises(UserError, match='holds no run'):
        read_config(tmp_path / CONFIG)
    for content in ('{', '[]', '3'):
        (tmp_path / CONFIG).write_text(content)
        with pytest.raises(UserError, match='is damaged'):
            read_config(tmp_path / CONFIG)


def test_a_missing_library_for_buckets_is_named(monkeypatch):
    """The user sees a traceback of etils."""
    monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
    with pytest.raises(UserError, match='gs://bucket/run needs `pip install gcsfs google-cloud-storage`'):
        workdir_path('gs://bucket/run')


def test_a_workdir_in_a_bucket_holds_config_records_and_curves(tmp_path, monkeypatch):
    """A run loses its records, because files in a bucket cannot be locked, renamed or appended to."""
    monkeypatch.setattr(importlib.util, 'find_spec', lambda _: 'found')
    assert str(workdir_path('gs://bucket/run') / CONFIG) == 'gs://bucket/run/config.json'
    assert workdir_path('runs/demo') == Path('runs/demo')
    run = epath.Path(tmp_path)  # every path that is not a pathlib.Path counts as a bucket
    with locked(run):
        assert not list(run.iterdir())
    write_config(run, default_config())
    assert read_config(run / CONFIG) == default_config()
    speed = dict.fromkeys(('images_per_second', 'step_ms_median', 'step_ms_p99', 'data_wait_share'), 1.0)
    for start in (0, 1):
        with RunLog(run, start, 2, Headline('top1', 'top-1')) as log:
            log.train(start + 1, 0.5, {'loss': 2.0, 'learning_rate': 0.1, **speed}, seconds_left=0)
            log.evaluation(start + 1, 0.5, 'test', {'loss': 2.0, 'top1': 50.0})
    assert [record['step'] for record in read_records(run)] == [1, 1, 2, 2]
    assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_a_bucket_that_cannot_be_written_is_refused(tmp_path):
    """A run trains for hours before its first save fails, or the user sees a traceback of gcsfs."""
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot be written: '), locked(epath.Path(tmp_path) / 'file'):
        pass


def test_records_are_written_later_if_a_bucket_was_not_reachable(tmp_path, monkeypatch):
    """The records of an outage are lost, or an error that is not an OSError ends the run."""

    class Unreachable(Exception):
        pass

    def fail(*_):
        raise Unreachable('503 Service Unavailable\nmore')

    path = epath.Path(tmp_path) / 'metrics.jsonl'
    path.write_text('')
    file = open_to_append(path)
    with monkeypatch.context() as patch:
        patch.setattr(type(path), 'write_bytes', fail)
        file.write('one\n')
        with pytest.raises(OSError, match='503 Service Unavailable') as raised:
            file.flush()
        assert raised.value.strerror == '503 Service Unavailable'
    file.write('two\n')
    file.close()
    assert path.read_text() == 'one\ntwo\n'


def test_a_data_set_in_a_bucket_is_refused_with_the_reason(tmp_path):
    """The user sees that a folder `gs:` in the current folder does not exist."""
    config = default_config()
    config.data.dir = 'gs://bucket/data'
    with pytest.raises(UserError, match='data.dir=gs://bucket/data: data sets are read from file systems'):
        resolve_paths(config)
