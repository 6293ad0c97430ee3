"""Watchdog: ends all processes of a job when one of them fails or disappears.

It uses the key-value store and the barriers of JAX's coordination service, which runs on process 0.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax._src.distributed import global_state  # JAX has no public access to the client; Orbax uses this one too

from convnext_jax.errors import first_line
from convnext_jax.output import say

FAILURE = 'convnext_jax/failure'
"""Key of the first failure: process, text and status as JSON, or null once all processes have finished."""
HEARTBEAT = 'convnext_jax/heartbeat'
SHUTDOWN_SECONDS = 5
"""After a failure, the processes wait up to this long for each other before they exit, so that all of them can read the
failure: the coordination service ends with process 0."""


class Watchdog:
    """Checks in a thread whether all processes are alive, and ends this process if another one failed or disappeared.

    Args:
        timeout: seconds that a process may be silent. The others exit after 1 to 1.25 times this time.
    """

    def __init__(self, timeout: int):
        self._client: Any = global_state.client  # not None, because there are several processes
        self._timeout = timeout
        self._longest_beat = 1.25 * timeout
        self._process, self._processes = jax.process_index(), jax.process_count()
        self._exiting = threading.Lock()
        self._finished = False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        for beat in range(2**62):
            # If the network breaks, calls of the client can take minutes in spite of their timeouts: the timer exits.
            timer = _start_timer(self._longest_beat, self._exit_without_coordinator)
            try:
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # timeout: no process has failed
                    failure = json.loads(self._client.blocking_key_value_get(FAILURE, 100 * self._timeout))
                    return self._exit_after_failure(failure) if failure else None
                if self._finished:
                    return None
                self._client.key_value_set(f'{HEARTBEAT}/{self._process}', str(beat), allow_overwrite=True)
                self._client.wait_at_barrier(HEARTBEAT, 1000 * self._timeout)
            except jax.errors.JaxRuntimeError as error:
                return self._exit_after_missed_heartbeat(beat, error)
            finally:
                timer.cancel()
                timer.join()
        return None

    def _exit_after_failure(self, failure: dict) -> None:
        """Exits with the status of another process that failed; process 0 prints the error of that process."""
        if failure['process'] == self._process:
            return
        with self._exiting:
            if self._process == 0:
                say(f'error: process {failure["process"]} failed: {failure["text"]}', error=True)
            _exit_if_the_network_is_broken(failure['status'])
            self._wait_at_shutdown_barrier()
            self._exit_after_the_others(failure['status'])

    def _exit_after_missed_heartbeat(self, beat: int, error: Exception) -> None:
        if self._finished:
            return
        try:
            beats = dict(self._client.key_value_dir_get(HEARTBEAT))
            missing = [i for i in range(self._processes) if int(beats.get(f'{HEARTBEAT}/{i}', -1)) < beat]
            problem = f'process {", ".join(map(str, missing))} has not responded for {self._timeout} s'
        except jax.errors.JaxRuntimeError:
            problem = f'process 0 has ended ({first_line(error)})'
        self._exit_after_loss(problem)

    def _exit_without_coordinator(self) -> None:
        if not self._finished:
            self._exit_after_loss(f'process 0 has not responded for {self._timeout} s')

    def _exit_after_loss(self, problem: str) -> NoReturn:
        with self._exiting:
            say(f'error: {problem}: see its output, and run the same command on all hosts to resume', error=True)
            self._exit_after_the_others(1)

    def fail(self, error: BaseException, text: str, status: int) -> NoReturn:
        """Ends all processes after an error of this process.

        Args:
            error: the error.
            text: message that this process prints.
            status: exit status of all processes.
        """
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(self._longest_beat + 1)  # if another process caused the error, the thread exits first
        with self._exiting:
            say(text, error=True)
            _exit_if_the_network_is_broken(status)
            failure = {
                'process': self._process,
                'text': text.splitlines()[-1].removeprefix('error: '),
                'status': status,
            }
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process has already reported its failure
                self._client.key_value_set(FAILURE, json.dumps(failure))
            self._wait_at_shutdown_barrier()
            self._exit_after_the_others(status)

    def _wait_at_shutdown_barrier(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.wait_at_barrier(f'{FAILURE}/shutdown', 1000 * SHUTDOWN_SECONDS)

    def _exit_after_the_others(self, status: int) -> NoReturn:
        if self._process == 0:
            time.sleep(2)  # the coordination service ends with this process, and JAX aborts those that still run
        exit_now(None, status)

    def finish(self) -> None:
        """Waits until all processes have finished, and shuts down JAX's distributed runtime."""
        try:
            self._client.wait_at_barrier(f'{HEARTBEAT}/finished', 1000 * self._timeout)
        except jax.errors.JaxRuntimeError as error:
            self.fail(error, f'error: not all processes have finished: {first_line(error)}', 1)
        self._finished = True
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process has set it
            self._client.key_value_set(FAILURE, json.dumps(None))  # wakes the threads
        self._thread.join(SHUTDOWN_SECONDS)  # Python aborts if a thread returns from JAX while the interpreter exits
        jax.distributed.shutdown()


def _exit_if_the_network_is_broken(status: int) -> None:
    """Exits later, because calls of the client may not return while the network is broken."""
    _start_timer(3 * SHUTDOWN_SECONDS, lambda: exit_now(None, status))


def _start_timer(seconds: float, function: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()
    return timer


def exit_now(text: str | None, status: int) -> NoReturn:
    """Prints an error, if there is one, and exits from any thread, without waiting for other threads."""
    if text:
        say(text, error=True)
    os._exit(status)
