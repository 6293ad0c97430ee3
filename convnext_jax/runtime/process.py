"""Environment settings and memory of this process."""

import ctypes
import os
import platform


def describe_settings() -> str:
    """The environment variables that affect JAX's speed on CPU, as NAME=VALUE pairs; 'none' if none is set."""
    variables = ('GLIBC_TUNABLES', 'XLA_FLAGS')
    return ' '.join(f'{variable}={os.environ[variable]}' for variable in variables if variable in os.environ) or 'none'


def release_memory() -> None:
    """Returns freed memory to the operating system (glibc only). Compiling frees hundreds of megabytes."""
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).malloc_trim(0)
