"""The watchdog with a stand-in for JAX's coordination service."""

import threading
from types import SimpleNamespace

import jax

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
