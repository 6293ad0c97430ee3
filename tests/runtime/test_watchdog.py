"""The watchdog with a stand-in for JAX's coordination service."""

import queue
import threading
from types import SimpleNamespace

import jax
import pytest

from convnext_jax.runtime import watchdog
from convnext_jax.runtime.watchdog import Watchdog


class Client:
    """A key-value store whose barriers are passed at once."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError('timeout')
            return self.values[key]

    def wait_at_barrier(self, name, milliseconds):
        pass


def test_the_thread_has_ended_when_a_job_finishes(monkeypatch):
    """Python 3.11 aborts the process if the thread returns from JAX while the interpreter exits."""
    monkeypatch.setattr(watchdog, 'global_state', SimpleNamespace(client=Client()))
    monkeypatch.setattr(jax.distributed, 'shutdown', lambda: None)
    before = set(threading.enumerate())
    guard = Watchdog(timeout=180)
    assert set(threading.enumerate()) - before
    guard.finish()
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize('failing', [False, True])
def test_a_process_ends_although_the_calls_of_jax_do_not_return(monkeypatch, failing):
    """When the network breaks, a host would wait until JAX aborts it with a stack trace."""
    hangs, ended = threading.Event(), queue.Queue()
    client = Client()
    client.wait_at_barrier = lambda *_: hangs.wait()
    monkeypatch.setattr(watchdog, 'global_state', SimpleNamespace(client=client))
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    monkeypatch.setattr(watchdog, 'SHUTDOWN_SECONDS', 0.1)
    monkeypatch.setattr(watchdog, 'say', lambda text, error: ended.put(text))
    monkeypatch.setattr(watchdog, 'exit_now', lambda _, status: ended.put(status))
    guard = Watchdog(timeout=100 if failing else 0.2)
    if failing:
        fail = threading.Thread(target=guard.fail, args=(ValueError(), 'error: the disk is full', 2))
        fail.start()
    said, status = ended.get(timeout=60), ended.get(timeout=60)
    hangs.set()
    client.key_value_set(watchdog.FAILURE, 'null')
    guard._thread.join()
    if failing:
        fail.join()
        assert (said, status) == ('error: the disk is full', 2)
    else:
        assert said.startswith('error: process 0 has not responded for 0.2 s: ')
        assert status == 1
