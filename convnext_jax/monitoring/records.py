"""The records of a run: the lines of metrics.jsonl."""

import contextlib
import json
from pathlib import Path

from convnext_jax.checkpoints.workdir import METRICS


def read_records(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl, but for those that a kill cut short or a disk altered."""
    path = workdir / METRICS
    records = []
    for line in path.read_bytes().decode(errors='replace').splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            record['step'], record['epoch'], record['split']
            records.append(record)
    return records
