"""Starts small runs of train.py in subprocesses, and checks the files that they write."""

import atexit
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import jax

from convnext_jax.checkpoints.checkpoint import DamagedCheckpoint, restore, saved_steps
from convnext_jax.checkpoints.manager import UNFINISHED
from convnext_jax.config import read_config
from convnext_jax.errors import UserError
from convnext_jax.monitoring.records import read_records
from convnext_jax.tasks import make_task
from convnext_jax.training.durations import make_durations
from convnext_jax.training.program import Program
from convnext_jax.training.sharding import make_mesh

ROOT = Path(__file__).parent.parent.parent
LAST = 24
# A run that takes a few seconds: ten batches per epoch, and 40 evaluation images.
SMALL = (
    '--config=configs/fashion_mnist.py',
    '--config.data.train_split=train[:160]',
    '--config.data.eval_split=test[:40]',
    '--config.batch_size=16',
    f'--config.steps={LAST}',
    '--config.optimizer.warmup_steps=4',
    '--config.log_every_steps=1',  # records cover single steps, so that they do not depend on where a run was resumed
    '--config.eval_every_epochs=1',
    '--config.checkpoint_every_steps=4',
)
WORKERS = ('--config.data.workers=2', '--config.data.crop_scale=(0.5,1.0)')
TIMEOUT = 3600  # seconds; a run that takes longer, even on a busy machine, hangs
CONTENTS = {'.lock', 'config.json', 'metrics.jsonl', 'curves.png', 'tensorboard', 'checkpoints', 'damaged'}


@dataclasses.dataclass
class Case:
    """One case of the report.

    Attributes:
        moment: the fault, and when it occurred.
        happened: what the runs did.
        problems: why the case fails; empty if it passes.
        skipped: whether the fault cannot be caused on this machine.
    """

    moment: str
    happened: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    skipped: bool = False

    @property
    def verdict(self) -> str:
        return 'skip' if self.skipped else 'FAIL' if self.problems else 'pass'

    def must(self, problems: list[str]) -> None:
        """Adds problems to the case; an empty list changes nothing."""
        self.problems += problems
        self.happened += [f'BUT {problem}' for problem in problems]


class Running:
    """A running process of the program. Threads collect the lines that it prints."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        atexit.register(self.process.kill)  # also if the benchmark itself fails
        self.pid = self.process.pid
        self.lines: list[str] = []
        self.errors: list[str] = []
        streams = ((self.process.stdout, self.lines), (self.process.stderr, self.errors))
        self._readers = [threading.Thread(target=_collect, args=stream, daemon=True) for stream in streams]
        for reader in self._readers:
            reader.start()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def until(self, condition: Callable[[], bool]) -> bool:
        """Waits until the condition is true or the process has ended, and returns whether it is true."""
        while not (held := condition()) and self.alive:
            threading.Event().wait(0.005)
        return held

    def says(self, text: str) -> Callable[[], bool]:
        """A condition for `until`: whether a printed line contains the text."""
        return lambda: any(text in line for line in self.lines)

    def end(self) -> 'Running':
        """Waits until the process has ended; kills it after `TIMEOUT` seconds."""
        try:
            self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self.errors.append(f'hung for {TIMEOUT} s')
        for reader in self._readers:
            reader.join(60)
        return self

    @property
    def status(self) -> int:
        return self.process.returncode

    def ended(self, *statuses: int) -> list[str]:
        """The problems with the end of the process: an unexpected status, a traceback, or not one line of error."""
        problems = []
        if self.status not in statuses:
            problems.append(f'status {self.status}: {" | ".join(self.errors[-3:])}')
        if any('Traceback' in line for line in self.errors + self.lines):
            problems.append(f'a traceback: {" | ".join(self.errors)[-400:]}')
        if self.status == 2 and sum(line.startswith('error: ') for line in self.errors) != 1:
            problems.append('not exactly one line of error')
        return problems

    @property
    def error(self) -> str:
        """The line of error, truncated to 150 characters."""
        return next((line[:150] for line in self.errors if line.startswith('error: ')), f'status {self.status}')


class Lab:
    """Starts runs that share a compilation cache, and caches uninterrupted runs to compare them with.

    Args:
        folder: the folder of all workdirs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._numbers = itertools.count()
        self.environment = os.environ | {
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': '--xla_force_host_platform_device_count=1',
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5',
            'JAX_COMPILATION_CACHE_DIR': os.environ.get('JAX_COMPILATION_CACHE_DIR', str(folder / 'compiled')),
        }
        self.uninterrupted = functools.cache(self.run_uninterrupted)

    def workdir(self) -> Path:
        """The path of a new workdir, which does not exist yet."""
        return self.folder / f'run{next(self._numbers)}'

    def copy(self, run: Path) -> Path:
        """A copy of a workdir. Its files are hard links: replace them instead of changing them."""
        return shutil.copytree(run, self.workdir(), copy_function=os.link)

    def start(self, workdir: Path, *overrides: str, program: tuple = ('train.py',), before: tuple = ()) -> Running:
        """Starts the program.

        Args:
            workdir: the workdir of the run.
            overrides: flags in addition to `SMALL`.
            program: arguments of Python.
            before: a command prefix, such as setpriv.
        """
        command = [*before, sys.executable, *program, *SMALL, *overrides, f'--workdir={workdir}']
        return Running(command, self.environment)

    def run(self, workdir: Path, *overrides: str, **options: tuple) -> Running:
        """Starts the program, and waits until it has ended."""
        return self.start(workdir, *overrides, **options).end()

    def run_uninterrupted(self, *overrides: str, program: tuple = ('train.py',)) -> Path:
        """Runs the program to its end, with a checkpoint at each step, and returns the workdir."""
        workdir = self.workdir()
        every = ('--config.checkpoint_every_steps=1', '--config.keep_checkpoints=1000')
        run = self.run(workdir, *overrides, *every, program=program)
        if run.status:
            raise SystemExit(f'the uninterrupted run failed: {run.errors}')
        return workdir

    @functools.cached_property
    def finished(self) -> Path:
        """The workdir of a finished run with the checkpoints that are kept by default. Copy it before use."""
        workdir = self.workdir()
        if problems := self.run(workdir).ended(0) + complete(workdir, self.uninterrupted()):
            raise SystemExit(f'a run without faults failed: {problems}')
        return workdir


