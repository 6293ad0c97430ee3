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
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.compare.baselines.workload import Baseline, Device, Workload

WARM_STEPS = 2
PROBES = 3  # the best of these counts
# An accelerator is measured by larger arrays, and by several calls in a row, which hide the time to dispatch each.
MATMUL_SIDE, COPY_BYTES, CALLS = 2048, 2**28, 1
ACCELERATOR_MATMUL_SIDE, ACCELERATOR_COPY_BYTES, ACCELERATOR_CALLS = 8192, 2**30, 10


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
    workload = Workload(**questions.get())
    baseline = importlib.import_module(module).build(workload)
    step, device = baseline.step, baseline.device
    first, *warm = (device.seconds(step) for _ in range(1 + WARM_STEPS))
    yield {
        'first_step': first,
        'warm_step': min(warm),
        'peak_memory': _peak_resident_memory() if device.name == 'cpu' else device.peak_memory(),
        'parameters': baseline.parameters,
        'device': device.name,
    }
    while True:
        steps = questions.get()
        device.seconds(step)  # untimed: it refills the caches and memory that the other processes have used meanwhile
        yield {'seconds': time_steps(baseline, steps, workload.latency)} | probe(device, workload.dtype)


def time_steps(baseline: Baseline, steps: int, latency: bool) -> float:
    """Runs `steps` steps and returns the seconds they took.

    An accelerator computes while the host dispatches the next step, so it is waited for after the last step alone,
    except where latency is measured. On CPU each step is waited for.
    """
    if latency or baseline.device.name == 'cpu':
        return sum(baseline.device.seconds(baseline.step) for _ in range(steps))
    return baseline.device.seconds(lambda: _repeat(baseline.step, steps))


def probe(device: Device, dtype: str) -> dict:
    """What the device reaches: FLOP/s in a matrix product, and bytes/s, read plus written, in a large copy."""
    side, size, calls = MATMUL_SIDE, COPY_BYTES, CALLS
    if device.name != 'cpu':
        side, size, calls = ACCELERATOR_MATMUL_SIDE, ACCELERATOR_COPY_BYTES, ACCELERATOR_CALLS

    def best(function: Callable[[], object]) -> float:
        return min(device.seconds(lambda: _repeat(function, calls)) for _ in range(PROBES)) / calls

    return {
        'matmul_side': side,
        'matmul_flops': 2 * side**3 / best(device.make_matmul(side, dtype)),
        'copy_bandwidth': 2 * size / best(device.make_copy(size)),
    }


def _repeat(function: Callable[[], object], times: int) -> object:
    for _ in range(times):
        result = function()
    return result


def _peak_resident_memory() -> int | None:
    """Peak of this process's resident memory in bytes; None where the system does not report it."""
    status = Path('/proc/self/status')
    return 1024 * int(status.read_text().split('VmHWM:')[1].split()[0]) if status.exists() else None


if __name__ == '__main__':
    main()
