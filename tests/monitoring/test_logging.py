"""The records of a run when the disk is full, and when the disk has altered them."""

import json
import resource
from pathlib import Path

import pytest

from convnext_jax.errors import UserError
from convnext_jax.monitoring.logging import RunLog
from convnext_jax.monitoring.records import read_records
from convnext_jax.tasks import Headline

SPEEDS = {'images_per_second': 10.0, 'step_ms_median': 100.0, 'step_ms_p99': 120.0, 'data_wait_share': 0.0}
METRICS = {'loss': 1.0, 'learning_rate': 0.1, **SPEEDS}


@pytest.fixture
def limit_files():
    """Limits the size of files: a larger write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def steps(workdir: Path) -> list[int]:
    return [record['step'] for record in read_records(workdir)]


def test_a_disk_that_is_full_for_a_while_costs_no_record(tmp_path, capsys, limit_files):
    """The run would lose records, stop, or repeat the warning at every step."""
    with RunLog(tmp_path, 0, 8, Headline('top1', 'top-1', ' %')) as log:
        log.train(1, 0.1, METRICS, 1.0)
        limit_files(1)
        for step in (2, 3, 4):
            log.train(step, 0.1 * step, METRICS, 1.0)
        log.evaluation(4, 0.4, 'test', {'loss': 1.0, 'top1': 50.0})
        assert steps(tmp_path) == [1]
        limit_files(resource.RLIM_INFINITY)
        log.train(5, 0.5, METRICS, 1.0)
        assert steps(tmp_path) == [1, 2, 3, 4, 4, 5]
    assert capsys.readouterr().out.count('cannot be written') == 1


def test_a_run_whose_records_are_not_on_disk_does_not_finish(tmp_path, limit_files):
    """The run would finish without its last records, and report the accuracy of an earlier step."""

    def run() -> None:
        with RunLog(tmp_path, 0, 8, Headline('top1', 'top-1', ' %')) as log:
            limit_files(1)
            log.train(1, 0.1, METRICS, 1.0)

    with pytest.raises(UserError, match='metrics.jsonl is incomplete: File too large. Free disk space'):
        run()
    limit_files(resource.RLIM_INFINITY)
    assert [path.name for path in tmp_path.glob('.*')] == []


def test_altered_records_are_skipped(tmp_path):
    """A flipped bit in metrics.jsonl would prevent a run from resuming."""
    good = json.dumps({'step': 1, 'epoch': 0.1, 'split': 'train'}).encode()
    lines = [good, good.replace(b'step', b'stap'), good.replace(b'"train"', b'"tr\xff'), b'7', good[:9]]
    (tmp_path / 'metrics.jsonl').write_bytes(b'\n'.join(lines))
    assert steps(tmp_path) == [1]
