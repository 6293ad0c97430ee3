"""The settings that a process logs, and the memory that it releases."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from convnext_jax.runtime.process import describe_settings

ROOT = Path(__file__).parents[2]


def test_the_logged_settings_are_the_environment_variables(monkeypatch):
    """Users could not explain why two runs differ in speed."""
    monkeypatch.setenv('XLA_FLAGS', '--a=1')
    monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
    assert describe_settings() == 'XLA_FLAGS=--a=1'
    monkeypatch.delenv('XLA_FLAGS')
    assert describe_settings() == 'none'


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc has malloc_trim')
def test_freed_memory_is_returned_to_the_system():
    """A run would keep the half gigabyte that the compiler used, in addition to the memory for training."""
    code = (
        'import ctypes; from pathlib import Path; from convnext_jax.runtime.process import release_memory\n'
        'libc = ctypes.CDLL(None); libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n'
        'pages = lambda: int(Path("/proc/self/statm").read_text().split()[1])\n'
        'blocks = [libc.malloc(10_000) for _ in range(10_000)]\n'
        'for block in blocks: ctypes.memset(block, 1, 10_000)\n'
        'for block in blocks[:-1]: libc.free(block)\n'  # the last block keeps the freed ones in the heap
        'before = pages(); release_memory(); print((before - pages()) * 4096)'
    )
    environment = {name: value for name, value in os.environ.items() if name != 'GLIBC_TUNABLES'}
    freed = int(subprocess.check_output([sys.executable, '-c', code], env=environment, text=True, cwd=ROOT))
    assert freed > 90_000_000
