"""The Pallas kernel of the depthwise convolution for TPU in interpret mode, and the programs that contain it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from convnext_jax.models.depthwise import depthwise_conv
from convnext_jax.models.depthwise_tpu import depthwise_conv_on_tpu, fits


def native(x, kernel, dilation=1):
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None, :],
        window_strides=(1, 1),
        padding='SAME',
        rhs_dilation=(dilation, dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=x.shape[-1],
    )


def arrays(shape, size, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.standard_normal(sides), dtype) for sides in (shape, (size, size, shape[-1])))


@pytest.mark.parametrize(
    ('shape', 'size', 'dilation'),
    [
        ((8, 14, 14, 96), 7, 1),
        ((16, 7, 7, 256), 7, 1),  # two groups of images and two of channels; columns after the last group of four
        ((8, 3, 2, 40), 7, 1),  # smaller than the window
        ((8, 9, 5, 40), 5, 2),
        ((8, 4, 8, 384), 3, 1),
    ],
)
def test_the_kernel_equals_the_convolution(shape, size, dilation):
    """A kernel that reads the wrong column would train another network on TPUs."""
    x, kernel = arrays(shape, size)
    assert fits(x, size, dilation)
    ours = depthwise_conv_on_tpu(x, kernel, dilation=dilation, interpret=True)
    np.testing.assert_allclose(ours, native(x, kernel, dilation), rtol=1e-5, atol=2e-5)


def test_bfloat16_is_summed_in_float32():
    """Sums of 49 terms that are rounded at every step would have errors of several percent."""
    x, kernel = arrays((8, 6, 6, 128), 7, jnp.bfloat16)
    ours = depthwise_conv_on_tpu(x, kernel, dilation=1, interpret=True)
    assert ours.dtype == jnp.bfloat16
    exact = native(x.astype(jnp.float32), kernel.astype(jnp.float32))
    np.testing.assert_allclose(np.asarray(ours, np.float32), exact, rtol=2**-8, atol=1e-4)


def kernels_in_program(shape, platform='tpu', pallas=True):
    """The number of Pallas kernels in the program of the value and both gradients."""

    def loss(x, kernel):
        return jnp.sin(depthwise_conv(x, kernel, pallas=pallas)).sum()

    x, kernel = jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct((7, 7, shape[-1]), jnp.float32)
    program = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(x, kernel).lower(lowering_platforms=(platform,))
    return program.as_text().count('tpu_custom_call')


def test_the_kernel_is_used_on_request_for_supported_shapes():
    """The option would have no effect, or the program would not fit the memory of the chip."""
    assert kernels_in_program((8, 14, 14, 128)) == 2  # forward, and the gradient of x
    assert kernels_in_program((8, 14, 14, 128), pallas=False) == 0
    assert kernels_in_program((8, 14, 14, 128), platform='cpu') == 0
    assert kernels_in_program((8, 14, 14, 128), platform='cuda') == 0
    assert kernels_in_program((6, 14, 14, 128)) == 0  # six images
    assert kernels_in_program((8, 112, 112, 128)) == 0  # 165 MB of vector memory
    assert kernels_in_program((64, 56, 56, 96)) == 2  # ConvNeXt-T's first stage


def test_the_option_has_no_effect_on_other_platforms():
    """A config with `pallas=True` must give equal results on CPU."""
    x, kernel = arrays((8, 5, 5, 3), 7)
    np.testing.assert_array_equal(depthwise_conv(x, kernel, pallas=True), depthwise_conv(x, kernel))
