"""Small runs of train.py in processes of their own, and what must hold of what they leave behind."""

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
# Seconds of training: ten batches an epoch, and 40 images to evaluate.
SMALL = (
    '--config=configs/fashion_mnist.py',
    '--config.data.train_split=train[:160]',
    '--config.data.eval_split=test[:40]',
    '--config.batch_size=16',
    f'--config.steps={LAST}',
    '--config.optimizer.warmup_steps=4',
    '--config.log_every_steps=1',  # a record is of the same steps wherever the run was resumed
    '--config.eval_every_epochs=1',
    '--config.checkpoint_every_steps=4',
)
WORKERS = ('--config.data.workers=2', '--config.data.crop_scale=(0.5,1.0)')
LONGEST = 3600  # seconds that a run may take on a busy machine: more is a hang
CONTENTS = {'.lock', 'config.json', 'metrics.jsonl', 'curves.png', 'tensorboard', 'checkpoints', 'damaged'}


@dataclasses.dataclass
class Case:
    """One line of the table.

    Attributes:
        moment: what was done, and when.
        happened: what the runs did.
        problems: why it is no pass.
        skipped: the case could not be tried here.
    """

    moment: str
    happened: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    skipped: bool = False

    @property
    def verdict(self) -> str:
        return 'skip' if self.skipped else 'FAIL' if self.problems else 'pass'

    def must(self, problems: list[str]) -> None:
        """Notes what is wrong, if anything is."""
        self.problems += problems
        self.happened += [f'BUT {problem}' for problem in problems]


class Running:
    """A process of the program; its lines are read as they come."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        atexit.register(self.process.kill)  # an error of the benchmark leaves no run behind
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
        """Waits until it holds, or the process has ended; whether it held."""
        while not (held := condition()) and self.alive:
            threading.Event().wait(0.005)
        return held

    def says(self, text: str) -> Callable[[], bool]:
        """Whether a line has the text."""
        return lambda: any(text in line for line in self.lines)

    def end(self) -> 'Running':
        """Waits for the end; kills what hangs."""
        try:
            self.process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self.errors.append(f'hung for {LONGEST} s')
        for reader in self._readers:
            reader.join(60)
        return self

    @property
    def status(self) -> int:
        return self.process.returncode

    def ended(self, *statuses: int) -> list[str]:
        """What is wrong with the way it ended: another status, a traceback, more than one line of error."""
        problems = []
        if self.status not in statuses:
            problems.append(f'status {self.status}: {" | ".join(self.errors[-3:])}')
        if any('Traceback' in line for line in self.errors + self.lines):
            problems.append(f'a traceback: {" | ".join(self.errors)[-400:]}')
        if self.status == 2 and sum(line.startswith('error: ') for line in self.errors) != 1:
            problems.append('no one line of error')
        return problems

    @property
    def error(self) -> str:
        """The line of error, cut short."""
        return next((line[:150] for line in self.errors if line.startswith('error: ')), f'status {self.status}')


class Lab:
    """Starts runs that share a compilation cache, and compares them with those that were left alone."""

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
        self.unbroken = functools.cache(self.alone)  # made once for all cases

    def workdir(self) -> Path:
        """A new one, not yet made."""
        return self.folder / f'run{next(self._numbers)}'

    def copy(self, run: Path) -> Path:
        """Of a run. The files are links: whoever damages one must put another in its place."""
        return shutil.copytree(run, self.workdir(), copy_function=os.link)

    def start(self, workdir: Path, *overrides: str, program: tuple = ('train.py',), before: tuple = ()) -> Running:
        """Starts the program.

        Args:
            workdir: of the run.
            overrides: flags besides `SMALL`.
            program: of Python.
            before: a command that starts it.
        """
        command = [*before, sys.executable, *program, *SMALL, *overrides, f'--workdir={workdir}']
        return Running(command, self.environment)

    def run(self, workdir: Path, *overrides: str, **options: tuple) -> Running:
        """Starts the program, and waits for its end."""
        return self.start(workdir, *overrides, **options).end()

    def alone(self, *overrides: str, program: tuple = ('train.py',)) -> Path:
        """A run that nothing interrupts, with a checkpoint of each step."""
        workdir = self.workdir()
        every = ('--config.checkpoint_every_steps=1', '--config.keep_checkpoints=1000')
        run = self.run(workdir, *overrides, *every, program=program)
        if run.status:
            raise SystemExit(f'the run that nothing interrupts does not end well: {run.errors}')
        return workdir

    @functools.cached_property
    def finished(self) -> Path:
        """A finished run with the checkpoints that it keeps by default; to be copied."""
        workdir = self.workdir()
        if problems := self.run(workdir).ended(0) + whole(workdir, self.unbroken()):
            raise SystemExit(f'an ordinary run does not end well: {problems}')
        return workdir


def _collect(stream: TextIO, lines: list[str]) -> None:
    for line in stream:
        lines.append(line.rstrip())


def intact(workdir: Path, unbroken: Path) -> list[str]:
    """What is wrong with the finished checkpoints of a run: all are restored, and compared with the unbroken run's."""
    checkpoints = workdir / 'checkpoints'
    steps = saved_steps(checkpoints) if checkpoints.exists() else []
    like = _like(workdir) if steps else None
    problems = []
    for step in steps:
        try:
            restore(checkpoints, step, like)
            if _arrays(workdir, step) != _arrays(unbroken, step):
                problems.append(f'checkpoint {step} is not that of the unbroken run')
        except (DamagedCheckpoint, UserError) as error:
            if step in _kept(checkpoints, steps):  # others a kill may have found while they were being deleted
                problems.append(f'checkpoint {step}: {error}')
    return problems


