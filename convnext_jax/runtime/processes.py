"""Several processes, one on each host: how they start, what they agree on, and that none outlives another's error.

All of it goes through JAX's own runtime: its coordination service (on process 0), key-value store, barriers and
preemption notice, and collectives over the devices.
"""

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from convnext_jax.errors import UserError, first_line
from convnext_jax.output import say_in_handler
from convnext_jax.runtime.stop import Stop
from convnext_jax.runtime.watchdog import leave


def start(coordinator: str | None, process_count: int | None, process_id: int | None, timeout: int) -> bool:
    """Joins the processes of the job, before anything else of JAX: as told, or as JAX finds them.

    JAX itself knows Cloud TPU pods, GKE, Slurm and Open MPI. All processes but the first lose their standard output.

    Args:
        coordinator: 'HOST:PORT' of process 0, which listens there; None: as JAX finds it.
        process_count, process_id: how many processes, and which of them this is; go with `coordinator`.
        timeout: seconds to wait for the coordinator and all processes; then this process ends.

    Returns:
        Whether there are several processes.

    Raises:
        UserError: the flags do not fit one another.
    """
    given = [value is not None for value in (coordinator, process_count, process_id)]
    if process_count == 1 and not coordinator:
        return False
    if any(given) and not all(given):
        raise UserError('--coordinator, --process_count and --process_id go together: give all three, or none')
    if coordinator is not None and process_count is not None and process_id is not None:
        _check(coordinator, process_count, process_id)
    clock = threading.Timer(timeout, _give_up, (coordinator, process_count, process_id, timeout))
    clock.daemon = True
    clock.start()
    try:
        jax.distributed.initialize(
            coordinator,
            process_count,
            process_id,
            initialization_timeout=timeout + 60,  # later than the clock: the runtime would abort the process
            heartbeat_timeout_seconds=2 * timeout,  # the same
            shutdown_timeout_seconds=timeout,
        )
        several = jax.process_count() > 1  # begins with the devices, and asks the other processes for theirs
    except ValueError:
        if any(given):
            raise
        return False  # JAX found nothing: a machine by itself
    except RuntimeError as error:
        if not any(given) and 'must be called before' in str(error):
            return False  # JAX runs already, in a program that calls the command as a function: by itself
        raise UserError(
            f'the processes of this job cannot join: {first_line(error)}. --process_count=1 runs this one alone'
        ) from error
    finally:
        clock.cancel()
    if several and not is_main_process():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return several


def _check(coordinator: str, process_count: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(':')
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator takes HOST:PORT, as 10.0.0.1:8476, not '{coordinator}'")
    if not 0 <= process_id < process_count:
        raise UserError(f'--process_id={process_id}: they go from 0 to process_count − 1 = {process_count - 1}')


def _give_up(coordinator: str | None, process_count: int | None, process_id: int | None, timeout: int) -> NoReturn:
    """Ends the process while it waits in the runtime, which would abort with a stack trace."""
    problem = f'of {process_count or "the"} processes not all have come'
    if coordinator and process_id:
        host, _, port = coordinator.rpartition(':')
        try:
            socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
        except OSError as error:
            problem = f'there is no coordinator at {coordinator} ({error.strerror or error})'
    # Not status 2: they may only be late, and launchers try again.
    leave(f'error: {problem} within {timeout} s: do all hosts run the same command, and reach process 0?', 1)


def is_main_process() -> bool:
    """Whether this process writes logs and files: process 0, or the only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def is_multiprocess() -> bool:
    """Whether there are other processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def all_gather_objects(value: object) -> list:
    """What each process has given, in their order. All must call it in the same place.

    Args:
        value: what JSON can hold.
    """
    if not is_multiprocess():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    rows = multihost_utils.process_allgather(np.pad(text, (0, lengths.max() - len(text))))
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def local_batch_indices(sharding: Sharding, batch_size: int) -> Sequence[int]:
    """The rows of a global batch that live on this process's devices, in order."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    # JAX's type allows None for a device, of shardings that are not for arrays.
    return sorted({row for (rows,) in slices for row in range(*rows.indices(batch_size))})  # type: ignore[misc]


def make_global_array(value: jax.Array | np.ndarray, sharding: Sharding) -> jax.Array:
    """An array that every process has whole, as one global array."""
    if not is_multiprocess():
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, np.asarray(value).__getitem__)


class AgreedStop(Stop):
    """SIGTERM or Ctrl-C on any process, seen by all of them at the same call of `poll`."""

    _polls = 0

    def poll(self) -> bool:
        self._polls += 1
        if not self.received and multihost_utils.reached_preemption_sync_point(self._polls):
            self.received = signal.SIGTERM
        return self.received is not None


@contextlib.contextmanager
def agreed_stop() -> Iterator[Stop]:
    """As `stop_signal`, for several processes: JAX's own handler of SIGTERM tells all of them."""
    before = signal.getsignal(signal.SIGINT)

    def note(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        say_in_handler('all processes stop and save at one of the next steps; once more to stop without saving')
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGINT, note)
    try:
        yield AgreedStop()
    finally:
        signal.signal(signal.SIGINT, before)
