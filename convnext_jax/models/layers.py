"""The layers of a ConvNeXt: linear, patch convolution, LayerNorm, GRN, drop path.

Parameters are float32. Linear layers and convolutions compute in their `dtype`. Norms compute in float32 and return
the dtype of their input.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from convnext_jax.models import norm_gpu
from convnext_jax.models.nvidia import on_nvidia_gpu
from convnext_jax.models.parameters import AnyArray
from convnext_jax.models.response_norm import response_norm

Tree = TypeVar('Tree')


def normal(key: Key[Array, ''], shape: tuple[int, ...]) -> Float[Array, '...']:
    """An initial float32 kernel of standard deviation 0.02.

    The original repositories truncate the distribution at ±2 (100 standard deviations), which has no effect.
    """
    return 0.02 * jax.random.normal(key, shape, jnp.float32)


def fusion_barrier_on_cpu(tree: Tree) -> Tree:
    """Identity with a fusion barrier on CPU: the compiler does not fuse the operations before and after it."""
    return jax.lax.platform_dependent(tree, cpu=jax.lax.optimization_barrier, default=lambda tree: tree)


def conv_layout(x: Float[Array, 'n h w c']) -> Float[Array, 'n h w c']:
    """x unchanged. On TPU it is stored in the order H, W, N, C, in which the compiler computes depthwise convolutions.

    Without this constraint, the compiler stores the inputs and results of matrix products in the order N, H, W, C, and
    transposes them before and after each convolution. If N is not a multiple of 8, the compiler chooses the layout:
    this one would be padded along N, and the estimated cycles are higher (N = 1, 2, 12, 20 on v5e).
    """
    if not all(isinstance(size, int) for size in x.shape) or len(x) % 8:
        return x  # an exported program may have a symbolic batch size
    on_tpu = functools.partial(with_layout_constraint, layouts=Layout(major_to_minor=(1, 2, 0, 3)))
    return jax.lax.platform_dependent(x, tpu=on_tpu, default=lambda x: x)


FSDP_AXIS = 'fsdp'
"""Name of the mesh axis along which kernels may be sharded inside `jax.shard_map`."""
INPUT_AXIS = -2
"""The kernel axis along which `matmul` gathers shards: the input features. It is never the axis of a scan over stacked
blocks, and shards along it fill whole rows of an accelerator's tiles."""

MIN_CONV_CHANNELS = 16
"""Channels from which TPUs compute `patch_matmul` as a convolution: the compiler pads the channels to 128."""

STATISTICS = 'norm statistics'
"""Name of the norms' means and inverse standard deviations in policies of `jax.checkpoint`."""


def matmul(x: Float[Array, '*batch k'], kernel: Float[AnyArray, '_ out']) -> Float[Array, '*batch out']:
    """The matrix product x · kernel in x's dtype, with reverse-mode derivatives only.

    A kernel with fewer input features than x is this device's shard along `FSDP_AXIS`. It is all-gathered in the
    forward pass and again in the backward pass, and its gradient is reduce-scattered. The gradient of the kernel has
    the kernel's dtype, so that sums over devices lose no precision.

    Args:
        x: (..., K) float.
        kernel: (K, out) float, or a shard of this array along K.

    Returns:
        (..., out) of x's dtype.
    """
    # On CPU the compiler would fuse a preceding norm into the product, which is slower than two separate loops.
    return _matmul(fusion_barrier_on_cpu(x), kernel)


@jax.custom_vjp
def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ _gathered(kernel, x.shape[-1], x.dtype)


def _gathered(kernel: AnyArray, features: int, dtype: DTypeLike) -> jax.Array:
    """The unsharded kernel with `features` input features, (features, out) of `dtype`."""
    full = jnp.asarray(kernel, dtype)
    if _is_sharded(kernel, features):
        full = jax.lax.all_gather(full, FSDP_AXIS, axis=full.ndim - 2, tiled=True)
    return full.reshape(-1, full.shape[-1])


def _is_sharded(kernel: AnyArray, features: int) -> bool:
    return kernel[..., 0].size < features


def _scattered(gradient: jax.Array, kernel: jax.Array) -> jax.Array:
    """This device's shard of the gradient of an unsharded kernel, (features, out), in the shape of `kernel`."""
    *sides, _, out = kernel.shape
    shaped = gradient.reshape(*sides, -1, out)
    if _is_sharded(kernel, len(gradient)):
        shaped = jax.lax.psum_scatter(shaped, FSDP_AXIS, scatter_dimension=kernel.ndim - 2, tiled=True)
    return shaped


def _backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    native, on_cpu = (functools.partial(f, dtype=kernel.dtype) for f in (_sum_of_outer, _sum_of_outer_on_cpu))
    gradient = jax.lax.platform_dependent(x, cotangent, cpu=on_cpu, default=native)
    return cotangent @ _gathered(kernel, x.shape[-1], x.dtype).T, _scattered(gradient, kernel)


