"""Settings of the process that make JAX faster on CPU. They must be made before it starts; a user's own stay."""

import ctypes
import importlib.util
import mmap
import os
import platform
import re
import sys
from pathlib import Path

CPUINFO = Path('/proc/cpuinfo')
RESTARTED = 'CONVNEXT_JAX_RESTARTED'
"""Set in a restarted process: a wrapper that drops the settings must not make it start for ever."""

ALLOCATOR = ':'.join(
    f'glibc.malloc.{setting}'
    for setting in ('hugetlb=1', f'mmap_threshold={64 * 2**20}', f'trim_threshold={512 * 2**20}')
)
"""Memory comes in pages of 2 MB, and of blocks below 64 MiB most stays with the process when it is freed: a step's
temporaries would be new memory each time, at the cost of a fault each 4 kB."""

EIGEN_PRODUCTS = '--xla_cpu_experimental_ynn_fusion_type=-individual_dot'
"""Matrix products by Eigen and not by YNNPACK: without AVX-512 faster. With it oneDNN is faster than both
(xla_cpu_experimental_onednn_custom_call), but not to be trusted: XLA of jaxlib 0.12.0 then merges a GELU written as
x · ½(1 + erf) into a product whose own value is needed as well, and gradients are wrong."""

WIDE_VECTORS = '--xla_cpu_prefer_vector_width=512'
"""XLA's own loops at the full width of AVX-512."""


def missing_settings() -> dict[str, str]:
    """Environment variable → value, of what this machine and the installed jaxlib have, and the user has not set."""
    settings = {}
    library, version = platform.libc_ver()
    if 'GLIBC_TUNABLES' not in os.environ and library == 'glibc' and _numbers(version) >= [2, 35]:
        settings['GLIBC_TUNABLES'] = ALLOCATOR
    flag = _flag(CPUINFO.read_text() if CPUINFO.exists() else '')
    if 'XLA_FLAGS' not in os.environ and flag and _jaxlib_knows(flag):
        settings['XLA_FLAGS'] = flag
    return settings


def _flag(cpuinfo: str) -> str:
    """That of XLA which was faster on such a processor."""
    if ' avx512f ' in cpuinfo:
        return WIDE_VECTORS
    return EIGEN_PRODUCTS if ' avx2 ' in cpuinfo else ''


def restart_with_settings() -> None:
    """Starts this process anew with the missing settings in its environment, if there are any; once at the most."""
    settings = {} if RESTARTED in os.environ else missing_settings()
    if settings and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | settings | {RESTARTED: '1'})


def describe_settings() -> str:
    """The settings as they are."""
    variables = ('GLIBC_TUNABLES', 'XLA_FLAGS')
    return ' '.join(f'{variable}={os.environ[variable]}' for variable in variables if variable in os.environ) or 'none'


def release_memory() -> None:
    """Gives memory that was freed, as a compiler leaves it by the hundred megabytes, back to the system (glibc)."""
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).malloc_trim(0)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r'\d+', version)]


def _jaxlib_knows(flag: str) -> bool:
    """A flag that XLA does not know ends the process."""
    jaxlib = importlib.util.find_spec('jaxlib')
    for library in Path(jaxlib.origin).parent.glob('libjax_common.*') if jaxlib and jaxlib.origin else ():
        with library.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(flag.strip('-').partition('=')[0].encode()) >= 0
    return False
