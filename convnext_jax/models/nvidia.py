"""Where the Pallas kernels for NVIDIA GPUs run, and what runs elsewhere."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax

triton: Any
try:
    from jax.experimental.pallas import triton
except ImportError:  # JAX means to remove it
    triton = None

Result = TypeVar('Result', bound=jax.Array | tuple[jax.Array, ...])


def on_nvidia_gpu(kernel: Callable[..., Result], native: Callable[..., Result], *arguments: jax.Array) -> Result:
    """Calls `kernel` in programs for an NVIDIA GPU that has such kernels, and `native` in all others.

    Args:
        kernel, native: functions with the same arguments and results.
        arguments: for them.
    """
    if not has_kernels(*arguments):
        return native(*arguments)
    return jax.lax.platform_dependent(*arguments, cuda=kernel, default=native)


def has_kernels(*arguments: jax.Array) -> bool:
    """Whether a program for an NVIDIA GPU, traced now, can hold Pallas kernels of JAX's Triton backend.

    They need that backend, which a future JAX may not have; a GPU of Ampere or newer, or the description of one in the
    mesh of the program; and known sizes, while an exported program may leave the batch size open.
    """
    if triton is None:
        return False
    if not all(isinstance(size, int) for argument in arguments for size in argument.shape):
        return False
    if jax.default_backend() == 'gpu':
        return not re.match(r'[1-7]\.', str(getattr(jax.devices()[0], 'compute_capability', '')))
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described is not None and described.device_kind.startswith('NVIDIA')
