import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from convnext_jax.runtime.process import describe_settings

ROOT = Path(__file__).parents[2]


def test_the_settings_are_told_as_they_are(monkeypatch):
    """Two runs whose speeds differ are compared by this line."""
    monkeypatch.setenv('XLA_FLAGS', '--a=1')
    monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
    assert describe_settings() == 'XLA_FLAGS=--a=1'
    monkeypatch.delenv('XLA_FLAGS')
    assert describe_settings() == 'none'


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='other C libraries have no such call')
def test_memory_that_was_freed_goes_back():
    """Half a gigabyte of a compiler's stays with the process otherwise, and comes on top of the training's."""
    code = (
        'import ctypes; from pathlib import Path; from convnext_jax.runtime.process import release_memory\n'
        'libc = ctypes.CDLL(None); libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n'
        'pages = lambda: int(Path("/proc/self/statm").read_text().split()[1])\n'
        'blocks = [libc.malloc(10_000) for _ in range(10_000)]\n'
        'for block in blocks: ctypes.memset(block, 1, 10_000)\n'
        'for block in blocks[:-1]: libc.free(block)\n'  # the last one holds the others in the heap
        'before = pages(); release_memory(); print((before - pages()) * 4096)'
    )
    environment = {name: value for name, value in os.environ.items() if name != 'GLIBC_TUNABLES'}
    freed = int(subprocess.check_output([sys.executable, '-c', code], env=environment, text=True, cwd=ROOT))
    assert freed > 90_000_000
