"""The depthwise convolution on CPU against the compiler's convolution: values and derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.models.depthwise import _kernel_gradient_native as native_gradient
from convnext_jax.models.depthwise import depthwise_conv

CASES = [  # N, H, W, C, kernel size and optionally the dilation
    (2, 1, 1, 3, 7),
    (1, 2, 5, 4, 7),
    (3, 9, 6, 5, 7),
    (2, 7, 7, 8, 5),
    (2, 3, 8, 1, 5),
    (1, 4, 4, 6, 3),
    (2, 1, 6, 2, 3),
    (2, 9, 6, 3, 7, 2),
    (1, 5, 14, 2, 7, 4),
    (2, 6, 7, 4, 3, 3),
    (2, 11, 4, 3, 7),
    (1, 16, 5, 2, 7),
    (1, 3, 4, 400, 7),
    (1, 4, 3, 1600, 5, 2),
]


def native(x, kernel, *, dilation=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None, :],
        (1, 1),
        'SAME',
        rhs_dilation=(dilation, dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=x.shape[-1],
        precision='highest',
    )


def arrays(n, height, width, channels, size, dilation=1, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (n, height, width, channels), (size, size, channels), (n, height, width, channels)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@partial(jax.jit, static_argnums=(0, 4))
def value_and_gradients(conv, x, kernel, cotangent, dilation=1):
    y, pullback = jax.vjp(partial(conv, dilation=dilation), x, kernel)
    return (y, *pullback(cotangent.astype(y.dtype)))


@pytest.mark.parametrize('case', CASES, ids=str)
def test_equals_the_native_convolution(case):
    """A flipped kernel or wrong padding would change the logits of published weights or the gradients."""
    x, kernel, cotangent = arrays(*case)
    dilation = case[5] if len(case) > 5 else 1
    ours = value_and_gradients(depthwise_conv, x, kernel, cotangent, dilation)
    theirs = value_and_gradients(native, x, kernel, cotangent, dilation)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('case', CASES[:4:2], ids=str)
def test_bfloat16_rounds_once(case):
    """Sums of up to 49 terms that are rounded at every step would have errors of several percent.

    The tolerance is one rounding to bfloat16 (2⁻⁸ relative) of the exact sum of the bfloat16 inputs.
    """
    x, kernel, cotangent = (array.astype(jnp.bfloat16) for array in arrays(*case))
    ours = value_and_gradients(depthwise_conv, x, kernel, cotangent)
    exact = value_and_gradients(native, *(array.astype(jnp.float32) for array in (x, kernel, cotangent)))
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2**-8, atol=1e-4)


DERIVATIVES = {
    'value': lambda f: f,
    'gradient': lambda f: jax.grad(f, (0, 1)),
    'forward': lambda f: jax.jacfwd(f, (0, 1)),
    'hessian': lambda f: jax.hessian(f, (0, 1)),
    'twice backward': lambda f: jax.jacrev(jax.grad(f, (0, 1)), (0, 1)),
}


@pytest.mark.parametrize('case', [(2, 4, 3, 2, 7, 1), (1, 3, 5, 2, 3, 2), (2, 3, 2, 1, 5, 1)], ids=str)
@pytest.mark.parametrize('derivative', DERIVATIVES)
def test_derivatives_of_any_order_are_exact(derivative, case):
    """Second-order methods need exact second derivatives; float64 distinguishes a wrong term from rounding."""
    with jax.enable_x64(True):
        x, kernel, cotangent = arrays(*case, dtype=jnp.float64)

        def results(conv):
            def loss(x, kernel):
                return (jnp.sin(conv(x, kernel, dilation=case[5])) * cotangent).sum()

            return jax.tree.leaves(jax.jit(DERIVATIVES[derivative](loss))(x, kernel))

        for ours, theirs in zip(results(depthwise_conv), results(native), strict=True):
            assert ours.dtype == jnp.float64
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12 * np.abs(theirs).max())


@pytest.mark.parametrize('axes', [(0, None), (None, 0), (0, 0), (2, None), (None, 2), (3, 1)], ids=str)
def test_vmap_over_images_kernels_or_both(axes):
    """Ensembles and per-example gradients use `vmap` over either argument."""
    rng = np.random.default_rng(0)
    shapes = ((3, 2, 5, 4, 3), (3, 7, 7, 3))
    arrays = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    x, kernel = (a[0] if axis is None else jnp.moveaxis(a, 0, axis) for a, axis in zip(arrays, axes, strict=True))

    def results(conv):
        def value_and_grad(x, kernel):
            return jax.value_and_grad(lambda x, kernel: jnp.sin(conv(x, kernel)).sum(), (0, 1))(x, kernel)

        return jax.tree.leaves(jax.jit(jax.vmap(value_and_grad, axes))(x, kernel))

    for ours, theirs in zip(results(depthwise_conv), results(native), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_no_images_and_no_jit():
    """An empty batch must have a gradient of zero, and JAX_DISABLE_JIT=1 must work for debugging."""
    x, kernel, _ = arrays(2, 4, 4, 3, 7)
    gradients = jax.grad(lambda x, kernel: depthwise_conv(x, kernel).sum(), (0, 1))(x[:0], kernel)
    assert gradients[0].shape == (0, 4, 4, 3)
    assert depthwise_conv(x[..., :0], kernel[..., :0]).shape == (2, 4, 4, 0)
    np.testing.assert_array_equal(gradients[1], np.zeros((7, 7, 3)))
    with jax.disable_jit():
        np.testing.assert_allclose(depthwise_conv(x, kernel), native(x, kernel), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('case', CASES[:3] + CASES[-3:], ids=str)
def test_the_gradient_of_a_float32_kernel_is_not_rounded(case):
    """Gradients in bfloat16 would lose precision again in every sum over devices."""
    shape, dilation = case[:5], case[5] if len(case) > 5 else 1
    x, kernel, cotangent = arrays(*shape)
    rounded, cotangent = x.astype(jnp.bfloat16), cotangent.astype(jnp.bfloat16)
    y, _, gradient = value_and_gradients(depthwise_conv, rounded, kernel, cotangent, dilation)
    assert (y.dtype, gradient.dtype) == (jnp.bfloat16, jnp.float32)
    wide = (array.astype(jnp.float32) for array in (rounded, kernel, cotangent))
    exact = value_and_gradients(native, *wide, dilation)[2]
    np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-5)
    on_accelerators = native_gradient(
        rounded, cotangent, size=shape[4], dilation=dilation, pallas=False, dtype=jnp.float32
    )
    np.testing.assert_allclose(on_accelerators, exact, rtol=1e-5, atol=1e-5)


def test_under_vmap_and_scan():
    """Stages scan over stacked kernels, and users `vmap` over models: both must equal a Python loop."""
    x, _, cotangent = arrays(2, 5, 4, 3, 7)
    kernels = jnp.asarray(np.random.default_rng(1).standard_normal((3, 7, 7, 3)), jnp.float32) / 7

    def mapped(conv):
        def total(x, kernels):
            return (jax.vmap(conv, (None, 0))(x, kernels) * cotangent).sum()

        return total

    def scanned(conv):
        def total(x, kernels):
            return (jax.lax.scan(lambda x, kernel: (conv(x, kernel), None), x, kernels)[0] * cotangent).sum()

        return total

    def looped(x, kernels):
        for kernel in kernels:
            x = native(x, kernel)
        return (x * cotangent).sum()

    def compare(ours, theirs):
        ours, theirs = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x, kernels) for f in (ours, theirs))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)

    compare(mapped(depthwise_conv), mapped(native))
    compare(scanned(depthwise_conv), looped)


@pytest.mark.parametrize('platform', ['cpu', 'tpu', 'cuda'])
@pytest.mark.parametrize('types', [('float32', 'bfloat16'), ('bfloat16', 'float32'), ('float16', 'bfloat16')])
def test_every_pair_of_dtypes_can_be_lowered(types, platform):
    """A model with parameters cast to another dtype could be trained on CPU but not on an accelerator."""
    x, kernel, cotangent = arrays(1, 8, 8, 4, 7)
    program = jax.jit(lambda *args: value_and_gradients(depthwise_conv, *args))
    traced = program.trace(x.astype(types[0]), kernel.astype(types[1]), cotangent)
    assert [leaf.dtype for leaf in jax.tree.leaves(traced.out_info)] == [types[0], types[0], types[1]]
    traced.lower(lowering_platforms=(platform,))


def test_the_kernels_of_stacked_blocks_are_sliced_once():
    """With a slice for each of the 49 products, a training step on CPU would take a sixth longer."""
    x, _, _ = arrays(1, 8, 8, 4, 7)
    kernels = jnp.ones((3, 7, 7, 4))
    blocks = jax.jit(partial(jax.lax.scan, lambda x, kernel: (depthwise_conv(x, kernel), None)))
    with jax.default_device(jax.devices('cpu')[0]):
        program = blocks.lower(x, kernels).compile().as_text()
    assert 1 <= program.count(' dynamic-slice(') <= 2


def lowered(platform):
    x, kernel, cotangent = arrays(1, 8, 8, 4, 7)
    step = jax.jit(lambda *args: value_and_gradients(depthwise_conv, *args))
    return step.trace(x, kernel, cotangent).lower(lowering_platforms=(platform,)).as_text()


def test_the_program_has_no_convolution_on_cpu_only():
    """The compiler's convolution is up to 100 times slower on CPU; shifted multiply-adds are, on accelerators."""
    assert 'stablehlo.convolution' not in lowered('cpu')
    assert lowered('tpu').count('stablehlo.convolution') == 3  # the value and the two gradients
    assert lowered('cuda').count('stablehlo.convolution') == 3
