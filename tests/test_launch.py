import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from convnext_jax import launch

ROOT = Path(__file__).parent.parent
AVX2 = 'flags : fpu sse4_2 avx avx2 fma\n'
AVX512 = 'flags : fpu sse4_2 avx avx2 fma avx512f avx512bw\n'
VARIABLES = ('GLIBC_TUNABLES', 'XLA_FLAGS')


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of a given cpuinfo and C library, on which the user has set nothing."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)

    def make(cpuinfo, library=('glibc', '2.36')):
        (tmp_path / 'cpuinfo').write_text(cpuinfo)
        monkeypatch.setattr(launch, 'CPUINFO', tmp_path / 'cpuinfo')
        monkeypatch.setattr(launch.platform, 'libc_ver', lambda: library)
        monkeypatch.setattr(launch, '_jaxlib_knows', lambda flag: True)

    return make


def test_settings_follow_from_the_machine(machine):
    """A setting that helps one machine slows another."""
    machine(AVX2)
    assert launch.missing_settings() == {'GLIBC_TUNABLES': launch.ALLOCATOR, 'XLA_FLAGS': launch.EIGEN_PRODUCTS}
    machine(AVX512)
    flags = f'{launch.ONEDNN_PRODUCTS} {launch.WIDE_VECTORS}'
    assert launch.missing_settings() == {'GLIBC_TUNABLES': launch.ALLOCATOR, 'XLA_FLAGS': flags}
    machine('CPU architecture: 8\n', library=('glibc', '2.31'))
    assert launch.missing_settings() == {}
    for library in (('', ''), ('glibc', ''), ('musl', '1.2.5')):
        machine('', library=library)
        assert launch.missing_settings() == {}
    machine('', library=('glibc', '2.36.9000'))
    assert launch.missing_settings() == {'GLIBC_TUNABLES': launch.ALLOCATOR}


def test_what_the_user_has_set_stays(machine, monkeypatch):
    """Somebody who tunes a machine, or runs eight simulated devices, must not be overruled."""
    machine(AVX2)
    monkeypatch.setenv('XLA_FLAGS', '')
    monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.perturb=0')
    assert launch.missing_settings() == {}


@pytest.mark.skipif(launch.platform.libc_ver()[0] != 'glibc', reason='other C libraries have no such call')
def test_memory_that_was_freed_goes_back():
    """Half a gigabyte of a compiler's stays with the process otherwise, and comes on top of the training's."""
    code = (
        'import ctypes; from pathlib import Path; from convnext_jax import launch\n'
        'libc = ctypes.CDLL(None); libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n'
        'pages = lambda: int(Path("/proc/self/statm").read_text().split()[1])\n'
        'blocks = [libc.malloc(10_000) for _ in range(10_000)]\n'
        'for block in blocks: ctypes.memset(block, 1, 10_000)\n'
        'for block in blocks[:-1]: libc.free(block)\n'  # the last one holds the others in the heap
        'before = pages(); launch.release_memory(); print((before - pages()) * 4096)'
    )
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    freed = int(subprocess.check_output([sys.executable, '-c', code], env=environment, text=True, cwd=ROOT))
    assert freed > 90_000_000


@pytest.mark.parametrize('cpuinfo', [AVX2, AVX512], ids=['AVX2', 'AVX-512'])
def test_this_jaxlib_takes_the_flags_it_is_said_to_know(cpuinfo):
    """A flag that XLA does not know ends every command before its first line."""
    assert not launch._jaxlib_knows('--xla_cpu_no_such_flag=1')
    flags = launch._flags(cpuinfo)
    if all(map(launch._jaxlib_knows, flags.split())):
        code = 'import jax.numpy as jnp; print((jnp.ones((3, 3)) @ jnp.ones((3, 3))).sum())'
        environment = os.environ | {'XLA_FLAGS': flags}
        assert subprocess.check_output([sys.executable, '-c', code], env=environment, text=True) == '27.0\n'


def test_a_flag_that_this_jaxlib_lacks_is_not_set(machine, monkeypatch):
    """The next jaxlib may know one flag less, and every command would end before its first line."""
    machine(AVX512, library=('', ''))
    monkeypatch.setattr(launch, '_jaxlib_knows', lambda flag: flag != launch.WIDE_VECTORS)
    assert launch.missing_settings() == {}


def test_the_process_starts_anew_with_the_settings_and_its_arguments():
    """Set after the start they do nothing; and a command must not lose its arguments, nor start again for ever."""
    code = (
        'import os, sys; from convnext_jax import launch; print(os.getpid(), "jax" in sys.modules, flush=True)\n'
        'launch.restart_with_settings(); print(launch.missing_settings(), sys.argv[1:], launch.describe_settings())'
    )
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    output = subprocess.check_output([sys.executable, '-c', code, 'a b', '--c=1'], env=environment, text=True, cwd=ROOT)
    *starts, last = output.splitlines()
    assert len(set(starts)) == 1, 'the restarted process is another one'
    assert starts[0].endswith('False'), 'JAX was imported before'
    assert last.startswith("{} ['a b', '--c=1'] ")
    if launch.platform.libc_ver()[0] == 'glibc':
        assert len(starts) == 2
        assert f'GLIBC_TUNABLES={launch.ALLOCATOR}' in last


@pytest.mark.parametrize('script', ['train.py', 'eval.py'])
def test_a_script_makes_its_settings_before_jax_is_there(script, tmp_path):
    """XLA reads its flags once; and whoever waits for JAX twice waits for nothing."""
    # A site hook that drops the settings, as a wrapper script may: the restart must not go on for ever.
    hook = 'import os, sys; os.environ.pop("GLIBC_TUNABLES", None); print(sys.orig_argv[1:], flush=True)'
    (tmp_path / 'sitecustomize.py').write_text(hook)
    environment = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, launch.RESTARTED)}
    environment['PYTHONPATH'] = str(tmp_path)
    command = [sys.executable, '-X', 'importtime', script, '--no_such_flag=1']
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2
    assert 'no_such_flag' in result.stderr
    starts = [line for line in result.stdout.splitlines() if line.startswith('[')]
    assert len(set(starts)) == 1
    if launch.platform.libc_ver()[0] == 'glibc':
        assert len(starts) == 2
        before = result.stderr.split('import time: self [us]')[1]  # the first start
        assert 'convnext_jax.launch' in before
        assert not re.search(r'\| +jax$', before, re.MULTILINE)
