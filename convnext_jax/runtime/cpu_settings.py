"""Prints environment variables that make JAX faster on this CPU. launch/cpu.sh sets them for a command.

They must be set before the process starts. Variables that the user has set keep their values, and settings that the
machine or the installed jaxlib does not support are left out. launch/cpu.sh runs this file as a script, because
importing the package takes seconds.
"""

import importlib.util
import mmap
import os
import platform
import re
from pathlib import Path

CPUINFO = Path('/proc/cpuinfo')

ALLOCATOR = ':'.join(
    f'glibc.malloc.{setting}'
    for setting in ('hugetlb=1', f'mmap_threshold={64 * 2**20}', f'trim_threshold={512 * 2**20}')
)
"""glibc allocates memory in pages of 2 MB, and keeps most freed blocks below 64 MiB in the process. By default, the
temporary arrays of every step are allocated from the system, with one page fault for each 4 kB."""

EIGEN_PRODUCTS = '--xla_cpu_experimental_ynn_fusion_type=-individual_dot'
"""Matrix products with Eigen, which on CPUs without AVX-512 is faster than the default, YNNPACK. oneDNN
(xla_cpu_experimental_onednn_custom_call) is faster than both, but its gradients can be wrong: XLA of jaxlib 0.12.0
fuses a GELU written as x · ½(1 + erf) into a product whose own value is also needed."""

WIDE_VECTORS = '--xla_cpu_prefer_vector_width=512'
"""Makes the loops that XLA generates use the full vector width of AVX-512."""


def missing_settings() -> dict[str, str]:
    """Environment variable → value, for settings that this machine supports and that the user has not set."""
    settings = {}
    library, version = platform.libc_ver()
    if 'GLIBC_TUNABLES' not in os.environ and library == 'glibc' and _numbers(version) >= [2, 35]:
        settings['GLIBC_TUNABLES'] = ALLOCATOR
    flag = flag_for(CPUINFO.read_text(encoding='utf-8') if CPUINFO.exists() else '')
    if 'XLA_FLAGS' not in os.environ and flag and jaxlib_knows(flag):
        settings['XLA_FLAGS'] = flag
    return settings


def flag_for(cpuinfo: str) -> str:
    """The XLA flag that was fastest on this family of CPUs, or ''.

    Args:
        cpuinfo: content of /proc/cpuinfo.
    """
    if ' avx512f ' in cpuinfo:
        return WIDE_VECTORS
    return EIGEN_PRODUCTS if ' avx2 ' in cpuinfo else ''


def jaxlib_knows(flag: str) -> bool:
    """Whether the installed jaxlib contains the name of the flag. XLA aborts a process that sets an unknown flag."""
    jaxlib = importlib.util.find_spec('jaxlib')
    for library in Path(jaxlib.origin).parent.glob('libjax_common.*') if jaxlib and jaxlib.origin else ():
        with library.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(flag.strip('-').partition('=')[0].encode()) >= 0
    return False


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r'\d+', version)]


if __name__ == '__main__':
    for name, value in missing_settings().items():
        print(f'{name}={value}')
