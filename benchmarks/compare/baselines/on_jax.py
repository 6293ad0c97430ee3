"""What the implementations on JAX share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.compare.baselines.workload import MATMUL_SIDE


def device_kind() -> str:
    """'cpu', or the accelerator's name."""
    return jax.devices()[0].device_kind


def make_matmul(dtype: str) -> Callable[[], None]:
    """As `Baseline.matmul`."""
    square = jnp.ones((MATMUL_SIDE, MATMUL_SIDE), dtype)

    def matmul() -> None:
        jax.block_until_ready(jnp.matmul(square, square))

    return matmul