def whole(workdir: Path, unbroken: Path, *, records: bool = True) -> list[str]:
    """What is wrong with a run that has ended: its checkpoints, its records where asked, or what lies about."""
    problems = intact(workdir, unbroken)
    steps = saved_steps(workdir / 'checkpoints')
    if LAST not in steps:
        problems.append(f'there is no checkpoint of step {LAST}, but of {steps}')
    if superfluous := set(steps) - _kept(workdir / 'checkpoints', steps):
        problems.append(f'checkpoints {superfluous} should be gone')
    left = {path.name for path in workdir.iterdir()} - CONTENTS
    left |= {path.name for path in (workdir / 'checkpoints').iterdir() if not path.name.isdecimal()}
    if left:
        problems.append(f'left behind: {", ".join(sorted(left))}')
    ours, theirs = _results(workdir), _results(unbroken)
    if records and ours != theirs:
        problems.append('other records than the unbroken run')
    return problems


def ends(case: Case, run: Running, workdir: Path, unbroken: Path, *statuses: int) -> None:
    """Notes how a run ended: well, or with its checkpoints intact."""
    run.end()
    case.must(run.ended(*statuses))
    told = [line for line in run.lines if 'could not be saved' in line or 'cannot be written' in line]
    case.happened += [f'told {len(told)} ×: {told[0][:110]}'] if told else []
    case.happened.append(run.error if run.status else 'finished, bit-identical')
    case.must(intact(workdir, unbroken) if run.status else whole(workdir, unbroken))


def mended(lab: Lab, case: Case, workdir: Path, unbroken: Path, *overrides: str) -> None:
    """Notes how the same command ends once the fault is mended."""
    run = lab.run(workdir, *overrides)
    problems = run.ended(0) + whole(workdir, unbroken)
    case.happened += [] if problems else ['mended and started again: bit-identical']
    case.must(problems)


def unfinished(workdir: Path) -> list[Path]:
    """Folders of saves under way."""
    return list((workdir / 'checkpoints').glob(f'*{UNFINISHED}*'))


def _kept(checkpoints: Path, steps: list[int]) -> set[int]:
    """The two newest, and the best."""
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
    """Of the records, what does not depend on the time they took. One that is there twice is twice in this list too."""
    names = ('split', 'step', 'loss', 'learning_rate', 'grad_norm', 'skipped', 'top1', 'ema_top1', 'ema_loss')
    return sorted(tuple(str(record.get(name)) for name in names) for record in read_records(workdir))


jax.config.update('jax_platforms', 'cpu')
