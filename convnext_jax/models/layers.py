"""The layers of a ConvNeXt: linear, patch convolution, LayerNorm, BatchNorm, GRN, drop path.

Parameters are float32. Linear layers and convolutions compute in their `dtype`; norms compute in float32 and return
the dtype of their input.
"""

import functools
import math
from typing import TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from convnext_jax.errors import UserError
from convnext_jax.models import norm_gpu
from convnext_jax.models.activation import response_norm
from convnext_jax.models.nvidia import on_nvidia_gpu

Tree = TypeVar('Tree')


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initial weights of standard deviation 0.02, untruncated: the originals truncate at ±2, which has no effect."""
    return 0.02 * jax.random.normal(key, shape, jnp.float32)


def apart_on_cpu(tree: Tree) -> Tree:
    """Identity that is a fusion barrier on CPU: the compiler does not merge what comes before it with what follows."""
    return jax.lax.platform_dependent(tree, cpu=jax.lax.optimization_barrier, default=lambda tree: tree)


FSDP_AXIS = 'fsdp'
"""The mesh axis along which kernels may be sharded, inside `jax.shard_map`."""
INPUTS = -2
"""The axis of a kernel along which `matmul` can gather shards: its input features. It is never the leading axis of
stacked blocks, over which a scan runs, and shards along it fill whole rows of an accelerator's tiles."""

STATISTICS = 'norm statistics'
"""Name, for policies of `jax.checkpoint`, of a norm's mean and inverse standard deviation at each position."""


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x · kernel in x's dtype. The kernel's gradient has the kernel's dtype, so that sums over devices lose no bits.

    A kernel with fewer input features than x is this device's shard along `FSDP_AXIS`. It is all-gathered in the
    forward pass and again in the backward pass, and its gradient is reduce-scattered.

    There is no forward-mode derivative.

    Args:
        x: (..., K).
        kernel: (..., in, out), where the product of all axes but `out` is K; or a shard of it along `in`.
    """
    # On CPU the compiler would fuse a preceding norm into the product, which is slower than the two separately.
    return _matmul(apart_on_cpu(x), kernel)


@jax.custom_vjp
def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ _gathered(x, kernel)


def _gathered(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The whole kernel as (K, out) in x's dtype."""
    kernel = kernel.astype(x.dtype)
    if _is_sharded(x, kernel):
        kernel = jax.lax.all_gather(kernel, FSDP_AXIS, axis=kernel.ndim - 2, tiled=True)
    return kernel.reshape(-1, kernel.shape[-1])


def _is_sharded(x: jax.Array, kernel: jax.Array) -> bool:
    return kernel[..., 0].size < x.shape[-1]


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _matmul(x, kernel), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    native, on_cpu = (functools.partial(f, dtype=kernel.dtype) for f in (_sum_of_outer, _sum_of_outer_on_cpu))
    gradient = jax.lax.platform_dependent(x, cotangent, cpu=on_cpu, default=native)
    *sides, _, out = kernel.shape
    gradient = gradient.reshape(*sides, -1, out)
    if _is_sharded(x, kernel):
        gradient = jax.lax.psum_scatter(gradient, FSDP_AXIS, scatter_dimension=kernel.ndim - 2, tiled=True)
    return cotangent @ _gathered(x, kernel).T, gradient


_matmul.defvjp(_forward, _backward)


