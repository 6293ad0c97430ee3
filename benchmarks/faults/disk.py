"""Full disks and read-only folders, temporary and permanent."""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.runs import Case, Lab, Running, ends, resumes, unfinished

MB = 2**20
CHECKPOINT = 54 * MB  # size of a checkpoint of the small run


def full_disk(lab: Lab, rng: random.Random) -> Iterator[Case]:
    """Full disks of two kinds: a limit on the size of files, which needs no rights; a small tmpfs, which needs root."""
    del rng
    yield from _limited_files(lab)
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(_tmpfs(lab.folder / 'disk', int(2.5 * CHECKPOINT)))
        except (OSError, subprocess.CalledProcessError) as error:
            yield Case('a small tmpfs', [f'it cannot be mounted here: {error}'], skipped=True)
            return
        yield from _small_disk(lab, disk)


def _limited_files(lab: Lab) -> Iterator[Case]:
    case, unbroken, workdir = Case('files limited to 1 MB, from step 4 to 12'), lab.uninterrupted(), lab.workdir()
    run = lab.start(workdir)
    run.until(run.says('step 4/'))
    _limit_files(run, MB)
    run.until(run.says('step 12/'))
    _limit_files(run, resource.RLIM_INFINITY)
    ends(case, run, workdir, unbroken, 0)
    yield case

    for moment, stopped in (('from step 12 on', False), ('from step 12 on, and SIGTERM at 16', True)):
        case, workdir = Case(f'files limited to 1 MB, {moment}'), lab.workdir()
        run = lab.start(workdir)
        run.until(run.says('step 12/'))
        _limit_files(run, MB)
        if stopped:
            run.until(run.says('step 16/'))
            run.process.send_signal(signal.SIGTERM)
        ends(case, run, workdir, unbroken, 2)
        case.must(['reports a save that failed as saved'] if run.says(', saved; the same command')() else [])
        resumes(lab, case, workdir, unbroken)
        yield case


def _small_disk(lab: Lab, disk: Path) -> Iterator[Case]:
    unbroken, workdir, filler = lab.uninterrupted(), disk / 'run', disk / 'filler'
    case = Case('a tmpfs with space for only two checkpoints')
    ends(case, lab.start(workdir), workdir, unbroken, 2)
    _resize(disk, 6 * CHECKPOINT)
    resumes(lab, case, workdir, unbroken)
    yield case

    shutil.rmtree(workdir)
    case = Case('a tmpfs that another program fills while the first save is written, until step 12')
    run = lab.start(workdir)
    run.until(lambda: bool(unfinished(workdir)))
    _fill(filler)
    run.until(run.says('step 12/'))
    filler.unlink()
    ends(case, run, workdir, unbroken, 0)
    yield case

    for moment in ('from step 8 on, also for records and curves', 'from the start'):
        shutil.rmtree(workdir)
        case = Case(f'a tmpfs that is full {moment}')
        if moment == 'from the start':
            _fill(filler)
        run = lab.start(workdir)
        if run.until(run.says('step 8/')):
            _fill(filler)
        ends(case, run, workdir, unbroken, 2)
        filler.unlink()
        resumes(lab, case, workdir, unbroken)
        yield case


def read_only(lab: Lab, rng: random.Random) -> Iterator[Case]:
    """A workdir, or its folder of checkpoints, without write permission."""
    del rng
    before = ()
    if os.geteuid() == 0:  # root may write everywhere, unless the process drops these capabilities
        if not shutil.which('setpriv'):
            yield Case('a read-only folder', ['root may write everywhere, and setpriv is not installed'], skipped=True)
            return
        before = ('setpriv', '--bounding-set=-dac_override,-dac_read_search')
    unbroken = lab.uninterrupted()
    for until in ('step 12/', None):
        case = Case('the checkpoints read-only from step 4 ' + ('to 12' if until else 'on'))
        workdir = lab.workdir()
        run = lab.start(workdir, before=before)
        run.until(run.says('step 4/'))
        (workdir / 'checkpoints').chmod(0o555)
        if until:
            run.until(run.says(until))
            (workdir / 'checkpoints').chmod(0o755)
        ends(case, run, workdir, unbroken, 0 if until else 2)
        (workdir / 'checkpoints').chmod(0o755)
        if not until:
            resumes(lab, case, workdir, unbroken)
        yield case
    for folder in ('.', 'checkpoints'):
        case, workdir = Case(f'a workdir whose {folder} is read-only at the start'), lab.workdir()
        (workdir / folder).mkdir(parents=True)
        (workdir / folder).chmod(0o555)
        ends(case, lab.start(workdir, before=before), workdir, unbroken, 2)
        (workdir / folder).chmod(0o755)
        resumes(lab, case, workdir, unbroken)
        yield case


@contextlib.contextmanager
def _tmpfs(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(['umount', '--lazy', folder], check=True)


def _resize(folder: Path, size: int) -> None:
    subprocess.run(['mount', '-o', f'remount,size={size}', folder], check=True)


def _fill(filler: Path) -> None:
    """Fills a disk to its last block."""
    for size in (MB, 4096):
        with open(filler, 'ab', buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(size)):
                pass


def _limit_files(run: Running, size: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        hard = resource.prlimit(run.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (size, hard))