_matmul.defvjp(lambda x, kernel: (_matmul(x, kernel), (x, kernel)), _backward)


def _sum_of_outer(
    left: Float[Array, '*batch k'], right: Float[Array, '*batch out'], *, dtype: jnp.dtype
) -> Float[Array, 'k out']:
    """The sum over all positions of the outer product at each position: (..., K), (..., out) → (K, out)."""
    positions = tuple(range(left.ndim - 1))
    return jax.lax.dot_general(left, right, ((positions, positions), ((), ())), preferred_element_type=dtype)


def _sum_of_outer_on_cpu(
    left: Float[Array, '*batch k'], right: Float[Array, '*batch out'], *, dtype: jnp.dtype
) -> Float[Array, 'k out']:
    """`_sum_of_outer` in the form that is fastest on CPU.

    The operands are flattened to two axes, which avoids copies of their transposes, and the wider one comes second. A
    sum over many positions is computed in two halves so that two cores work: the compiler parallelises a product over
    the elements of its result only, and the result is small here.
    """
    left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    if left.shape[1] > right.shape[1]:
        return _sum_of_outer_on_cpu(right, left, dtype=dtype).T
    positions, widest = right.shape
    if positions % 2 or positions < 4 * widest:
        return _sum_of_outer(left, right, dtype=dtype)
    left, right = (array.reshape(2, positions // 2, -1) for array in (left, right))
    return jax.lax.dot_general(left, right, (((1,), (1,)), ((0,), (0,))), preferred_element_type=dtype).sum(0)


@jax.custom_vjp
def patch_matmul(x: Float[Array, 'n h w in'], kernel: Float[AnyArray, 'size size _ out']) -> Float[Array, 'n r c out']:
    """The matrix product of each patch, flattened, with the kernel: a convolution whose stride equals its kernel size.

    Kernels are sharded and gradients have dtypes as in `matmul`. TPUs compute it as a convolution, because there the
    rearrangement of x to patches takes more time than the product.

    Args:
        x: (N, H, W, in) float; H and W are multiples of `size`.
        kernel: (size, size, in, out) float, or a shard along `in`.

    Returns:
        (N, H // size, W // size, out) of x's dtype.
    """
    native, conv = (functools.partial(f, size=len(kernel)) for f in (_patch_product, _patch_conv))
    tpu = conv if x.shape[-1] >= MIN_CONV_CHANNELS else native
    return jax.lax.platform_dependent(x, _gathered_for_patches(kernel, x), tpu=tpu, default=native)


def _gathered_for_patches(kernel: AnyArray, x: jax.Array) -> jax.Array:
    return _gathered(kernel, len(kernel) ** 2 * x.shape[-1], x.dtype)


def _patch_matmul_backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    options = {'size': len(kernel), 'dtype': kernel.dtype}
    native, cpu = (
        functools.partial(_patch_product_gradients, sum_of_outer=f, **options)
        for f in (_sum_of_outer, _sum_of_outer_on_cpu)
    )
    tpu = functools.partial(_patch_conv_gradients, **options) if x.shape[-1] >= MIN_CONV_CHANNELS else native
    arguments = x, _gathered_for_patches(kernel, x), cotangent
    x_gradient, gradient = jax.lax.platform_dependent(*arguments, tpu=tpu, cpu=cpu, default=native)
    return x_gradient, _scattered(gradient, kernel)


patch_matmul.defvjp(lambda x, kernel: (patch_matmul(x, kernel), (x, kernel)), _patch_matmul_backward)


def _patches(x: Float[Array, 'n h w in'], *, size: int) -> Float[Array, 'n r c k']:
    n, height, width, channels = x.shape
    # With the barrier, the copy is contiguous in each row of a patch. Fused, it would compute an index per element.
    lines = fusion_barrier_on_cpu(x.reshape(n, height // size, size, width // size, size * channels))
    return fusion_barrier_on_cpu(rearrange(lines, 'n rows y columns line -> n rows columns (y line)'))


def _patch_product(
    x: Float[Array, 'n h w in'], kernel: Float[Array, 'k out'], *, size: int
) -> Float[Array, 'n r c out']:
    return _patches(x, size=size) @ kernel


def _patch_product_gradients(
    x: Float[Array, 'n h w in'],
    kernel: Float[Array, 'k out'],
    cotangent: Float[Array, 'n r c out'],
    *,
    size: int,
    dtype: DTypeLike,
    sum_of_outer: Callable,
) -> tuple[Float[Array, 'n h w in'], Float[Array, 'k out']]:
    patches, to_image = jax.vjp(functools.partial(_patches, size=size), x)
    (x_gradient,) = to_image(cotangent @ kernel.T)
    return x_gradient, sum_of_outer(patches, cotangent, dtype=dtype)


def _patch_conv(x: Float[Array, 'n h w in'], kernel: Float[Array, 'k out'], *, size: int) -> Float[Array, 'n r c out']:
    kernel = kernel.reshape(size, size, x.shape[-1], -1)
    return jax.lax.conv_general_dilated(x, kernel, (size, size), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def _patch_conv_gradients(
    x: Float[Array, 'n h w in'],
    kernel: Float[Array, 'k out'],
    cotangent: Float[Array, 'n r c out'],
    *,
    size: int,
    dtype: DTypeLike,
) -> tuple[Float[Array, 'n h w in'], Float[Array, 'k out']]:
    (x_gradient,) = jax.linear_transpose(lambda x: _patch_conv(x, kernel, size=size), x)(cotangent)
    patches = rearrange(x, 'n (r y) (c x) i -> n r y c x i', y=size, x=size)
    gradient = jnp.einsum('nrycxi,nrco->yxio', patches, cotangent, preferred_element_type=dtype)
    return x_gradient, gradient.reshape(kernel.shape)


class Linear(nnx.Module):
    """A linear layer over the last axis: (..., in_features) → (..., out_features) of `dtype`."""

    def __init__(self, in_features: int, out_features: int, *, dtype: DTypeLike = jnp.float32, key: Key[Array, '']):
        self.kernel = nnx.Param(normal(key, (in_features, out_features)), decays=True, fsdp_axis=INPUT_AXIS)
        self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32))
        self.dtype = dtype

    def product(self, x: Float[Array, '*batch in']) -> Float[Array, '*batch out']:
        """x · kernel without the bias: (..., in_features) → (..., out_features) of `dtype`."""
        return matmul(x.astype(self.dtype), self.kernel[...])

    def __call__(
        self, x: Float[Array, '*batch in'], *, scale: Float[AnyArray, ' out'] | None = None
    ) -> Float[Array, '*batch out']:
        """scale · (x · kernel + bias), with `scale` (out_features,) float32 or None for 1."""
        kernel, bias = self.kernel[...], self.bias[...]
        if scale is not None:
            # Scale the kernel, not the output: fewer multiplies, and no activation is saved for the scale's gradient.
            # The barrier prevents the fusion of the scaling with the product, which would be slower on CPU.
            kernel, bias = jax.lax.optimization_barrier(kernel * scale), bias * scale
        return (matmul(x.astype(self.dtype), kernel) + bias).astype(self.dtype)


class PatchConv(nnx.Module):
    """A convolution whose stride equals its kernel size: (N, H, W, in) → (N, H // size, W // size, out).

    Rows and columns after the last complete patch are ignored, as in a convolution without padding.
    """

    def __init__(
        self, in_channels: int, out_channels: int, size: int, *, dtype: DTypeLike = jnp.float32, key: Key[Array, '']
    ):
        shape = (size, size, in_channels, out_channels)
        self.kernel = nnx.Param(normal(key, shape), decays=True, fsdp_axis=INPUT_AXIS)
        self.bias = nnx.Param(jnp.zeros(out_channels, jnp.float32))
        self.dtype = dtype

    def __call__(self, x: Float[Array, 'n h w in']) -> Float[Array, 'n rows columns out']:
        height, width = (side - side % len(self.kernel) for side in x.shape[1:3])
        x = x[:, :height, :width].astype(self.dtype)
        return (patch_matmul(x, self.kernel[...]) + self.bias).astype(self.dtype)


class SameConv(nnx.Module):
    """A convolution of stride 1 with zero padding that preserves H and W: (N, H, W, in) → (N, H, W, out).

    If the total padding along an axis is odd, the bottom or right side gets the larger part.
    """

    def __init__(
        self, in_channels: int, out_channels: int, size: int, *, dilation: int, dtype: DTypeLike, key: Key[Array, '']
    ):
        self.kernel = nnx.Param(normal(key, (size, size, in_channels, out_channels)), decays=True)
        self.bias = nnx.Param(jnp.zeros(out_channels, jnp.float32))
        self.dilation = dilation
        self.dtype = dtype

    def __call__(self, x: Float[Array, 'n h w in']) -> Float[Array, 'n h w out']:
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel.astype(self.dtype),
            window_strides=(1, 1),
            padding='SAME',
            rhs_dilation=(self.dilation, self.dilation),
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )
        return (y + self.bias).astype(self.dtype)


class LayerNorm(nnx.Module):
    """Normalises the last axis to mean 0 and variance 1, then scales and shifts it: (..., C) → (..., C)."""

    def __init__(self, channels: int, *, epsilon: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, '*batch c']) -> Float[Array, '*batch c']:
        return _layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(
    x: Float[Array, '*batch c'], scale: Float[AnyArray, ' c'], bias: Float[AnyArray, ' c'], epsilon: float
) -> Float[Array, '*batch c']:
    """Layer norm over the last axis in float32: (..., C) → (..., C) of x's dtype.

    The derivative is hand-written: JAX's automatic one takes two more passes over x.
    """
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(
    x: jax.Array, scale: AnyArray, bias: AnyArray, epsilon: float
) -> tuple[jax.Array, tuple[AnyArray, ...]]:
    native, kernel = (functools.partial(f, epsilon=epsilon) for f in (_statistics, norm_gpu.statistics))
    mean, inverse = on_nvidia_gpu(kernel, native, x)
    mean, inverse = checkpoint_name(mean, STATISTICS), checkpoint_name(inverse, STATISTICS)
    y = (jnp.asarray(x, jnp.float32) - mean) * inverse
    return (y * scale + bias).astype(x.dtype), (x, mean, inverse, scale)


def _layer_norm_backward(epsilon: float, saved: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, ...]:
    return on_nvidia_gpu(norm_gpu.gradients, _gradients, *saved, cotangent)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _statistics(
    x: Float[Array, '*batch c'], *, epsilon: float
) -> tuple[Float[Array, '*batch 1'], Float[Array, '*batch 1']]:
    """Mean and 1 / standard deviation over the last axis: two arrays, (..., 1) float32."""
    mean = x.mean(-1, keepdims=True, dtype=jnp.float32)
    wide = jnp.asarray(x, jnp.float32)
    if x.dtype.itemsize < 4:
        # One pass over x. The error of the variance, a few mean² · 2⁻²⁴, is below the error from rounding x to 16 bits.
        variance = jnp.maximum(jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean), 0)
    else:
        variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    return mean, jax.lax.rsqrt(variance + epsilon)


