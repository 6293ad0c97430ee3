"""Faults in the run itself: unreadable images, losses that are not finite, and a clock that jumps."""

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.faults.runs import LAST, Case, Lab, ends, intact, resumes
from convnext_jax.data.pipeline import shuffled


def images(lab: Lab, rng: random.Random) -> Iterator[Case]:
    """A folder of 1,100 images, some of which are truncated, overwritten or deleted."""
    folder = lab.folder / 'images'
    paths = _write_images(folder)
    overrides = (
        '--config.data.name=folder',
        f'--config.data.dir={folder}',
        '--config.data.train_split=train',
        '--config.data.eval_split=val',
        '--config.eval_every_epochs=0.2',
    )
    clean = lab.uninterrupted(*overrides)
    # Images of steps 8 to 12, which are not read yet when the first step is compiled.
    seen = [paths[shuffled(position, len(paths), 0, 0)] for position in range(7 * 16, 12 * 16)]
    for damage in (_truncate, _overwrite):
        broken = rng.choice(seen)
        case, workdir = Case(f'one training image of 1,100 {damage.__doc__}; killed and resumed'), lab.workdir()
        with _damaged([broken], damage):
            unbroken = lab.run_uninterrupted(*overrides)
            run = lab.start(workdir, *overrides)
            run.until(run.says('step 12/'))
            run.process.kill()
            run.end()
            case.must([] if run.says(broken.name)() else ['the image is not named'])
            ends(case, lab.start(workdir, *overrides), workdir, unbroken, 0)
        case.must([] if intact(unbroken, clean) else ['the image was never used'])
        yield case

    broken = rng.choice(seen)
    case, workdir = Case('one training image of 1,100 deleted after the folder was listed'), lab.workdir()
    run = lab.start(workdir, *overrides)
    run.until(run.says('workdir'))
    with _damaged([broken], Path.unlink):
        run.end()
    case.must(run.ended(0) + ([] if run.says(broken.name)() else ['the image is not named']))
    case.happened.append('named, replaced, finished')
    yield case

    case, workdir = Case('five training images of 1,100 truncated: more than one in a thousand'), lab.workdir()
    with _damaged(rng.sample(seen, 5), _truncate):
        ends(case, lab.start(workdir, *overrides), workdir, workdir, 2)  # the first of them was replaced
    yield case


def not_finite(lab: Lab, rng: random.Random) -> Iterator[Case]:
    """Augmented images that are NaN, so that the loss and its gradients are NaN."""
    few = sorted(rng.sample(range(1, LAST - 1), 3))
    program = ('-m', 'benchmarks.faults.injected', f'nan={",".join(map(str, few))}', 'train.py')
    unbroken = lab.uninterrupted(program=program)
    case, workdir = Case(f'NaN in steps {few}; killed and resumed'), lab.workdir()
    run = lab.start(workdir, program=program)
    run.until(run.says('step 12/'))
    run.process.kill()
    run.end()
    ends(case, lab.start(workdir, program=program), workdir, unbroken, 0)
    case.must(
        []
        if '"skipped": 3' in (workdir / 'metrics.jsonl').read_text().splitlines()[-2]
        else ['not exactly 3 steps skipped']
    )
    yield case

    first = rng.randrange(5, 12)
    program = ('-m', 'benchmarks.faults.injected', f'nan={",".join(map(str, range(first, first + 12)))}', 'train.py')
    case, workdir = Case(f'NaN in twelve steps in a row, from {first} on'), lab.workdir()
    run = lab.run(workdir, program=program)
    case.must(run.ended(2))
    case.happened.append(run.error)
    good = [step for step in (4, 8, 10) if step <= first]
    like = [path for path in (workdir / 'checkpoints').iterdir() if int(path.name) in good]
    case.must(intact(workdir, workdir) + ([] if like else ['no good checkpoint is left']))
    yield case


def clock(lab: Lab, rng: random.Random) -> Iterator[Case]:
    """A clock that jumps during the run, and files with modification times in the future."""
    for number in range(2):
        program = ('-m', 'benchmarks.faults.injected', f'clock={rng.randrange(1000)}', 'train.py')
        moment = f'time.time jumps by up to a day every five seconds, run {number}; killed and resumed'
        case, workdir = Case(moment), lab.workdir()
        run = lab.start(workdir, program=program)
        run.until(run.says('step 12/'))
        run.process.kill()
        run.end()
        last = lab.start(workdir, program=program)
        ends(case, last, workdir, lab.uninterrupted(), 0, 2)  # 2: Orbax takes a jump ahead for a timeout
        if last.status:
            resumes(lab, case, workdir, lab.uninterrupted())
        yield case
    case, workdir = Case('killed at step 12; all files a day in the future, then 30 years in the past'), lab.workdir()
    for moment in (time.time() + 86_400, time.time() - 30 * 365 * 86_400):
        run = lab.start(workdir)
        run.until(run.says('step 12/'))
        run.process.kill()
        run.end()
        for path in workdir.rglob('*'):
            os.utime(path, (moment, moment))
    ends(case, lab.start(workdir), workdir, lab.uninterrupted(), 0)
    yield case


def _write_images(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for split, count in (('train', 110), ('val', 4)):
        for name in map(str, range(10)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                path = folder / split / name / f'{split}{name}-{number:03}.png'
                Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(path)
                paths += [path] if split == 'train' else []
    return paths


@contextlib.contextmanager
def _damaged(paths: list[Path], damage: Callable[[Path], None]) -> Iterator[None]:
    """Damages files, and restores them at the end."""
    contents = {path: path.read_bytes() for path in paths}
    for path in paths:
        damage(path)
    yield
    for path, content in contents.items():
        path.write_bytes(content)


def _truncate(path: Path) -> None:
    """truncated"""
    path.write_bytes(path.read_bytes()[:300])


def _overwrite(path: Path) -> None:
    """overwritten"""
    path.write_bytes(bytes(range(256)) * 3)
