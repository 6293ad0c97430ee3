"""Settings of the process that make JAX faster on CPU. They must be made before it starts; a user's own stay."""

import ctypes
import importlib.util
import mmap
import os
import platform
import sys
from pathlib import Path

CPUINFO = Path('/proc/cpuinfo')

HUGE_PAGES = 'glibc.malloc.hugetlb=1'
"""Large blocks of memory come in pages of 2 MB: a step's temporaries are new memory each time, and cost a fault each
4 kB otherwise."""

EIGEN_PRODUCTS = '--xla_cpu_experimental_ynn_fusion_type=-individual_dot'
"""Matrix products by Eigen and not by YNNPACK: faster without AVX-512, slower with it."""


def missing_settings() -> dict[str, str]:
    """Environment variable → value, of what this machine and the installed jaxlib have, and the user has not set."""
    settings = {}
    library, version = platform.libc_ver()
    if library == 'glibc' and tuple(map(int, version.split('.'))) >= (2, 35):
        settings['GLIBC_TUNABLES'] = HUGE_PAGES
    features = CPUINFO.read_text() if CPUINFO.exists() else ''
    if ' avx2 ' in features and ' avx512f ' not in features and _jaxlib_knows(EIGEN_PRODUCTS):
        settings['XLA_FLAGS'] = EIGEN_PRODUCTS
    return {variable: value for variable, value in settings.items() if variable not in os.environ}


def restart_with_settings() -> None:
    """Starts this process anew with the missing settings in its environment, if there are any."""
    settings = missing_settings()
    if settings:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | settings)


def describe_settings() -> str:
    """The settings as they are."""
    variables = ('GLIBC_TUNABLES', 'XLA_FLAGS')
    return ' '.join(f'{variable}={os.environ[variable]}' for variable in variables if variable in os.environ) or 'none'


def release_memory() -> None:
    """Gives memory that was freed, as a compiler leaves it by the hundred megabytes, back to the system (glibc)."""
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).malloc_trim(0)


def _jaxlib_knows(flag: str) -> bool:
    """A flag that XLA does not know ends the process."""
    folder = importlib.util.find_spec('jaxlib').submodule_search_locations[0]
    for library in Path(folder).glob('libjax_common.*'):
        with library.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(flag.strip('-').partition('=')[0].encode()) >= 0
    return False
