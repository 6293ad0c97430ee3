"""The environment variables that make JAX faster on CPU, and the launcher that sets them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TIMEOUT

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
    """Simulates a machine with the given cpuinfo and C library, on which the user has set no variable."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)

    def make(cpuinfo, library=('glibc', '2.36')):
        (tmp_path / 'cpuinfo').write_text(cpuinfo)
        monkeypatch.setattr(cpu_settings, 'CPUINFO', tmp_path / 'cpuinfo')
        monkeypatch.setattr(cpu_settings.platform, 'libc_ver', lambda: library)
        monkeypatch.setattr(cpu_settings, 'jaxlib_knows', lambda flag: True)

    return make


def test_settings_depend_on_the_machine(machine):
    """A setting that makes one machine faster would slow another one."""
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


def test_variables_that_the_user_has_set_are_kept(machine, monkeypatch):
    """Users could not tune a machine or simulate eight devices."""
    machine(AVX2)
    monkeypatch.setenv('XLA_FLAGS', '')
    monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.perturb=0')
    assert missing_settings() == {}


NETWORK = """
import sys, jax, jax.numpy as jnp, numpy as np, convnext_jax as cx
from convnext_jax.models.variants import Variant
# One network with the layer scale of V1 and the GRN of V2.
create = lambda key: cx.create_model(Variant((1,), (96,), grn=True, layer_scale_init=1.0), num_classes=7, key=key)
model, rng = jax.eval_shape(create, jax.random.key(0)), np.random.default_rng(0)
draw = lambda *shape: rng.normal(0, 0.1, shape).astype(np.float32)
model = jax.tree.map(lambda x: draw(*x.shape), model)
images = 10 * draw(2, 64, 64, 3)
def loss(model):
    logits = model(images)
    return jnp.square(logits).sum(), logits
gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(model)
np.savez(sys.argv[1], logits, *jax.tree.leaves(gradient))
"""


@pytest.mark.slow
def test_the_network_gives_equal_results_with_each_flag(tmp_path):
    """Training could get other gradients, because a flag may select another matrix library, such as oneDNN.

    A flag that XLA does not know would end every command at its start.
    """
    assert not jaxlib_knows('--xla_cpu_no_such_flag=1')
    found = {}
    for name, cpuinfo in {'none': '', 'AVX2': AVX2, 'AVX-512': AVX512}.items():
        flag = flag_for(cpuinfo)
        if not flag or jaxlib_knows(flag):
            path = tmp_path / f'{name}.npz'
            environment = os.environ | {'XLA_FLAGS': f'--xla_backend_optimization_level=1 {flag}'}
            subprocess.run(
                [sys.executable, '-c', NETWORK, path], env=environment, cwd=ROOT, check=True, timeout=TIMEOUT
            )
            found[name] = np.load(path)
    for name, arrays in found.items():
        for leaf, expected in found['none'].items():
            error = np.abs(arrays[leaf] - expected).max()
            assert error <= 1e-5 * np.abs(expected).max(), f'{leaf} with the flag for {name}: {error}'


def test_a_flag_that_this_jaxlib_lacks_is_not_set(machine, monkeypatch):
    """With a later jaxlib that lacks a flag, every command would end at its start."""
    machine(AVX512, library=('', ''))
    monkeypatch.setattr(cpu_settings, 'jaxlib_knows', lambda flag: False)
    assert missing_settings() == {}


LAUNCHER = ROOT / 'launch' / 'cpu.sh'
PRINT = 'import os, sys; print(os.environ.get("GLIBC_TUNABLES"), os.environ.get("XLA_FLAGS"), sys.argv[1:])'


def test_the_launcher_starts_a_command_with_the_settings_and_its_arguments(monkeypatch):
    """Settings that do not reach the process would have no effect, and nobody would notice."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    settings = missing_settings()
    expected = f'{settings.get("GLIBC_TUNABLES")} {settings.get("XLA_FLAGS")} {["a b", "--c=1"]}\n'
    command = [LAUNCHER, sys.executable, '-c', PRINT, 'a b', '--c=1']
    assert subprocess.check_output(command, text=True, timeout=TIMEOUT) == expected
    monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.perturb=0')
    monkeypatch.setenv('XLA_FLAGS', '')
    assert subprocess.check_output(command, text=True, timeout=TIMEOUT).startswith('glibc.malloc.perturb=0  [')


@pytest.mark.parametrize('arguments', [(), ('make', 'demo')])
def test_the_launcher_refuses_commands_other_than_python(arguments):
    """Another program would run twice, first with the path of `cpu_settings.py` as its argument."""
    refused = subprocess.run([LAUNCHER, *arguments], capture_output=True, text=True, timeout=TIMEOUT)
    assert (refused.returncode, refused.stdout) == (2, '')
    assert refused.stderr == 'usage: launch/cpu.sh PYTHON SCRIPT [ARGUMENT]...\n'