def _sum_of_outer(left: jax.Array, right: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """(..., K), (..., out) → (K, out): the outer product at each position, summed over all positions."""
    positions = tuple(range(left.ndim - 1))
    return jax.lax.dot_general(left, right, ((positions, positions), ((), ())), preferred_element_type=dtype)


def _sum_of_outer_on_cpu(left: jax.Array, right: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """`_sum_of_outer` in the form that is fastest on CPU.

    The operands are flattened to two axes, or the compiler copies the transposes, and the wider one comes second. A
    sum over many positions is computed in two halves, for two cores: the compiler splits a single product along its
    result alone, which is small then.
    """
    left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    if left.shape[1] > right.shape[1]:
        return _sum_of_outer_on_cpu(right, left, dtype=dtype).T
    positions, widest = right.shape
    if positions % 2 or positions < 4 * widest:
        return _sum_of_outer(left, right, dtype=dtype)
    left, right = (array.reshape(2, positions // 2, -1) for array in (left, right))
    return jax.lax.dot_general(left, right, (((1,), (1,)), ((0,), (0,))), preferred_element_type=dtype).sum(0)


class Linear(nnx.Module):
    """y = x · kernel + bias over the last axis: (..., in_features) → (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, *, dtype: DTypeLike = jnp.float32, key: jax.Array):
        self.kernel = nnx.Param(normal(key, (in_features, out_features)), decays=True, fsdp_axis=INPUTS)
        self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32))
        self.dtype = dtype

    def product(self, x: jax.Array) -> jax.Array:
        """x · kernel, without the bias."""
        return matmul(x.astype(self.dtype), self.kernel[...])

    def __call__(self, x: jax.Array, *, scale: jax.Array | None = None) -> jax.Array:
        """`scale`, (out_features,), multiplies the result."""
        kernel, bias = self.kernel[...], self.bias[...]
        if scale is not None:
            # Scale the kernel, not the output: fewer multiplies, and no activation is saved for the scale's gradient.
            # The barrier keeps the scaling out of the product's program, which it would slow down on CPU.
            kernel, bias = jax.lax.optimization_barrier(kernel * scale), bias * scale
        return (matmul(x.astype(self.dtype), kernel) + bias).astype(self.dtype)


class PatchConv(nnx.Module):
    """A convolution whose stride equals its kernel size: (N, H, W, in) → (N, H // size, W // size, out).

    Written as a rearrangement and a matrix product, which every platform runs at full speed. Rows and columns beyond
    the last whole patch are ignored, as in a convolution without padding.
    """

    def __init__(
        self, in_channels: int, out_channels: int, size: int, *, dtype: DTypeLike = jnp.float32, key: jax.Array
    ):
        shape = (size, size, in_channels, out_channels)
        self.kernel = nnx.Param(normal(key, shape), decays=True, fsdp_axis=INPUTS)
        self.bias = nnx.Param(jnp.zeros(out_channels, jnp.float32))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        size = self.kernel.shape[0]
        n, height, width, in_channels = x.shape
        rows, columns = height // size, width // size
        x = x[:, : rows * size, : columns * size].astype(self.dtype)
        # Each line of a patch is copied as a whole; the barrier keeps the reshape's index arithmetic out of that loop.
        lines = apart_on_cpu(x.reshape(n, rows, size, columns, size * in_channels))
        patches = rearrange(lines, 'n rows y columns line -> n rows columns (y line)')
        return (matmul(patches, self.kernel[...]) + self.bias).astype(self.dtype)


class SameConv(nnx.Module):
    """A convolution of stride 1 with zero padding that keeps H and W: (N, H, W, in) → (N, H, W, out).

    If the total padding of a side is odd, the larger part is at the bottom and at the right.
    """

    def __init__(
        self, in_channels: int, out_channels: int, size: int, *, dilation: int, dtype: DTypeLike, key: jax.Array
    ):
        self.kernel = nnx.Param(normal(key, (size, size, in_channels, out_channels)), decays=True)
        self.bias = nnx.Param(jnp.zeros(out_channels, jnp.float32))
        self.dilation = dilation
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
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

    def __call__(self, x: jax.Array) -> jax.Array:
        return _layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Layer norm over the last axis, computed in float32.

    The derivative is written by hand: JAX's takes two more passes over x.
    """
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    native, on_gpu = (functools.partial(f, epsilon=epsilon) for f in (_statistics, norm_gpu.statistics))
    mean, inverse = on_nvidia_gpu(on_gpu, native, x)
    mean, inverse = checkpoint_name(mean, STATISTICS), checkpoint_name(inverse, STATISTICS)
    y = (jnp.asarray(x, jnp.float32) - mean) * inverse
    return (y * scale + bias).astype(x.dtype), (x, mean, inverse, scale)


def _layer_norm_backward(epsilon: float, saved: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, ...]:
    return on_nvidia_gpu(norm_gpu.gradients, _gradients, *saved, cotangent)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _statistics(x: jax.Array, *, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Mean and 1 / standard deviation over the last axis: (..., C) → two of (..., 1), float32."""
    mean = x.mean(-1, keepdims=True, dtype=jnp.float32)
    variance = jnp.square(jnp.asarray(x, jnp.float32) - mean).mean(-1, keepdims=True)
    return mean, jax.lax.rsqrt(variance + epsilon)


def _gradients(
    x: jax.Array, mean: jax.Array, inverse: jax.Array, scale: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The cotangents of x, scale and bias."""
    y = (jnp.asarray(x, jnp.float32) - mean) * inverse
    cotangent = jnp.asarray(cotangent, jnp.float32)
    examples = tuple(range(x.ndim - 1))
    scale_cotangent, bias_cotangent = (cotangent * y).sum(examples), cotangent.sum(examples)
    # Without the barrier XLA fuses the means with the producers of their inputs and materialises the broadcast `mean`
    # and `inverse`.
    y, scaled = apart_on_cpu((y, cotangent * scale))
    gradient = scaled - scaled.mean(-1, keepdims=True) - y * (scaled * y).mean(-1, keepdims=True)
    return (inverse * gradient).astype(x.dtype), scale_cotangent, bias_cotangent


class BatchNorm(nnx.Module):
    """Normalises each channel over a batch, then scales and shifts it: (..., C) → (..., C).

    In training the mean and variance are those of the batch: of the global batch, in a step that spreads it over
    devices by `jax.shard_map`. Each call in training also moves the running mean and variance, which inference uses.
    `torch.nn.SyncBatchNorm` computes the same, and its `momentum` and `epsilon` have the same meaning and defaults.

    Args:
        channels: C.
        momentum: the share of the batch in the new running mean and variance.
        epsilon: added to the variance.
    """

    def __init__(self, channels: int, *, momentum: float = 0.1, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(channels, jnp.float32))
        self.variance = nnx.BatchStat(jnp.ones(channels, jnp.float32))
        self.momentum = momentum
        self.epsilon = epsilon

    def __call__(self, x: jax.Array, *, training: bool) -> jax.Array:
        """Returns x's type; the statistics are computed in float32.

        Raises:
            UserError: in training, the batch has one value for each channel, whose variance is undefined.
        """
        if not training:
            inverse = jax.lax.rsqrt(self.variance[...] + self.epsilon)
            return ((x - self.mean) * (inverse * self.scale) + self.bias).astype(x.dtype)
        values = math.prod(x.shape[:-1]) * math.prod(jax.lax.axis_size(axis) for axis in _device_axes())
        if values == 1:
            raise UserError('BatchNorm needs more than one value for each channel: raise batch_size')
        y, mean, variance = _batch_norm(x, self.scale[...], self.bias[...], self.epsilon)
        self._update(self.mean, mean)
        self._update(self.variance, variance * (values / (values - 1)))  # the unbiased estimate, as in PyTorch
        return y

    def _update(self, running: nnx.BatchStat, new: jax.Array) -> None:
        running[...] = (1 - self.momentum) * running[...] + self.momentum * jax.lax.stop_gradient(new)


def mean_over_devices(x: jax.Array) -> jax.Array:
    """The mean of the values of all devices inside `jax.shard_map`, where each has its own; elsewhere x itself."""
    axes = _device_axes()
    return jax.lax.pmean(x, axes) if axes else x


def _device_axes() -> tuple[str, ...]:
    """The axes of the mesh of the `jax.shard_map` that is being traced; () outside of any."""
    return jax.sharding.get_abstract_mesh().manual_axes


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The normalised x, and the mean and (biased) variance of the global batch, which are constants to the gradient.

    Its derivative is written out: it keeps x in its own type and nothing else of x's size, and takes one all-reduce.
    """
    return _batch_norm_forward(x, scale, bias, epsilon)[0]


def _batch_norm_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]:
    axes = tuple(range(x.ndim - 1))
    wide = jnp.asarray(x, jnp.float32)
    mean = mean_over_devices(wide.mean(axes))
    variance = mean_over_devices(jnp.square(wide - mean).mean(axes))
    inverse = jax.lax.rsqrt(variance + epsilon)
    y = ((wide - mean) * (inverse * scale) + bias).astype(x.dtype)
    return (y, mean, variance), (x, scale, mean, inverse)


def _batch_norm_backward(
    epsilon: float, saved: tuple[jax.Array, ...], errors: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale, mean, inverse = saved
    axes = tuple(range(x.ndim - 1))
    error = jnp.asarray(errors[0], jnp.float32)
    normalised = (jnp.asarray(x, jnp.float32) - mean) * inverse
    of_bias, of_scale = error.sum(axes), (error * normalised).sum(axes)  # over this device's examples
    count = math.prod(x.shape[:-1])
    mean_error, mean_product = mean_over_devices(jnp.stack([of_bias, of_scale]) / count)
    of_x = scale * inverse * (error - mean_error - normalised * mean_product)
    return of_x.astype(x.dtype), of_scale, of_bias


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


class GRN(nnx.Module):
    """Global response normalisation (arXiv:2301.00808, algorithm 1): (N, H, W, C) → (N, H, W, C).

    Each channel of each image is scaled by its norm over H and W, relative to the mean norm of all channels.
    """

    def __init__(self, channels: int):
        self.gamma = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.beta = nnx.Param(jnp.zeros(channels, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return response_norm(x, self.gamma[...], self.beta[...])


def drop_path(x: jax.Array, rate: jax.Array | float, keys: jax.Array) -> jax.Array:
    """Drops the whole branch of an image with probability `rate`; the branches that stay are divided by 1 − rate.

    Args:
        x: (N, H, W, C), a block's branch before it is added to the input.
        rate: probability in [0, 1).
        keys: (N,), one key for each image, which no other block uses.
    """
    keep = 1 - jnp.asarray(rate, jnp.float32)
    factors = jnp.where(jax.vmap(jax.random.uniform)(keys) < keep, 1 / keep, 0)
    return (x * factors[:, None, None, None]).astype(x.dtype)
