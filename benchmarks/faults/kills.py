"""SIGKILL to the program and to its decoding processes, at random times."""

import contextlib
import itertools
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.runs import WORKERS, Case, Lab, Running, complete, intact, unfinished
from convnext_jax.checkpoints.checkpoint import saved_steps
from convnext_jax.monitoring.records import read_records

KILLS_OF_A_RUN = 5
MOMENTS = ('step', 'save', 'restore', 'step', 'save', 'start', 'step of a run with workers', 'worker')


def cases(lab: Lab, rng: random.Random, kills: int) -> Iterator[Case]:
    """`kills` cases. A run is killed up to `KILLS_OF_A_RUN` times, resumed after each kill, and finally completed."""
    moments = itertools.cycle(MOMENTS)
    left = kills
    while left > 0:
        chosen = [next(moments) for _ in range(min(KILLS_OF_A_RUN, left))]
        for workers in (False, True):
            group = [moment for moment in chosen if ('worker' in moment) == workers]
            while group:
                group = yield from _kill_one_run(lab, rng, group, WORKERS if workers else ())
        left -= len(chosen)


def _kill_one_run(lab: Lab, rng: random.Random, moments: list[str], overrides: tuple[str, ...]) -> Iterator[Case]:
    """Kills a run at these moments. Returns the moments that were not reached before the run ended."""
    workdir, unbroken = lab.workdir(), lab.uninterrupted(*overrides)
    cases = []
    while moments:
        case = Case(moments[0])
        run = lab.start(workdir, *overrides)
        killed = _wait_and_kill(run, workdir, rng, case)
        run.end()
        if not killed:
            break
        moments = moments[1:]
        if case.moment.startswith('worker'):
            case.must(run.ended(2, 0) + (['does not report it'] if run.status and 'process' not in run.error else []))
            case.happened.append(run.error)
        case.must(intact(workdir, unbroken) + _left_running(run))
        cases.append(case)
    last = lab.run(workdir, *overrides)
    problems = last.ended(0) + complete(workdir, unbroken)
    for case in cases:
        case.happened.append('resumed, bit-identical at the end' if not problems else 'resumed')
        case.must(problems)
    yield from cases
    return moments


def _wait_and_kill(run: Running, workdir: Path, rng: random.Random, case: Case) -> bool:
    """Waits for the moment of the case and kills a process. Returns whether the process was still running."""
    records, began = len(read_records(workdir)), time.time_ns()
    config, moment, victim = workdir / 'config.json', case.moment, run.pid
    if moment == 'start':
        delay = rng.uniform(0, 6)
    elif moment == 'restore':  # the config is written just before the restore
        run.until(lambda: config.exists() and config.stat().st_mtime_ns > began)
        delay = rng.uniform(0, 2)
    elif moment == 'save':
        before = set()
        for _ in range(rng.randint(1, 2)):
            run.until(lambda: set(unfinished(workdir)) - before)  # noqa: B023 - called immediately
            before |= set(unfinished(workdir))
        delay = rng.uniform(0, 0.3)
    else:
        run.until(lambda: len(read_records(workdir)) > records)
        delay = rng.uniform(0, 1)
    time.sleep(delay)
    if moment == 'worker':
        workers = [pid for pid in _children(run.pid) if 'spawn_main' in _command(pid)]
        if not workers:
            return False
        victim = rng.choice(workers)
    saving, step = bool(unfinished(workdir)), max((record['step'] for record in read_records(workdir)), default=0)
    saved = saved_steps(workdir / 'checkpoints')
    alive = run.alive
    run.workers = _children(run.pid)
    if alive:
        os.kill(victim, signal.SIGKILL)
    case.moment += f' +{delay:.2f} s, step {step} recorded, {saved} saved' + (', a save in progress' if saving else '')
    return alive


def _left_running(run: Running) -> list[str]:
    """A message for each decoding process that is still running a minute after the program has ended."""
    until = time.monotonic() + 60
    while (alive := [pid for pid in run.workers if _command(pid)]) and time.monotonic() < until:
        time.sleep(0.1)
    return [f'process {pid} outlives the run' for pid in alive]


def _children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):  # the thread or the process has ended
        for children in Path(f'/proc/{pid}/task').glob('*/children'):
            found += map(int, children.read_text().split())
    return found


def _command(pid: int) -> str:
    try:
        return Path(f'/proc/{pid}/cmdline').read_text()
    except OSError:
        return ''
