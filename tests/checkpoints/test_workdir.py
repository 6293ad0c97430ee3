"""A workdir belongs to one run and one process at a time."""

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
    locked_by_first,
    settle_config,
    workdir_path,
)
from convnext_jax.config import as_dict, default_config, from_dict, read_config
from convnext_jax.errors import UserError
from convnext_jax.monitoring.logging import RunLog
from convnext_jax.monitoring.records import read_records
from convnext_jax.tasks import Headline

STORED = Path(__file__).parent / 'config_of_0.1.0.json'
"""The config.json of a run of the demo by version 0.1.0. A later version leaves it as it is, and reads it."""


def test_a_locked_workdir_is_refused_and_free_again_after(tmp_path):
    with locked(tmp_path / 'run'), pytest.raises(UserError, match='in use by process'), locked(tmp_path / 'run'):
        pass
    with locked(tmp_path / 'run'):
        pass


def test_a_lock_that_a_network_file_system_shows_late_is_waited_for(tmp_path, monkeypatch):
    """Another host reads it a moment after process 0 wrote it: no reason to end a job of many hosts."""
    lock = tmp_path / LOCK
    lock.write_text('of the run before')
    monkeypatch.setattr(workdir, 'is_main_process', lambda: False)
    monkeypatch.setattr(workdir, 'all_gather_objects', lambda own: ['of this run'])
    timer = threading.Timer(0.5, lock.write_text, ['of this run'])
    timer.start()
    with locked_by_first(tmp_path):
        pass
    timer.join()
    monkeypatch.setattr(workdir, 'SHOWN_WITHIN', 0.3)
    lock.write_text("of another folder's run")
    with pytest.raises(UserError, match='all hosts must share a file system'), locked_by_first(tmp_path):
        pass


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be written'), locked(tmp_path / 'file' / 'run'):
        pass


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A workdir with a checkpoint."""
    settle_config(tmp_path, default_config())
    (tmp_path / CHECKPOINTS / '100').mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ('field', 'value', 'line'),
    [
        ('seed', 1, 'seed was 0, is 1'),
        ('data.train_split', 'half', 'data.train_split was train, is half'),
        ('data.exact', True, 'data.exact was False, is True'),
        ('model.name', 'convnext_small', 'model.name was convnext_tiny, is convnext_small'),
        ('data.name', 'folder', 'data.name was imagenet2012, is folder'),
        ('batch_size', 8, 'batch_size was 4096, is 8'),
    ],
)
def test_another_model_data_set_or_seed_is_refused_with_the_difference(begun, field, value, line):
    other = default_config()
    other.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=line):
        settle_config(begun, other)
    assert read_config(begun / CONFIG) == default_config()


def test_before_the_first_checkpoint_anything_may_change(tmp_path):
    """A typing error that stopped at once leaves a workdir that can be used."""
    settle_config(tmp_path, default_config())
    other = default_config()
    other.seed = 1
    assert settle_config(tmp_path, other) == []
    assert read_config(tmp_path / CONFIG) == other


def test_a_longer_run_or_a_moved_data_set_is_not_another_run(begun):
    longer = default_config()
    longer.epochs = 600.0
    longer.data.dir = '/elsewhere'
    assert settle_config(begun, longer) == ['data.dir was , is /elsewhere', 'epochs was 300.0, is 600.0']
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
    """A run that needs less memory, or whose data was moved, would otherwise be lost."""
    other = default_config()
    other.update_from_flattened_dict({field: value})
    (line,) = settle_config(begun, other)
    assert line.startswith(f'{field} was ')
    assert line.endswith('without effect: the run goes on from its checkpoint)') == field.startswith('init.')
    assert read_config(begun / CONFIG) == other


def test_the_config_of_a_run_of_an_earlier_version_is_read(begun):
    """A field that was added since has its default; without that, every run of the version before could not go on."""
    stored = json.loads(STORED.read_text())
    assert stored['data']['name'] == 'fashion_mnist_mini'
    config = from_dict(stored)
    assert {field: value for field, value in flat(as_dict(config)).items() if field in flat(stored)} == flat(stored)
    del stored['accumulation_steps'], stored['data']['patience_seconds']
    (begun / CONFIG).write_text(json.dumps(stored))
    assert settle_config(begun, config) == []


def test_a_field_of_a_later_version_is_named(begun):
    """Without the field the run would be another one."""
    stored = as_dict(default_config())
    stored['model']['attention'] = True
    (begun / CONFIG).write_text(json.dumps(stored))
    for read in (lambda: read_config(begun / CONFIG), lambda: settle_config(begun, default_config())):
        with pytest.raises(
            UserError, match='^another version of convnext_jax wrote .* has no config field model.attention; use'
        ):
            read()


def flat(values, prefix=''):
    pairs = {}
    for name, value in values.items():
        pairs |= flat(value, f'{prefix}{name}.') if isinstance(value, dict) else {f'{prefix}{name}': value}
    return pairs


def test_config_survives_json():
    config = default_config()
    config.data.crop_scale = ()
    assert from_dict(json.loads(json.dumps(as_dict(config)))) == config


@pytest.mark.parametrize('change', [{'sead': 1}, {'seed': 'one'}, {'seed': None}])
def test_a_config_that_does_not_fit_is_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        from_dict(as_dict(default_config()) | change)


def test_damaged_or_missing_config_is_one_line(tmp_path):
    with pytest.raises(UserError, match='holds no run'):
        read_config(tmp_path / CONFIG)
    for content in ('{', '[]', '3'):
        (tmp_path / CONFIG).write_text(content)
        with pytest.raises(UserError, match='is damaged'):
            read_config(tmp_path / CONFIG)


def test_a_workdir_in_a_bucket_holds_config_records_and_curves(tmp_path):
    """There nothing can be locked, renamed or appended to: a run must not lose its records for that."""
    assert str(workdir_path('gs://bucket/run') / CONFIG) == 'gs://bucket/run/config.json'
    assert workdir_path('runs/demo') == Path('runs/demo')
    run = epath.Path(tmp_path)  # any path that is no pathlib.Path is taken for a bucket's
    with locked(run):
        assert not list(run.iterdir())
    settle_config(run, default_config())
    assert read_config(run / CONFIG) == default_config()
    speed = dict.fromkeys(('images_per_second', 'step_ms_median', 'step_ms_p99', 'data_wait_share'), 1.0)
    for start in (0, 1):
        with RunLog(run, start, 2, Headline('top1', 'top-1')) as log:
            log.train(start + 1, 0.5, {'loss': 2.0, 'learning_rate': 0.1, **speed}, seconds_left=0)
            log.evaluation(start + 1, 0.5, 'test', {'loss': 2.0, 'top1': 50.0})
    assert [record['step'] for record in read_records(run)] == [1, 1, 2, 2]
    assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')
