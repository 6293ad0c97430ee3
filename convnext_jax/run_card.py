"""The section of a model card that describes the run that trained the weights."""

import json
from pathlib import Path

from convnext_jax.checkpoints.workdir import CONFIG, CURVES
from convnext_jax.interop.hub import HUB_ID
from convnext_jax.monitoring.records import read_records

PRIVATE = ('dir', 'weights', 'compilation_cache_dir')
"""Config fields that hold local paths."""
COUNTERS = ('step', 'epoch', 'split')
"""Entries of a record that are not metrics."""


def run_section(workdir: Path) -> str:
    """Data, steps, newest evaluations, curves and config of a run, in Markdown.

    The card is public, so config fields that may hold local paths are left out. If the run has `curves.png`, the
    section shows it, and the picture must be in the folder of the card.

    Args:
        workdir: the workdir of the run.
    """
    config = json.loads((workdir / CONFIG).read_bytes())
    records = read_records(workdir)
    start = config['init']['weights']
    weights = f'the weights {start}' if _is_public(start) else 'other weights' if start else 'random weights'
    steps = max((record['step'] for record in records), default=0)
    images = f'{steps:,} steps of {config["batch_size"]:,} images'
    lines = [
        '## Training\n',
        f'Trained with convnext_jax on `{config["data"]["name"]}`: {images}, starting from {weights}.\n',
    ]
    newest = {record['split']: record for record in records if record['split'] != 'train'}
    if newest:
        lines += ['| Split | Step | Metric | Value |', '| --- | --- | --- | --- |']
    for split, record in newest.items():
        metrics = {name: value for name, value in record.items() if name not in COUNTERS}
        lines += [f'| {split} | {record["step"]:,} | {name} | {_text(value)} |' for name, value in metrics.items()]
    if (workdir / CURVES).exists():
        lines.append(f'\n![loss and metrics]({CURVES})')
    public = json.dumps(_without_paths(config), indent=1, ensure_ascii=False)
    lines.append(f'\n<details><summary>Config</summary>\n\n```json\n{public}\n```\n\n</details>')
    return '\n'.join(lines)


def _text(value: object) -> str:
    return f'{value:.6g}' if isinstance(value, float) else str(value)


def _without_paths(config: dict) -> dict:
    return {
        name: _without_paths(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in PRIVATE and not _has_path(value)
    }


def _has_path(value: object) -> bool:
    if isinstance(value, list):
        return any(map(_has_path, value))
    return isinstance(value, str) and ('/' in value or '\\' in value)


def _is_public(name: str) -> bool:
    """Whether a name has the form of a hub id, and is not a path on this machine."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()