def _collect(stream: TextIO, lines: list[str]) -> None:
    for line in stream:
        lines.append(line.rstrip())


def intact(workdir: Path, unbroken: Path) -> list[str]:
    """Restores the finished checkpoints, and compares them with the uninterrupted run. Returns the problems found."""
    checkpoints = workdir / 'checkpoints'
    steps = saved_steps(checkpoints) if checkpoints.exists() else []
    like = _like(workdir) if steps else None
    problems = []
    for step in steps:
        try:
            restore(checkpoints, step, like)
            if _arrays(workdir, step) != _arrays(unbroken, step):
                problems.append(f'checkpoint {step} differs from the one of the uninterrupted run')
        except (DamagedCheckpoint, UserError) as error:
            if step in _kept(checkpoints, steps):  # a kill may interrupt the deletion of other checkpoints
                problems.append(f'checkpoint {step}: {error}')
    return problems


def complete(workdir: Path, unbroken: Path, *, records: bool = True) -> list[str]:
    """Checks the files of an ended run: checkpoints, leftover files and, if `records`, records. Returns problems."""
    problems = intact(workdir, unbroken)
    steps = saved_steps(workdir / 'checkpoints')
    if LAST not in steps:
        problems.append(f'there is no checkpoint of step {LAST}, only of {steps}')
    if superfluous := set(steps) - _kept(workdir / 'checkpoints', steps):
        problems.append(f'checkpoints {superfluous} were not deleted')
    left = {path.name for path in workdir.iterdir()} - CONTENTS
    left |= {path.name for path in (workdir / 'checkpoints').iterdir() if not path.name.isdecimal()}
    if left:
        problems.append(f'leftover files: {", ".join(sorted(left))}')
    if records and _results(workdir) != _results(unbroken):
        problems.append('the records differ from those of the uninterrupted run')
    return problems


def ends(case: Case, run: Running, workdir: Path, unbroken: Path, *statuses: int) -> None:
    """Waits for the end of a run with a fault. Checks that it is complete, or else that its checkpoints are intact.

    Args:
        case: the case to which the results are added.
        run: the process of the run.
        workdir: the workdir of the run.
        unbroken: the workdir of the uninterrupted run.
        statuses: allowed exit statuses.
    """
    run.end()
    case.must(run.ended(*statuses))
    reports = [line for line in run.lines if 'could not be saved' in line or 'cannot be written' in line]
    case.happened += [f'reported {len(reports)} ×: {reports[0][:110]}'] if reports else []
    case.happened.append(run.error if run.status else 'finished, bit-identical')
    case.must(intact(workdir, unbroken) if run.status else complete(workdir, unbroken))


def resumes(lab: Lab, case: Case, workdir: Path, unbroken: Path, *overrides: str) -> None:
    """Runs the same command after the fault was removed, and checks that the run is complete."""
    run = lab.run(workdir, *overrides)
    problems = run.ended(0) + complete(workdir, unbroken)
    case.happened += [] if problems else ['resumed without the fault: bit-identical']
    case.must(problems)


def unfinished(workdir: Path) -> list[Path]:
    """The folders of the saves in progress."""
    return list((workdir / 'checkpoints').glob(f'*{UNFINISHED}*'))


def _kept(checkpoints: Path, steps: list[int]) -> set[int]:
    """The steps of the checkpoints that a run keeps: the two newest, and the best."""
    scores = {}
    for step in steps:
        with contextlib.suppress(OSError, ValueError):  # damaged
            manifest = json.loads((checkpoints / str(step) / 'manifest' / 'metadata').read_text())
            if manifest['metrics']:
                scores[step] = (manifest['metrics']['ema_top1'], step)
    return {*steps[-2:], *([max(scores, key=scores.get)] if scores else [])}


def _arrays(workdir: Path, step: int) -> dict:
    return json.loads((workdir / 'checkpoints' / str(step) / 'manifest' / 'metadata').read_text())['arrays']


@functools.cache
def _like_of(config: str) -> object:
    path = Path(config)
    values = read_config(path)
    mesh = make_mesh(1)
    return Program(values, make_durations(values, len(make_task(values).open()[0])), mesh).abstract_state


def _like(workdir: Path) -> object:
    return _like_of(str(workdir / 'config.json'))


def _results(workdir: Path) -> list[tuple]:
    """The values in all records, except values that depend on time. Duplicate records stay in the list."""
    names = ('split', 'step', 'loss', 'learning_rate', 'grad_norm', 'skipped', 'top1', 'ema_top1', 'ema_loss')
    return sorted(tuple(str(record.get(name)) for name in names) for record in read_records(workdir))


jax.config.update('jax_platforms', 'cpu')
