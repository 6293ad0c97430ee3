import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import LONGEST

from convnext_jax.runtime import cpu_settings
from convnext_jax.runtime.cpu_settings import (
    ALLOCATOR,
    EIGEN_PRODUCTS,
    WIDE_VECTORS,
    flag_for,
    jaxlib_knows,
    missing_settings,
)

ROOT = Path(__file__).parents[2]
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
        monkeypatch.setattr(cpu_settings, 'CPUINFO', tmp_path / 'cpuinfo')
        monkeypatch.setattr(cpu_settings.platform, 'libc_ver', lambda: library)
        monkeypatch.setattr(cpu_settings, 'jaxlib_knows', lambda flag: True)

    return make


def test_settings_follow_from_the_machine(machine):
    """A setting that helps one machine slows another."""
    machine(AVX2)
    assert missing_settings() == {
        'GLIBC_TUNABLES': ALLOCATOR,
        'XLA_FLAGS': EIGEN_PRODUCTS,
    }
    machine(AVX512)
    assert missing_settings() == {
        'GLIBC_TUNABLES': ALLOCATOR,
        'XLA_FLAGS': WIDE_VECTORS,
    }
    machine('CPU architecture: 8\n', library=('glibc', '2.31'))
    assert missing_settings() == {}
    for library in (('', ''), ('glibc', ''), ('musl', '1.2.5')):
        machine('', library=library)
        assert missing_settings() == {}
    machine('', library=('glibc', '2.36.9000'))
    assert missing_settings() == {'GLIBC_TUNABLES': ALLOCATOR}


def test_what_the_user_has_set_stays(machine, monkeypatch):
    """Somebody who tunes a machine, or runs eight simulated devices, must not be overruled."""
    machine(AVX2)
    monkeypatch.setenv('XLA_FLAGS', '')
    monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.perturb=0')
    assert missing_settings() == {}


NETWORK = """
import sys, jax, jax.numpy as jnp, numpy as np, convnext_jax as cx
from convnext_jax.models.variants import Variant
# One network with what V1 has and what V2 has.
create = lambda key: cx.create_model(Variant((2, 1), (96, 192), grn=True, layer_scale_init=1.0), num_classes=7, key=key)
model, rng = jax.eval_shape(create, jax.random.key(0)), np.random.default_rng(0)
draw = lambda *shape: rng.normal(0, 0.1, shape).astype(np.float32)
model = jax.tree.map(lambda x: draw(*x.shape), model)
images = 10 * draw(4, 64, 64, 3)
def loss(model):
    logits = model(images)
    return jnp.square(logits).sum(), logits
gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(model)
np.savez(sys.argv[1], logits, *jax.tree.leaves(gradient))
"""


@pytest.mark.slow
def test_the_network_is_the_same_with_each_flag(tmp_path):
    """Another library for products may compute another gradient, as oneDNN does; and a flag that XLA does not know ends
    every command before its first line.
    """
    assert not jaxlib_knows('--xla_cpu_no_such_flag=1')
    found = {}
    for name, cpuinfo in {'none': '', 'AVX2': AVX2, 'AVX-512': AVX512}.items():
        flag = flag_for(cpuinfo)
        if not flag or jaxlib_knows(flag):
            path = tmp_path / f'{name}.npz'
            environment = os.environ | {'XLA_FLAGS': f'--xla_backend_optimization_level=1 {flag}'}
            subprocess.run(
                [sys.executable, '-c', NETWORK, path], env=environment, cwd=ROOT, check=True, timeout=LONGEST
            )
            found[name] = np.load(path)
    for name, arrays in found.items():
        for leaf, expected in found['none'].items():
            error = np.abs(arrays[leaf] - expected).max()
            assert error <= 1e-5 * np.abs(expected).max(), f'{leaf} with the flag for {name}: {error}'


def test_a_flag_that_this_jaxlib_lacks_is_not_set(machine, monkeypatch):
    """The next jaxlib may lack a flag, and every command would end before its first line."""
    machine(AVX512, library=('', ''))
    monkeypatch.setattr(cpu_settings, 'jaxlib_knows', lambda flag: False)
    assert missing_settings() == {}


LAUNCHER = ROOT / 'launch' / 'cpu.sh'
PRINT = 'import os, sys; print(os.environ.get("GLIBC_TUNABLES"), os.environ.get("XLA_FLAGS"), sys.argv[1:])'


def test_the_launcher_starts_a_command_with_the_settings_and_its_arguments(monkeypatch):
    """A setting that does not reach the process changes nothing, and nobody notices."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    settings = missing_settings()
    expected = f'{settings.get("GLIBC_TUNABLES")} {settings.get("XLA_FLAGS")} {["a b", "--c=1"]}\n'
    command = [LAUNCHER, sys.executable, '-c', PRINT, 'a b', '--c=1']
    assert subprocess.check_output(command, text=True, timeout=LONGEST) == expected
    monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.perturb=0')
    monkeypatch.setenv('XLA_FLAGS', '')
    assert subprocess.check_output(command, text=True, timeout=LONGEST).startswith('glibc.malloc.perturb=0  [')


@pytest.mark.parametrize('arguments', [(), ('make', 'demo')])
def test_the_launcher_needs_a_python(arguments):
    """Another program would be run twice, the first time with the path of our script."""
    refused = subprocess.run([LAUNCHER, *arguments], capture_output=True, text=True, timeout=LONGEST)
    assert (refused.returncode, refused.stdout) == (2, '')
    assert refused.stderr == 'usage: launch/cpu.sh PYTHON SCRIPT [ARGUMENT]...\n'
