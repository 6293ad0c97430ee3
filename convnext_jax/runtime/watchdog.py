"""No process of a job outlives another's error: each looks whether all are well.

It goes through the key-value store and the barriers of JAX's coordination service, which runs on process 0.
"""

import contextlib
import json
import os
import threading
import time
from typing import Any, NoReturn

import jax
from jax._src.distributed import global_state  # Orbax takes the client of the key-value store from there too

from convnext_jax.errors import first_line
from convnext_jax.output import say

FAILURE = 'convnext_jax/failure'
ALIVE = 'convnext_jax/alive'
FAREWELL = 5
"""Seconds in which the others learn of a failure before the process ends: the coordination service ends with it."""


class Watchdog:
    """Looks from a thread whether all processes are well, and ends this one if another failed or is gone.

    Args:
        timeout: seconds within which a process that is gone is noticed.
    """

    def __init__(self, timeout: int):
        self._client: Any = global_state.client  # not None: there are several processes
        self._timeout = timeout
        self._process, self._processes = jax.process_index(), jax.process_count()
        self._ending = threading.Lock()
        self._over = False
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        for turn in range(2**62):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is no failure to get
                failure = self._client.blocking_key_value_get(FAILURE, 250 * self._timeout)
                return self._follow(json.loads(failure))
            if self._over:
                return None
            try:
                self._client.key_value_set(f'{ALIVE}/{self._process}', str(turn), allow_overwrite=True)
                self._client.wait_at_barrier(ALIVE, 500 * self._timeout)
            except jax.errors.JaxRuntimeError as error:
                return self._end_without(turn, error)
        return None

    def _follow(self, failure: dict) -> None:
        if failure['process'] == self._process:
            return
        with self._ending:
            text = f'error: process {failure["process"]} failed: {failure["text"]}' if self._process == 0 else None
            self._say_farewell()
            leave(text, failure['status'])

    def _end_without(self, turn: int, error: Exception) -> None:
        if self._over:
            return
        try:
            seen = dict(self._client.key_value_dir_get(ALIVE))
            gone = [i for i in range(self._processes) if int(seen.get(f'{ALIVE}/{i}', -1)) < turn]
            problem = f'no sign of process {", ".join(map(str, gone))} for {self._timeout} s'
        except jax.errors.JaxRuntimeError:
            problem = f'process 0 is gone ({first_line(error)})'
        with self._ending:
            leave(f'error: {problem}: see its own output. The same command on all hosts resumes', 1)

    def fail(self, error: BaseException, text: str, status: int) -> NoReturn:
        """Ends all processes after an error of this one.

        Args:
            error: it.
            text: what this process prints of it.
            status: of all.
        """
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(self._timeout + 1)  # if a collective broke because another process did, that one is to be named
        say(text, error=True)
        with self._ending:
            failure = {
                'process': self._process,
                'text': text.splitlines()[-1].removeprefix('error: '),
                'status': status,
            }
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was faster
                self._client.key_value_set(FAILURE, json.dumps(failure))
            self._say_farewell()
            if self._process == 0:
                time.sleep(1)  # the others first: the coordination service ends with this process
            leave(None, status)

    def _say_farewell(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.wait_at_barrier(f'{FAILURE}/farewell', 1000 * FAREWELL)

    def finish(self) -> None:
        """Waits until all processes are done, and leaves JAX's runtime."""
        try:
            self._client.wait_at_barrier(f'{ALIVE}/done', 1000 * self._timeout)
        except jax.errors.JaxRuntimeError as error:
            self.fail(error, f'error: not all processes come to the end: {first_line(error)}', 1)
        self._over = True
        jax.distributed.shutdown()


def leave(text: str | None, status: int) -> NoReturn:
    """Ends the process from any thread, whatever the others wait for."""
    if text:
        say(text, error=True)
    os._exit(status)