def _gradients(
    x: Float[Array, '*batch c'],
    mean: Float[Array, '*batch 1'],
    inverse: Float[Array, '*batch 1'],
    scale: Float[AnyArray, ' c'],
    cotangent: Float[Array, '*batch c'],
) -> tuple[Float[Array, '*batch c'], Float[Array, ' c'], Float[Array, ' c']]:
    """The cotangents of x, (..., C) of x's dtype, and of scale and bias, (C,) float32."""
    y = (jnp.asarray(x, jnp.float32) - mean) * inverse
    cotangent = jnp.asarray(cotangent, jnp.float32)
    axes = tuple(range(x.ndim - 1))
    dscale, dbias = (cotangent * y).sum(axes), cotangent.sum(axes)
    # Without the barrier XLA fuses the means with the producers of their inputs and materialises the broadcast `mean`
    # and `inverse`.
    y, scaled = fusion_barrier_on_cpu((y, cotangent * scale))
    dx = inverse * (scaled - scaled.mean(-1, keepdims=True) - y * (scaled * y).mean(-1, keepdims=True))
    return dx.astype(x.dtype), dscale, dbias


def mean_over_devices(x: Float[Array, '*shape']) -> Float[Array, '*shape']:
    """The mean of x over all devices inside `jax.shard_map`; x itself elsewhere."""
    axes = device_axes()
    return jax.lax.pmean(x, axes) if axes else x


