import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
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
    assert launch.missing_settings() == {'GLIBC_TUNABLES': launch.ALLOCATOR, 'XLA_FLAGS': launch.WIDE_VECTORS}
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


NETWORK = """
import sys, jax, jax.numpy as jnp, numpy as np, convnext_jax as cx
from convnext_jax.models.variants import Variant
leaves = []
for grn in (False, True):
    model = cx.create_model(Variant((2, 1), (96, 192), grn=grn), num_classes=7, key=jax.random.key(0))
    noise = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(model))))
    model = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), model)
    images = jax.random.normal(jax.random.key(2), (4, 64, 64, 3))
    leaves.append(jax.jit(lambda model, images: model(images))(model, images))
    leaves += jax.tree.leaves(jax.jit(jax.grad(lambda model: jnp.square(model(images)).sum()))(model))
np.savez(sys.argv[1], *leaves)
"""


def test_the_network_is_the_same_with_each_flag(tmp_path):
    """Another library for products may compute another gradient, as oneDNN does; and a flag that XLA does not know ends
    every command before its first line.
    """
    assert not launch._jaxlib_knows('--xla_cpu_no_such_flag=1')
    found = {}
    for name, cpuinfo in {'none': '', 'AVX2': AVX2, 'AVX-512': AVX512}.items():
        flag = launch._flag(cpuinfo)
        if not flag or launch._jaxlib_knows(flag):
            path = tmp_path / f'{name}.npz'
            environment = os.environ | {'XLA_FLAGS': f'--xla_backend_optimization_level=1 {flag}'}
            subprocess.run([sys.executable, '-c', NETWORK, path], env=environment, cwd=ROOT, check=True)
            found[name] = np.load(path)
    for name, arrays in found.items():
        for leaf, expected in found['none'].items():
            error = np.abs(arrays[leaf] - expected).max()
            assert error <= 1e-5 * np.abs(expected).max(), f'{leaf} with the flag for {name}: {error}'


def test_a_flag_that_this_jaxlib_lacks_is_not_set(machine, monkeypatch):
    """The next jaxlib may know one flag less, and every command would end before its first line."""
    machine(AVX512, library=('', ''))
    monkeypatch.setattr(launch, '_jaxlib_knows', lambda flag: False)
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
