"""The choice between a Pallas kernel for NVIDIA GPUs and the native computation."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from convnext_jax.models.parameters import AnyArray

triton: Any
try:
    from jax.experimental.pallas import triton
except ImportError:  # JAX plans to remove this backend
    triton = None

Result = TypeVar('Result', bound=jax.Array | tuple[jax.Array, ...])


def on_nvidia_gpu(kernel: Callable[..., Result], native: Callable[..., Result], *arguments: AnyArray) -> Result:
    """The result of `kernel` in programs for NVIDIA GPUs with Pallas kernels, and of `native` in all other programs.

    Args:
        kernel, native: two implementations of one function.
        arguments: the arguments of the function.
    """
    if not has_kernels(*arguments):
        return native(*arguments)
    return jax.lax.platform_dependent(*arguments, cuda=kernel, default=native)


def has_kernels(*arguments: AnyArray) -> bool:
    """Whether the program that is being traced may contain Pallas kernels of JAX's Triton backend.

    The conditions: this JAX version has the backend; the GPU, or the described GPU in the mesh of the program, is
    Ampere or newer; and all sizes are known (an exported program may have a symbolic batch size).
    """
    if triton is None:
        return False
    if not all(isinstance(size, int) for argument in arguments for size in argument.shape):
        return False
    if jax.default_backend() == 'gpu':
        return not re.match(r'[1-7]\.', str(getattr(jax.devices()[0], 'compute_capability', '')))
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described is not None and described.device_kind.startswith('NVIDIA')