def device_axes() -> tuple[str, ...]:
    """Names of the mesh axes of the `jax.shard_map` that is being traced; () outside `jax.shard_map`."""
    return jax.sharding.get_abstract_mesh().manual_axes


class GRN(nnx.Module):
    """Global response normalisation as a layer, see `response_norm`: (N, H, W, C) → (N, H, W, C) of x's dtype."""

    def __init__(self, channels: int):
        self.gamma = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.beta = nnx.Param(jnp.zeros(channels, jnp.float32))

    def __call__(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n h w c']:
        return response_norm(x, self.gamma[...], self.beta[...])


def drop_path(
    x: Float[Array, 'n h w c'], rate: Float[Array, ''] | float, keys: Key[Array, ' n']
) -> Float[Array, 'n h w c']:
    """Stochastic depth (arXiv:1603.09382): an image of x is set to 0 with probability `rate`, else divided by 1 − rate.

    Args:
        x: (N, H, W, C) float, the residual branch of a block.
        rate: probability in [0, 1).
        keys: (N,) random keys, one for each image; no other block may use them.

    Returns:
        (N, H, W, C) of x's dtype.
    """
    keep = 1 - jnp.asarray(rate, jnp.float32)
    factors = jnp.where(jax.vmap(jax.random.uniform)(keys) < keep, 1 / keep, 0)
    return (x * factors[:, None, None, None]).astype(x.dtype)
