"""A process of the benchmark: sets up one contender and runs its steps when it is asked to.

    python convnext_jax/benchmark/contenders/run.py MODULE

It is driven over standard input and output, one JSON value a line: the task first, then numbers of steps. It is started
as a file, and its neighbours here are imported by their bare names, because a module of the package would bring all of
the package, JAX included, into the process and the memory of every peer.
"""

import importlib
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from contender import Task

WARM_STEPS = 2
MATMULS = 3
ROOT = Path(__file__).parents[3]


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), 'w')
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    sys.path.append(str(ROOT))  # for ours, where it is not installed
    questions = queue.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(questions,), daemon=True)
    listener.start()
    try:
        for answer in _answers(sys.argv[1], questions):
            print(json.dumps(answer), file=answers, flush=True)
    except Exception as error:
        traceback.print_exc()
        message = (str(error).strip() or 'no message').splitlines()[0]
        print(json.dumps({'error': f'{type(error).__name__}: {message}'}), file=answers, flush=True)
        listener.join()


def _listen(questions: queue.SimpleQueue) -> None:
    for line in sys.stdin:
        questions.put(json.loads(line))
    os._exit(0)  # the command has ended, in whatever way, and perhaps in the middle of a step


def _answers(module: str, questions: queue.SimpleQueue) -> Iterator[dict]:
    """Seconds, bytes and facts: of the set-up, then of each turn."""
    contender = importlib.import_module(module).build(Task(**questions.get()))
    first, *warm = (_seconds(contender.step) for _ in range(1 + WARM_STEPS))
    yield {
        'first_step': first,
        'warm_step': min(warm),
        'peak_memory': _peak_memory() if contender.device == 'cpu' else None,
        'parameters': contender.parameters,
        'device': contender.device,
    }
    while True:
        steps = questions.get()
        contender.step()  # uncounted: it brings back what the others' turns drove out of caches and memory
        yield {
            'seconds': sum(_seconds(contender.step) for _ in range(steps)),
            'matmul': min(_seconds(contender.matmul) for _ in range(MATMULS)),
        }


def _seconds(function: Callable[[], None]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _peak_memory() -> int | None:
    """Of this process's resident memory, in bytes; None where the system does not tell."""
    status = Path('/proc/self/status')
    return 1024 * int(status.read_text().split('VmHWM:')[1].split()[0]) if status.exists() else None


if __name__ == '__main__':
    main()
