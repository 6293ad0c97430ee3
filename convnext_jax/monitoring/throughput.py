"""What is measured while a run trains: the time of its steps, the wait for data, FLOPs, memory, straggling hosts."""

import collections
import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
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

STEPS_AHEAD = 2
"""So many steps are under way at once: the device never waits for the host, and the host does not run away."""

STRAGGLES = 0.1
"""A host is named if it takes this share of a step more than the median host to wait for data, or for its own work."""


MEMORY = Path('/proc/self/statm')


class StepTimer:
    """Keeps the host `STEPS_AHEAD` ahead of the device, and measures. Pauses do not count.

    A step's time is from the completion of the one before to its own, as the host sees them; the time in which the host
    does something else between two steps is in it.

    Args:
        config: of the experiment.
        step: steps done before.
        stop: the signal, if one came.
    """

    def __init__(self, config: ConfigDict, step: int, stop: Stop):
        self._config, self._step, self._stop = config, step, stop
        self._patience = self.patience(config.data.train_split)
        self._under_way: collections.deque[dict[str, jax.Array]] = collections.deque()
        self._idle_since: float | None = None
        self._straggling: list[str] = []
        self._last = 0.0  # when the step before was done
        self._restart()

    def patience(self, split: str) -> StallMonitor:
        """For the batches of a split."""
        seconds = self._config.data.patience_seconds
        return StallMonitor(seconds, self._stop, lambda: f'{split} after step {self._step}')

    def _restart(self) -> None:
        self._seconds: list[float] = []  # of each step
        self._starved = 0.0  # seconds in which the device had nothing to do, for there was no batch
        self._fetching = 0.0  # seconds in which the loop wanted a batch, whatever the device did
        self._blocked = 0.0  # seconds in which the loop waited for the device

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, with the wait for them measured; the clock starts here."""
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
        """Hears of a batch that is not there yet, as `loading.Waiting`.

        Raises:
            DataStalled: a signal came.
        """
        if self._idle_since is None and all(x.is_ready() for x in jax.tree.leaves(list(self._under_way))):
            self._idle_since = time.perf_counter()
        self._patience(seconds, example)

    def dispatched(self, metrics: dict[str, jax.Array]) -> None:
        """Counts a step that the device was given, and waits for the one before it."""
        self._step += 1
        self._under_way.append(metrics)
        if len(self._under_way) == STEPS_AHEAD:
            self._complete()

    def _complete(self) -> None:
        began = time.perf_counter()
        jax.block_until_ready(self._under_way.popleft())
        now = time.perf_counter()
        self._blocked += now - began
        self._seconds.append(now - self._last)
        self._last = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for the steps under way; what follows is not counted."""
        while self._under_way:
            self._complete()
        began = time.perf_counter()
        yield
        self._last += time.perf_counter() - began

    def lap(self) -> tuple[dict[str, float], list[str]]:
        """The metrics of the steps since the last lap, and a line for each host that has begun to straggle.

        Of many processes all must call it after the same step.

        Returns:
            `images_per_second`, and the same `_per_chip`; `step_ms_median` and `step_ms_p99`; `data_wait_share`, of the
            time, in which the device had nothing to do because there was no batch; `mfu`, model FLOP utilisation, where
            the chip's peak is known; `host_memory_gib`, and `device_memory_gib` and `device_memory_peak_gib` of the
            fullest device, where the system and the backend tell. Wait and memory are of this process.
        """
        while self._under_way:
            self._complete()
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
        self._blocked = time.perf_counter() - began  # to hear of all is to wait for the slowest
        return metrics, lines

    def _stragglers(self, step_seconds: float) -> list[str]:
        steps = len(self._seconds)
        work = max(sum(self._seconds) - self._fetching - self._blocked, 0)
        name = np.frombuffer(platform.node().encode()[:64].ljust(64, b'\0'), np.uint8)
        own = {'data': np.float32(self._starved / steps), 'work': np.float32(work / steps), 'name': name}
        hosts = multihost_utils.process_allgather(own)
        names = [bytes(name).rstrip(b'\0').decode(errors='replace') for name in hosts['name']]
        found = stragglers(names, hosts['data'], hosts['work'], step_seconds)
        news = [line for host, line in found.items() if host not in self._straggling]
        self._straggling = list(found)
        return news


def stragglers(names: list[str], data: np.ndarray, work: np.ndarray, step_seconds: float) -> dict[str, str]:
    """The hosts that hold the others up: in a step of all devices each waits for the slowest.

    A chip that is slow by itself is not found: its step ends on all hosts at the same time.

    Args:
        names: of the hosts, by process.
        data, work: (processes,) seconds of a step in which each let its devices wait for data, and worked on the host.
        step_seconds: mean time of a step.

    Returns:
        Host → a line that says what it is slow at.
    """
    found = {}
    for what, seconds in (('waiting for data', data), ('its own work', work)):
        median = float(np.median(seconds))
        for process in np.flatnonzero(seconds - median > STRAGGLES * step_seconds):
            host = f'process {process} ({names[process]})'
            figures = f'{1000 * seconds[process]:.0f} ms of a step of {1000 * step_seconds:.0f} ms'
            found[host] = f'{host} straggles: {figures} in {what}, the median host {1000 * median:.0f} ms'
    return found


def utilisation(config: ConfigDict, images_per_second: float, device_kind: str) -> dict[str, float]:
    """Model FLOP utilisation, `mfu`: the FLOPs that the model needs, to the chip's peak; {} if that is unknown.

    A training step needs 3 × 2 × the forward pass's multiply-adds of each image (arXiv:2204.02311, appendix B): the
    backward pass has twice the forward's. What remat computes a second time does not count, nor does augmentation.

    Args:
        config: of the experiment.
        images_per_second: of the chip.
        device_kind: as JAX calls it.
    """
    chip = find_chip(device_kind)
    if chip is None:
        return {}
    multiply_adds = make_task(config).multiply_adds
    return {'mfu': 3 * 2 * multiply_adds * images_per_second / chip.peak(config.model.dtype)}


def memory() -> dict[str, float]:
    """GiB in use by this process (Linux) and on its fullest device (where the backend counts)."""
    metrics = {}
    if MEMORY.exists():
        pages = int(MEMORY.read_text().split()[1])
        metrics['host_memory_gib'] = pages * os.sysconf('SC_PAGE_SIZE') / 2**30
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    for name, field in {'device_memory_gib': 'bytes_in_use', 'device_memory_peak_gib': 'peak_bytes_in_use'}.items():
        values = [device[field] for device in stats if field in device]
        if values:
            metrics[name] = max(values) / 2**30
    return metrics
