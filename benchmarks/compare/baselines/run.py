"""A process of the comparison: sets up one implementation and times its steps on request.

    python -m benchmarks.compare.baselines.run MODULE

It reads standard input and writes standard output, one JSON value a line: it receives the workload, then numbers of
steps. It imports nothing but MODULE and `workload`: JAX or torch in the process of another library would add to its
memory and threads.
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

from benchmarks.compare.baselines.workload import Workload

WARM_STEPS = 2
MATMULS = 3


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), 'w')
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not mix with the answers
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
    os._exit(0)  # the command has ended, possibly killed, and the main thread may be in the middle of a step


def _answers(module: str, questions: queue.SimpleQueue) -> Iterator[dict]:
    """Measurements as JSON objects: first of the set-up, then of each round."""
    baseline = importlib.import_module(module).build(Workload(**questions.get()))
    first, *warm = (_seconds(baseline.step) for _ in range(1 + WARM_STEPS))
    yield {
        'first_step': first,
        'warm_step': min(warm),
        'peak_memory': _peak_memory() if baseline.device == 'cpu' else None,
        'parameters': baseline.parameters,
        'device': baseline.device,
    }
    while True:
        steps = questions.get()
        baseline.step()  # untimed: it refills the caches and memory that the other processes have used meanwhile
        yield {
            'seconds': sum(_seconds(baseline.step) for _ in range(steps)),
            'matmul': min(_seconds(baseline.matmul) for _ in range(MATMULS)),
        }


def _seconds(function: Callable[[], None]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _peak_memory() -> int | None:
    """Peak of this process's resident memory in bytes; None where the system does not report it."""
    status = Path('/proc/self/status')
    return 1024 * int(status.read_text().split('VmHWM:')[1].split()[0]) if status.exists() else None


if __name__ == '__main__':
    main()
