"""Damaged files: files of a checkpoint and of the workdir are truncated, altered or deleted."""

import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.runs import LAST, Case, Lab, complete, intact
from convnext_jax.checkpoints.workdir import METRICS

DAMAGES = ('truncated', 'with a flipped bit', 'deleted')
FOLDERS = ('', 'parameters', 'optimizer/ocdbt.process_0', 'ema/d', 'counters', 'manifest')


def cases(lab: Lab, rng: random.Random) -> Iterator[Case]:
    """Each damage to each kind of file of a checkpoint and of the workdir; deleted folders; all checkpoints damaged."""
    newest = Path('checkpoints') / str(LAST)
    kinds: dict[str, list[Path]] = {}
    for path in sorted((lab.finished / newest).rglob('*')):
        if path.is_file():
            name = path.relative_to(lab.finished / newest)
            kinds.setdefault(_kind(name), []).append(newest / name)
    workdir_files = {name: [Path(name)] for name in ('config.json', 'metrics.jsonl', 'curves.png')}
    for kind, paths in (kinds | workdir_files).items():
        for damage in DAMAGES:
            moment = f'{kind} of step {LAST} {damage}' if kind in kinds else f'{kind} {damage}'
            yield _resume(lab, moment, [rng.choice(paths)], damage, rng)
    for folder in FOLDERS:
        yield _resume(lab, f'folder {newest.name}/{folder} deleted', [newest / folder], 'deleted', rng)
    # A damaged older checkpoint must not keep the run from resuming.
    for older in ('', 'parameters', 'manifest/metadata', 'commit_success.txt'):
        paths = [Path('checkpoints/20') / older, newest / 'manifest/metadata']
        yield _resume(lab, f'20/{older} and the manifest of {LAST} deleted', paths, 'deleted', rng)
    manifests = [path.relative_to(lab.finished) for path in lab.finished.glob('checkpoints/*/manifest/metadata')]
    yield _resume(lab, 'the manifests of all checkpoints with a flipped bit', sorted(manifests), DAMAGES[1], rng)


def _kind(path: Path) -> str:
    """The kind of a file: its path without random parts, and with one name for three of the items with arrays."""
    name = re.sub('[0-9a-f]{32}', '*', str(path))
    return re.sub('^(parameters|optimizer|ema)/', 'ARRAYS/', name)


def _resume(lab: Lab, moment: str, paths: list[Path], damage: str, rng: random.Random) -> Case:
    """Damages files of a finished run and starts it again.

    The run must finish with correct files; or it must be refused, and its undamaged checkpoints stay intact.
    """
    case, workdir = Case(moment), lab.copy(lab.finished)
    damaged_steps = {path.parts[1] for path in paths if path.parts[0] == 'checkpoints'}
    for path in paths:
        _damage(workdir / path, damage, rng)
    run = lab.run(workdir)
    case.must(run.ended(0, 2))
    if run.status == 2:
        case.happened.append(run.error)
        for step in damaged_steps:  # all other checkpoints must be intact
            shutil.rmtree(workdir / 'checkpoints' / step, ignore_errors=True)
        for path in paths:
            if path.parts[0] != 'checkpoints':  # remove the fault
                shutil.copy(lab.finished / path, workdir / path)
        case.must(intact(workdir, lab.uninterrupted()))
    else:
        notes = [line.split(': moved')[0][:120] for line in run.lines if 'is damaged' in line]
        resumed = [line for line in run.lines if line.startswith('resumes')]
        case.happened += notes + (resumed or ['finished at once']) + ['bit-identical']
        shutil.rmtree(workdir / 'damaged', ignore_errors=True)
        if resumed or notes or not damaged_steps:
            # Records in a damaged metrics.jsonl are lost.
            case.must(complete(workdir, lab.uninterrupted(), records=Path(METRICS) not in paths))
    shutil.rmtree(workdir)
    return case


def _damage(path: Path, damage: str, rng: random.Random) -> None:
    if path.is_dir():
        shutil.rmtree(path)
        return
    content = bytearray(path.read_bytes())
    path.unlink()  # the file is a hard link
    if damage == 'truncated':
        path.write_bytes(content[: rng.randrange(len(content))])
    elif damage == 'with a flipped bit':
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
