"""Jobs of several processes: start, exchange of values, global arrays, and a stop that all processes agree on.

Everything uses JAX's distributed runtime: collectives over the devices, and the coordination service on process 0,
which provides a key-value store, barriers and preemption notices.
"""

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Generator, Sequence
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from convnext_jax.errors import UserError, first_line
from convnext_jax.output import say_in_handler
from convnext_jax.runtime.stop import Stop
from convnext_jax.runtime.watchdog import exit_now


def start(coordinator: str | None, process_count: int | None, process_id: int | None, timeout: int) -> bool:
    """Connects the processes of a job with `jax.distributed.initialize`. Call it before any other function of JAX.

    Without arguments, JAX detects Cloud TPU pods, GKE, Slurm and Open MPI 4. The standard output of all processes
    except process 0 is discarded.

    Args:
        coordinator: 'HOST:PORT' on which process 0 listens; None: detected by JAX.
        process_count: number of processes; None: detected by JAX.
        process_id: index of this process; None: detected by JAX.
        timeout: seconds to wait for the coordinator and all processes. Then this process exits with status 1.

    Returns:
        Whether there are several processes.

    Raises:
        UserError: the arguments contradict each other or are needed, or the processes cannot connect.
    """
    given = [value is not None for value in (coordinator, process_count, process_id)]
    if process_count == 1 and not coordinator:
        return False
    if any(given) and not all(given):
        raise UserError('give all three of --coordinator, --process_count and --process_id, or none of them')
    if coordinator is not None and process_count is not None and process_id is not None:
        _check(coordinator, process_count, process_id)
    elif int(os.environ.get('OMPI_COMM_WORLD_SIZE', 1)) > 1 and 'OMPI_MCA_orte_hnp_uri' not in os.environ:
        raise UserError(
            f'mpirun started {os.environ["OMPI_COMM_WORLD_SIZE"]} processes, but JAX detects only Open MPI 4: give '
            '--coordinator=HOST:PORT, --process_count=$OMPI_COMM_WORLD_SIZE and --process_id=$OMPI_COMM_WORLD_RANK'
        )
    timer = threading.Timer(timeout, _exit_after_timeout, (coordinator, process_count, process_id, timeout))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator,
            process_count,
            process_id,
            initialization_timeout=timeout + 60,  # after the timer, because the runtime aborts with a stack trace
            heartbeat_timeout_seconds=4 * timeout,  # JAX may abort after half of this: later than the watchdog exits
            shutdown_timeout_seconds=timeout,
        )
        multiprocess = jax.process_count() > 1  # initialises the backend, which waits for the other processes
    except ValueError:
        if any(given):
            raise
        return False  # JAX detected no cluster
    except RuntimeError as error:
        if not any(given) and 'must be called before' in str(error):
            return False  # JAX is already initialised, in a program that calls the command as a function
        raise UserError(
            f'the processes of this job cannot connect: {first_line(error)}; --process_count=1 runs this process alone'
        ) from error
    finally:
        timer.cancel()
    if multiprocess and not is_main_process():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return multiprocess


def _check(coordinator: str, process_count: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(':')
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator needs HOST:PORT, for example 10.0.0.1:8476, not '{coordinator}'")
    if not 0 <= process_id < process_count:
        raise UserError(f'--process_id={process_id} must be between 0 and process_count − 1 = {process_count - 1}')


def _exit_after_timeout(
    coordinator: str | None, process_count: int | None, process_id: int | None, timeout: int
) -> NoReturn:
    """Exits with a message while the main thread waits in the runtime, which would abort with a stack trace."""
    problem = f'not all of {process_count or "the"} processes have connected'
    if coordinator and process_id:
        host, _, port = coordinator.rpartition(':')
        try:
            socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
        except OSError as error:
            problem = f'there is no coordinator at {coordinator} ({error.strerror or error})'
    # Status 1, not 2: processes may only be late, and launchers restart the job after status 1.
    exit_now(
        f'error: {problem} within {timeout} s: check that all hosts run the same command and can reach process 0', 1
    )


def connect_devices() -> None:
    """Connects the devices of all processes by a first collective. On CPU, gloo connects them by the host names.

    Raises:
        UserError: gloo cannot connect.
    """
    try:
        all_gather_objects(None)
    except jax.errors.JaxRuntimeError as error:
        if 'Gloo' not in str(error):
            raise
        raise UserError(
            f'the CPU devices of this job cannot connect: {first_line(error)}: on each host, its name '
            f'(here {socket.gethostname()}) must resolve to an address that the other hosts can reach; see /etc/hosts'
        ) from error


def is_main_process() -> bool:
    """Whether this is the main process, which writes logs and files: process 0, or the only process."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def is_multiprocess() -> bool:
    """Whether the job has several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def all_gather_objects(value: object) -> list:
    """Gathers a value from each process, in the order of processes. All processes must call it.

    Args:
        value: a JSON value.
    """
    if not is_multiprocess():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    rows = multihost_utils.process_allgather(np.pad(text, (0, lengths.max() - len(text))))
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def local_batch_indices(sharding: Sharding, batch_size: int) -> Sequence[int]:
    """The indices of the examples of a global batch that are on devices of this process, in ascending order."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    # JAX's annotation allows None for a device, but a NamedSharding has indices for every device.
    return sorted({i for (part,) in filter(None, slices) for i in range(*part.indices(batch_size))})


def make_global_array(value: jax.Array | np.ndarray, sharding: Sharding) -> jax.Array:
    """Makes a global array with a sharding from a value that every process holds in full."""
    if not is_multiprocess():
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, np.asarray(value).__getitem__)


class AgreedStop(Stop):
    """A `Stop` for several processes: after a signal to any of them, `poll` returns True on all at the same step."""

    _polls = 0

    def poll(self) -> bool:
        self._polls += 1
        if not self.received and multihost_utils.reached_preemption_sync_point(self._polls):
            self.received = signal.SIGTERM
        return self.received is not None


@contextlib.contextmanager
def agreed_stop() -> Generator[Stop]:
    """Like `stop_signal`, for several processes: JAX's SIGTERM handler notifies all of them. Ctrl-C raises SIGTERM."""
    before = signal.getsignal(signal.SIGINT)

    def handle(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        say_in_handler('stopping: all processes save after one of the next steps; Ctrl-C again stops without saving')
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGINT, handle)
    try:
        yield AgreedStop()
    finally:
        signal.signal(signal.SIGINT, before)
