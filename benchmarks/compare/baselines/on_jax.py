"""The device of the implementations that use JAX."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.compare.baselines.workload import Device


def jax_device() -> Device:
    """JAX's default device."""
    return Device(jax.devices()[0].device_kind, _seconds, _make_matmul, _make_copy, _peak_memory)


def _seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def _make_matmul(side: int, dtype: str) -> Callable[[], jax.Array]:
    left, right = jax.random.normal(jax.random.key(0), (2, side, side), dtype)
    return lambda: jnp.matmul(left, right)


def _make_copy(size: int) -> Callable[[], jax.Array]:
    # The target is donated, so that the time does not include the allocation of a new array.
    copy = jax.jit(lambda source, target: jnp.copy(source), donate_argnames='target', keep_unused=True)
    source, target = jnp.ones(size // 4), jnp.zeros(size // 4)

    def run() -> jax.Array:
        nonlocal target
        target = copy(source, target)
        return target

    return run


def _peak_memory() -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')
