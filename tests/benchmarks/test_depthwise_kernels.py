"""`python -m benchmarks.depthwise --device`: the check of the Pallas kernels on an accelerator."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import depthwise_kernels
from benchmarks.depthwise_kernels import Outcome, compare, verdict
from convnext_jax.models.depthwise_gpu import depthwise_conv_on_gpu, depthwise_kernel_gradient_on_gpu

ROOT = Path(__file__).parents[2]
SHAPE = (1, 4, 4, 64)


@jax.custom_vjp
def gpu_kernels(x, kernel):
    return depthwise_conv_on_gpu(x, kernel, interpret=True)


def _backward(saved, cotangent):
    x, kernel = saved
    dkernel = depthwise_kernel_gradient_on_gpu(x, cotangent, size=len(kernel), interpret=True)
    return depthwise_conv_on_gpu(cotangent, kernel[::-1, ::-1], interpret=True), dkernel.astype(kernel.dtype)


gpu_kernels.defvjp(lambda x, kernel: (gpu_kernels(x, kernel), (x, kernel)), _backward)


@pytest.fixture
def small_kernels(monkeypatch):
    """Kernels of 3 × 3, because Pallas' interpreter compiles each of their positions."""
    monkeypatch.setattr(depthwise_kernels, 'SIZE', 3)


def test_correct_kernels_are_accepted(small_kernels):
    """Otherwise nobody can turn on a kernel that works."""
    outcomes = compare(gpu_kernels, SHAPE, rounds=1)
    assert [outcome.function for outcome in outcomes] == ['forward', 'input gradient', 'kernel gradient']
    assert all(outcome.correct for outcome in outcomes), outcomes


def test_a_wrong_kernel_is_reported(small_kernels):
    """A kernel that drops the last row of the image must not be recommended."""

    def dropped(x, kernel):
        return gpu_kernels(x.at[:, -1].set(0), kernel)

    outcomes = compare(dropped, SHAPE, rounds=1)
    assert not any(outcome.correct for outcome in outcomes)
    assert verdict('tpu', outcomes).startswith('wrong: 3 of 3 results differ')


@pytest.mark.parametrize(
    ('platform', 'ms', 'expected'),
    [
        ('tpu', 1.0, 'correct, 2.00 times as fast as XLA: turn the kernels on with --config.model.pallas=true'),
        ('tpu', 4.0, 'correct, but only 0.50 times as fast as XLA: do not use --config.model.pallas=true'),
        ('gpu', 1.0, 'correct, 2.00 times as fast as XLA. NVIDIA GPUs always use the kernels'),
    ],
)
def test_the_verdict_names_the_option(platform, ms, expected):
    """The first person with a TPU must know what to do with the result."""
    outcome = Outcome(SHAPE, 'forward', error=0.01, native_error=0.01, ms=ms, native_ms=2.0)
    assert verdict(platform, [outcome]).startswith(expected)


def test_without_an_accelerator_the_command_says_what_to_install():
    """On a CPU the comparison would say nothing about the kernels."""
    command = [sys.executable, '-m', 'benchmarks.depthwise', '--device']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={'JAX_PLATFORMS': 'cpu'}, check=False)
    assert done.returncode == 2
    assert 'error: JAX finds no GPU or TPU' in done.stderr
