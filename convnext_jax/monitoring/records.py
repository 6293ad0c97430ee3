"""The records of a run, which are the lines of metrics.jsonl."""

import contextlib
import json
from pathlib import Path

from convnext_jax.checkpoints.workdir import METRICS


def read_records(workdir: Path) -> list[dict]:
    """Reads metrics.jsonl; skips lines that are truncated or damaged.

    Returns:
        One dict for each record, with at least `step`, `epoch` and `split`; [] if the file does not exist.
    """
    path = workdir / METRICS
    records = []
    for line in path.read_bytes().decode(errors='replace').splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            record['step'], record['epoch'], record['split']
            records.append(record)
    return records
