"""Files of the newest checkpoint, and of the workdir, cut short, altered or gone."""

import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.runs import LAST, Case, Lab, intact, whole
from convnext_jax.checkpoints.workdir import METRICS

DAMAGES = ('cut short', 'a bit flipped', 'gone')
FOLDERS = ('', 'parameters', 'optimizer/ocdbt.process_0', 'ema/d', 'counters', 'manifest')


def cases(lab: Lab, rng: random.Random) -> Iterator[Case]:
    """Every kind of file of a checkpoint, each damage; whole folders; all checkpoints; the files beside them."""
    newest = Path('checkpoints') / str(LAST)
    kinds: dict[str, list[Path]] = {}
    for path in sorted((lab.finished / newest).rglob('*')):
        if path.is_file():
            name = path.relative_to(lab.finished / newest)
            kinds.setdefault(_kind(name), []).append(newest / name)
    beside = {name: [Path(name)] for name in ('config.json', 'metrics.jsonl', 'curves.png')}
    for kind, paths in (kinds | beside).items():
        for damage in DAMAGES:
            moment = f'{kind} of step {LAST} {damage}' if kind in kinds else f'{kind} {damage}'
            yield _again(lab, moment, [rng.choice(paths)], damage, rng)
    for folder in FOLDERS:
        yield _again(lab, f'folder {newest.name}/{folder} gone', [newest / folder], 'gone', rng)
    # An older one stays, or is gone over, as it is: it must not keep a run from going on.
    for older in ('', 'parameters', 'manifest/metadata', 'commit_success.txt'):
        paths = [Path('checkpoints/20') / older, newest / 'manifest/metadata']
        yield _again(lab, f'20/{older} gone, and the manifest of {LAST}', paths, 'gone', rng)
    manifests = [path.relative_to(lab.finished) for path in lab.finished.glob('checkpoints/*/manifest/metadata')]
    yield _again(lab, 'the manifests of all checkpoints', sorted(manifests), 'a bit flipped', rng)


def _kind(path: Path) -> str:
    """Its name without what is random in it; parameters stand for the other arrays too."""
    name = re.sub('[0-9a-f]{32}', '*', str(path))
    return re.sub('^(parameters|optimizer|ema)/', 'ARRAYS/', name)


def _again(lab: Lab, moment: str, paths: list[Path], damage: str, rng: random.Random) -> Case:
    """The same command again on a finished run with a damaged file: it is found whole, or made so, or refused."""
    case, workdir = Case(moment), lab.copy(lab.finished)
    untouched = {path.parts[1] for path in paths if path.parts[0] == 'checkpoints'}
    for path in paths:
        _damage(workdir / path, damage, rng)
    run = lab.run(workdir)
    case.must(run.ended(0, 2))
    if run.status == 2:
        case.happened.append(run.error)
        for step in untouched:  # the others must be as they were
            shutil.rmtree(workdir / 'checkpoints' / step, ignore_errors=True)
        for path in paths:
            if path.parts[0] != 'checkpoints':  # mended
                shutil.copy(lab.finished / path, workdir / path)
        case.must(intact(workdir, lab.unbroken()))
    else:
        notes = [line.split(': moved')[0][:120] for line in run.lines if 'is damaged' in line]
        resumed = [line for line in run.lines if line.startswith('resumes')]
        case.happened += notes + (resumed or ['finished at once']) + ['bit-identical']
        shutil.rmtree(workdir / 'damaged', ignore_errors=True)
        if resumed or notes or not untouched:
            case.must(whole(workdir, lab.unbroken(), records=Path(METRICS) not in paths))  # what was there is lost
    shutil.rmtree(workdir)
    return case


def _damage(path: Path, damage: str, rng: random.Random) -> None:
    if path.is_dir():
        shutil.rmtree(path)
        return
    content = bytearray(path.read_bytes())
    path.unlink()  # the copy is of links
    if damage == 'cut short':
        path.write_bytes(content[: rng.randrange(len(content))])
    elif damage == 'a bit flipped':
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
