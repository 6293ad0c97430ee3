"""StepTimer: measures step times, waits for data, FLOP utilisation and memory of a run, and finds straggling hosts."""

import collections
import contextlib
import os
import platform
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from convnext_jax.data.pipeline import Batch
from convnext_jax.monitoring.stalls import StallMonitor
from convnext_jax.runtime.chips import find_chip
from convnext_jax.runtime.stop import Stop
from convnext_jax.tasks import make_task

STEPS_IN_FLIGHT = 2
"""Steps that are dispatched at the same time. With two, the device never waits for the host's dispatch. A limit is
needed, because the host would otherwise dispatch steps without end and hold their batches in memory."""

STRAGGLER_THRESHOLD = 0.1
"""A host is a straggler if its time for data, or for other work on the host, exceeds the median host's time by this
fraction of a step."""

PROCESS_MEMORY = Path('/proc/self/statm')


class StepTimer:
    """Times the steps of the training loop, and limits how many of them are in flight.

    The time of a step is measured on the host, from the completion of the previous step to the completion of the step.
    It includes work of the host between two steps, and excludes the time in `paused`.

    Args:
        config: the config of the experiment.
        step: number of steps that are finished.
        stop: holds the signal once it is received.
    """

    def __init__(self, config: ConfigDict, step: int, stop: Stop):
        self._config, self._step, self._stop = config, step, stop
        self._stall_monitor = self.stall_monitor(config.data.train_split)
        self._in_flight: collections.deque[dict[str, jax.Array]] = collections.deque()
        self._idle_since: float | None = None
        self._stragglers_now: list[str] = []
        self._last = 0.0  # when the previous step completed
        self._restart()

    def stall_monitor(self, split: str) -> StallMonitor:
        """A new stall monitor for batches of a split."""
        seconds = self._config.data.patience_seconds
        return StallMonitor(seconds, self._stop, lambda: f'{split} after step {self._step}')

    def _restart(self) -> None:
        self._seconds: list[float] = []  # the time of each step
        self._starved = 0.0  # seconds in which the device was idle because no batch was ready
        self._fetching = 0.0  # seconds in which the loop waited for a batch, whether the device was idle or not
        self._blocked = 0.0  # seconds in which the loop waited for the device

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the batches, and measures the wait for each. The clock starts at the first call."""
        batches = iter(batches)
        self._last, self._idle_since = time.perf_counter(), None
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            now = time.perf_counter()
            self._fetching += now - began
            if self._idle_since is not None:
                self._starved += now - max(self._idle_since, began)
                self._idle_since = None
            if batch is None:
                return
            yield batch

    def waiting(self, seconds: float, example: Callable[[], str]) -> None:
        """Notes that the next batch is not ready: a wait callback (`loading.WaitCallback`).

        Args:
            seconds, example: as for `StallMonitor`.

        Raises:
            DataStalled: as for `StallMonitor`.
        """
        if self._idle_since is None and all(x.is_ready() for x in jax.tree.leaves(list(self._in_flight))):
            self._idle_since = time.perf_counter()
        self._stall_monitor(seconds, example)

    def dispatched(self, metrics: dict[str, jax.Array]) -> None:
        """Notes that a step was dispatched, and waits until fewer than `STEPS_IN_FLIGHT` are in flight.

        Args:
            metrics: the metrics of the step, on the device.
        """
        self._step += 1
        self._in_flight.append(metrics)
        if len(self._in_flight) == STEPS_IN_FLIGHT:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        began = time.perf_counter()
        jax.block_until_ready(self._in_flight.popleft())
        now = time.perf_counter()
        self._blocked += now - began
        self._seconds.append(now - self._last)
        self._last = now

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """Waits for the steps in flight, and excludes the time of the body from the measurements."""
        while self._in_flight:
            self._wait_for_oldest()
        began = time.perf_counter()
        yield
        self._last += time.perf_counter() - began

    def summary(self) -> tuple[dict[str, float], list[str]]:
        """Summarises the steps since the last call. All processes must call it after the same step.

        Returns:
            The metrics by name, and a message for each host that has become a straggler.
            - `images_per_second`, `images_per_second_per_chip`.
            - `step_ms_median`, `step_ms_p99`: median and 99th percentile of the step time in ms.
            - `data_wait_share`: fraction of the time in which the devices of this process had no batch.
            - `mfu`: model FLOP utilisation, if the peak of the chip is known.
            - `host_memory_gib`: memory of this process, on Linux.
            - `device_memory_gib`, `device_memory_peak_gib`: maximum over the local devices, if the backend reports it.
        """
        while self._in_flight:
            self._wait_for_oldest()
        steps, seconds = len(self._seconds), sum(self._seconds)
        speed = steps * self._config.batch_size / seconds
        median, p99 = np.percentile(self._seconds, (50, 99))
        metrics = {
            'images_per_second': speed,
            'images_per_second_per_chip': speed / jax.device_count(),
            'step_ms_median': 1000 * float(median),
            'step_ms_p99': 1000 * float(p99),
            'data_wait_share': self._starved / seconds,
        }
        metrics |= utilisation(self._config, metrics['images_per_second_per_chip'], jax.devices()[0].device_kind)
        metrics |= memory()
        began = time.perf_counter()
        lines = self._stragglers(seconds / steps) if jax.process_count() > 1 else []
        self._restart()
        self._blocked = time.perf_counter() - began  # the all-gather waits for the slowest process
        return metrics, lines

    def _stragglers(self, step_seconds: float) -> list[str]:
        steps = len(self._seconds)
        work = max(sum(self._seconds) - self._fetching - self._blocked, 0)
        name = np.frombuffer(platform.node().encode()[:64].ljust(64, b'\0'), np.uint8)
        own = {'data': np.float32(self._starved / steps), 'work': np.float32(work / steps), 'name': name}
        hosts = multihost_utils.process_allgather(own)
        names = [bytes(name).rstrip(b'\0').decode(errors='replace') for name in hosts['name']]
        found = stragglers(names, hosts['data'], hosts['work'], step_seconds)
        new = [line for host, line in found.items() if host not in self._stragglers_now]
        self._stragglers_now = list(found)
        return new


def stragglers(names: list[str], data: np.ndarray, work: np.ndarray, step_seconds: float) -> dict[str, str]:
    """Finds the hosts that slow down the job: in every step, all hosts wait for the slowest host.

    A slow chip is not found, because its steps end on all hosts at the same time.

    Args:
        names: host name of each process.
        data: (processes,) seconds per step in which the devices of a process waited for data.
        work: (processes,) seconds per step of other work on the host.
        step_seconds: mean time of a step.

    Returns:
        Host → a message that says whether the host waits for data or is slow in other work.
    """
    found = {}
    for what, seconds in (('waiting for data', data), ('on other work of the host', work)):
        median = float(np.median(seconds))
        for process in np.flatnonzero(seconds - median > STRAGGLER_THRESHOLD * step_seconds):
            host = f'process {process} ({names[process]})'
            figures = f'{1000 * seconds[process]:.0f} ms of a {1000 * step_seconds:.0f} ms step'
            typical = f'the median host {1000 * median:.0f} ms'
            found[host] = f'{host} delays the others: it spends {figures} {what}, {typical}'
    return found


def utilisation(config: ConfigDict, images_per_second: float, device_kind: str) -> dict[str, float]:
    """Model FLOP utilisation: the FLOP/s that the model needs, divided by the peak FLOP/s of the chip.

    A training step needs 3 × 2 FLOPs for each multiply-add of the forward pass (arXiv:2204.02311, appendix B), because
    the backward pass has twice the FLOPs of the forward pass. Recomputation and augmentation do not count.

    Args:
        config: the config of the experiment.
        images_per_second: training speed of one chip.
        device_kind: `jax.Device.device_kind`.

    Returns:
        {'mfu': fraction of the peak}; {} if the peak of the chip is unknown.
    """
    chip = find_chip(device_kind)
    if chip is None:
        return {}
    multiply_adds = make_task(config).multiply_adds
    return {'mfu': 3 * 2 * multiply_adds * images_per_second / chip.peak(config.model.dtype)}


def memory() -> dict[str, float]:
    """Memory in use, in GiB: of this process (on Linux), and the maximum over its devices (if the backend reports it).

    Returns:
        Name → value: `host_memory_gib`, `device_memory_gib` and `device_memory_peak_gib`; unknown values are omitted.
    """
    metrics = {}
    if PROCESS_MEMORY.exists():
        pages = int(PROCESS_MEMORY.read_text().split()[1])
        metrics['host_memory_gib'] = pages * os.sysconf('SC_PAGE_SIZE') / 2**30
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    for name, field in {'device_memory_gib': 'bytes_in_use', 'device_memory_peak_gib': 'peak_bytes_in_use'}.items():
        values = [device[field] for device in stats if field in device]
        if values:
            metrics[name] = max(values) / 2**30
    return metrics
