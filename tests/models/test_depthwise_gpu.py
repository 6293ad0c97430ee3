"""The Pallas kernels of the depthwise convolution for NVIDIA GPUs in interpret mode, against the native convolution."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from convnext_jax.models.depthwise import depthwise_conv
from convnext_jax.models.depthwise_gpu import depthwise_conv_on_gpu, depthwise_kernel_gradient_on_gpu, fits


def native(x, kernel):
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None, :],
        window_strides=(1, 1),
        padding='SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=x.shape[-1],
    )


def arrays(shape, size, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.standard_normal(sides), dtype) for sides in (shape, shape, (size, size, shape[-1])))


@pytest.mark.parametrize(
    ('shape', 'size'),
    [
        ((2, 8, 8, 64), 3),  # a window of 7 takes five times as long to compile: only one case has it
        # Channels and columns that do not fill a strip; an odd number of rows.
        pytest.param((4, 7, 7, 40), 7, marks=pytest.mark.slow),
        ((3, 9, 11, 32), 3),  # an odd number of images; two strips of columns
        ((1, 3, 2, 130), 5),  # smaller than the window; channels that do not fill a program
    ],
)
def test_the_kernels_equal_the_convolution_and_its_gradient(shape, size):
    """A kernel that reads the wrong row would train another network on GPUs."""
    x, cotangent, kernel = arrays(shape, size)
    assert fits(x, size, 1)
    forward = jax.jit(functools.partial(depthwise_conv_on_gpu, interpret=True))
    np.testing.assert_allclose(forward(x, kernel), native(x, kernel), rtol=1e-5, atol=2e-5)
    gradient = jax.jit(functools.partial(depthwise_kernel_gradient_on_gpu, size=size, interpret=True))
    expected = jax.vjp(lambda kernel: native(x, kernel), kernel)[1](cotangent)[0]
    np.testing.assert_allclose(gradient(x, cotangent), expected, rtol=1e-5, atol=5e-5)


def test_bfloat16_is_summed_in_float32():
    """Sums that are rounded to bfloat16 at every step would have errors of one percent or more."""
    x, cotangent, kernel = arrays((2, 6, 6, 32), 3, jnp.bfloat16)
    wide = [array.astype(jnp.float32) for array in (x, cotangent, kernel)]
    ours = depthwise_conv_on_gpu(x, kernel, interpret=True)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ours, np.float32), native(wide[0], wide[2]), rtol=2**-8, atol=1e-4)
    gradient = depthwise_kernel_gradient_on_gpu(x, cotangent, size=3, interpret=True)
    expected = jax.vjp(lambda kernel: native(wide[0], kernel), wide[2])[1](wide[1])[0]
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=5e-5)


def kernels_in_program(shape, dilation=1, gpu='NVIDIA H100 80GB HBM3'):
    """The number of Pallas kernels in the program of the value and both gradients, lowered for a described GPU."""

    def loss(x, kernel):
        return jnp.sin(depthwise_conv(x, kernel, dilation=dilation)).sum()

    x, kernel = jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct((7, 7, shape[-1]), jnp.float32)
    device = jax.sharding.AbstractDevice(device_kind=gpu, num_cores=None, platform='gpu')
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(x, kernel).lower(lowering_platforms=('cuda',))
    return program.as_text().count('gpu$xla.gpu.triton')


def test_the_kernels_are_used_on_the_gpus_that_support_them():
    """Training would be several times slower, or on other GPUs the program would not compile."""
    assert kernels_in_program((8, 14, 14, 96)) == 3  # forward and both gradients
    assert kernels_in_program((8, 14, 14, 96), dilation=2) == 0
    assert kernels_in_program((8, 14, 14, 96), gpu='gfx942') == 0


@pytest.mark.slow
def test_the_package_works_without_the_triton_backend():
    """JAX plans to remove this backend: the package could no longer be imported."""
    program = """
import sys
sys.modules['jax.experimental.pallas.triton'] = None  # importing it raises ImportError
import jax, jax.numpy as jnp, convnext_jax as cx
print(cx.create_model('convnext_atto', key=jax.random.key(0), num_classes=3)(jnp.zeros((1, 32, 32, 3))).shape)
"""
    assert subprocess.check_output([sys.executable, '-c', program], text=True) == '(1, 3)\n'
