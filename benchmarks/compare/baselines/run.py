"""The process of an implementation: sets it up, and times its steps on request.

    python -m benchmarks.compare.baselines.run MODULE

Requests come on standard input, and answers go to standard output, one JSON value per line. The first request is the
workload, and the others are numbers of steps. The process imports only MODULE and `workload`, because JAX or torch in
the process of another library would add to its memory and threads.
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
PROBES = 3  # number of measurements of the device; the fastest one is reported
# An accelerator needs larger arrays, and several calls in a row, which hide the dispatch time of each.
MATMUL_SIDE, COPY_BYTES, CALLS = 2048, 2**28, 1
ACCELERATOR_MATMUL_SIDE, ACCELERATOR_COPY_BYTES, ACCELERATOR_CALLS = 8192, 2**30, 10


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), 'w')
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keeps the output of libraries apart from the answers
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
    os._exit(0)  # the command has ended or was killed; the main thread may be in the middle of a step


def _answers(module: str, questions: queue.SimpleQueue) -> Iterator[dict]:
    """Yields the measurements as JSON objects: first for the set-up, then for each round."""
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
        device.seconds(step)  # untimed: refills caches that the other processes have used meanwhile
        yield {'seconds': time_steps(baseline, steps, workload.latency)} | probe(device, workload.dtype)


def time_steps(baseline: Baseline, steps: int, latency: bool) -> float:
    """Runs `steps` steps and returns their time in seconds.

    On an accelerator, dispatch is asynchronous: the host waits only after the last step, unless latency is measured. On
    CPU, it waits after each step.
    """
    if latency or baseline.device.name == 'cpu':
        return sum(baseline.device.seconds(baseline.step) for _ in range(steps))
    return baseline.device.seconds(lambda: _repeat(baseline.step, steps))


def probe(device: Device, dtype: str) -> dict:
    """Measures the device: FLOP/s of a matrix product, and bytes/s, read plus written, of a large copy."""
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
    """Peak resident memory of this process in bytes; None if the system does not report it."""
    status = Path('/proc/self/status')
    return 1024 * int(status.read_text().split('VmHWM:')[1].split()[0]) if status.exists() else None


if __name__ == '__main__':
    main()
