"""The small parts of a ConvNeXt: linear, patch convolution, LayerNorm, GRN, GELU, drop path.

Parameters are float32. Linear layers and convolutions compute in their `dtype`; norms compute in float32 and return
the type they were given.
"""

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

Tree = TypeVar('Tree')


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Weights of standard deviation 0.02, untruncated: the original cuts at ±2 absolute, which cuts nothing."""
    return 0.02 * jax.random.normal(key, shape, jnp.float32)


def apart_on_cpu(tree: Tree) -> Tree:
    """The same; on CPU the compiler does not merge the programs before and after it."""
    return jax.lax.platform_dependent(tree, cpu=jax.lax.optimization_barrier, default=lambda tree: tree)


CUT_AXIS = 'fsdp'
"""The axis of a mesh, inside `jax.shard_map`, along which kernels may be cut into pieces."""
INPUTS = -2
"""The axis of a kernel that `matmul` can gather: its input features. It is never the leading axis of stacked blocks,
which a scan walks, and shards along it fill whole rows of an accelerator's tiles."""


STATISTICS = 'norm statistics'
"""Name, for a policy of `jax.checkpoint`, of the means and standard deviations of norms: two numbers for each place."""


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x · kernel in x's dtype; the gradient of the kernel comes in its own, and sums over devices do not round.

    A kernel with fewer inputs than x is this device's piece of one that is cut along `CUT_AXIS`: it is gathered for
    the product and again for the gradient, and every device gets the sum of its piece's gradients.

    There is no forward-mode derivative.

    Args:
        x: (..., K).
        kernel: (..., in, out), of K = the product of all but `out` rows, or cut along `in`.
    """
    # On CPU the compiler would merge the norm before a product with it, into a program that is slower than the two.
    return _matmul(apart_on_cpu(x), kernel)


@jax.custom_vjp
def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ _whole(x, kernel)


def _whole(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The kernel as (K, out) of x's dtype."""
    kernel = kernel.astype(x.dtype)
    if _is_cut(x, kernel):
        kernel = jax.lax.all_gather(kernel, CUT_AXIS, axis=kernel.ndim - 2, tiled=True)
    return kernel.reshape(-1, kernel.shape[-1])


def _is_cut(x: jax.Array, kernel: jax.Array) -> bool:
    return kernel[..., 0].size < x.shape[-1]


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _matmul(x, kernel), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], error: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    native, on_cpu = (functools.partial(f, dtype=kernel.dtype) for f in (_sum_of_outer, _sum_of_outer_on_cpu))
    gradient = jax.lax.platform_dependent(x, error, cpu=on_cpu, default=native)
    *sides, _, out = kernel.shape
    gradient = gradient.reshape(*sides, -1, out)
    if _is_cut(x, kernel):
        gradient = jax.lax.psum_scatter(gradient, CUT_AXIS, scatter_dimension=kernel.ndim - 2, tiled=True)
    return error @ _whole(x, kernel).T, gradient


_matmul.defvjp(_forward, _backward)


def _sum_of_outer(x: jax.Array, error: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """(..., K), (..., out) → (K, out): the outer product at each place, summed over all places."""
    places = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, error, ((places, places), ((), ())), preferred_element_type=dtype)


def _sum_of_outer_on_cpu(x: jax.Array, error: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """As rows, or the compiler copies the transposes; the wider second; and many places as two halves, one for a core.

    A single product is shared out along its result, which for many places is small.
    """
    x, error = x.reshape(-1, x.shape[-1]), error.reshape(-1, error.shape[-1])
    if x.shape[1] > error.shape[1]:
        return _sum_of_outer_on_cpu(error, x, dtype=dtype).T
    places, widest = error.shape
    if places % 2 or places < 4 * widest:
        return _sum_of_outer(x, error, dtype=dtype)
    halves = (array.reshape(2, places // 2, -1) for array in (x, error))
    return jax.lax.dot_general(*halves, (((1,), (1,)), ((0,), (0,))), preferred_element_type=dtype).sum(0)


class Linear(nnx.Module):
    """y = x · kernel + bias over the last axis: (..., in_features) → (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, *, dtype: DTypeLike = jnp.float32, key: jax.Array):
        self.kernel = nnx.Param(normal(key, (in_features, out_features)), decays=True, fsdp_axis=INPUTS)
        self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32))
        self.dtype = dtype

    def __call__(self, x: jax.Array, *, scale: jax.Array | None = None) -> jax.Array:
        """`scale`, (out_features,), multiplies the result."""
        kernel, bias = self.kernel[...], self.bias
        if scale is not None:
            # By the weights, of which there are fewer, and nothing of the result is kept for the gradient of the scale.
            # The barrier: as a part of the product's own program it slows the product down on CPU.
            kernel, bias = jax.lax.optimization_barrier(kernel * scale), bias * scale
        return (matmul(x.astype(self.dtype), kernel) + bias).astype(self.dtype)


class PatchConv(nnx.Module):
    """A convolution whose stride is its kernel: (N, H, W, in) → (N, H // size, W // size, out).

    Written as reshape and matrix product, which every platform runs at full speed. Rows and columns beyond the last
    whole patch are left out, as a convolution without padding does.
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
        # A patch's row moves as one piece; the barrier keeps the reshape's indices out of the loop that copies.
        lines = apart_on_cpu(x.reshape(n, rows, size, columns, size * in_channels))
        patches = rearrange(lines, 'n rows y columns line -> n rows columns (y line)')
        return (matmul(patches, self.kernel[...]) + self.bias).astype(self.dtype)


class SameConv(nnx.Module):
    """A convolution of stride 1 padded with zeros to keep the sides: (N, H, W, in) → (N, H, W, out).

    Where the padding is odd, the larger half is below and to the right.
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
        return (_normalise(x, self.epsilon) * self.scale + self.bias).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _normalise(x: jax.Array, epsilon: float) -> jax.Array:
    """The last axis at mean 0 and variance 1, in float32.

    Its derivative is written out: the compiler's way from step to step takes two passes over x more.
    """
    return _normalise_forward(x, epsilon)[0]


def _normalise_forward(x: jax.Array, epsilon: float) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    mean = checkpoint_name(x.mean(-1, keepdims=True, dtype=jnp.float32), STATISTICS)
    centred = jnp.asarray(x, jnp.float32) - mean
    variance = jnp.square(centred).mean(-1, keepdims=True)
    inverse = checkpoint_name(jax.lax.rsqrt(variance + epsilon), STATISTICS)
    return centred * inverse, (x, mean, inverse)


def _normalise_backward(
    epsilon: float, saved: tuple[jax.Array, jax.Array, jax.Array], error: jax.Array
) -> tuple[jax.Array]:
    x, mean, inverse = saved
    y = (jnp.asarray(x, jnp.float32) - mean) * inverse
    # Or the sums of both are merged with what makes them, for which mean and scale are written out at every place.
    y, error = apart_on_cpu((y, error))
    gradient = error - error.mean(-1, keepdims=True) - y * (error * y).mean(-1, keepdims=True)
    return ((inverse * gradient).astype(x.dtype),)


_normalise.defvjp(_normalise_forward, _normalise_backward)


class GRN(nnx.Module):
    """Global response normalisation (arXiv:2301.00808, algorithm 1): (N, H, W, C) → (N, H, W, C).

    Each channel of each image is weighed by its norm over H and W against the mean norm of all channels.
    """

    def __init__(self, channels: int):
        self.gamma = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.beta = nnx.Param(jnp.zeros(channels, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = jnp.asarray(x, jnp.float32)
        squares = jnp.square(wide).sum((1, 2), keepdims=True)
        # The square root's derivative at zero is infinite: a dead channel takes a norm, and a gradient, of zero.
        alive = squares > 0
        norms = jnp.where(alive, jnp.sqrt(jnp.where(alive, squares, 1)), 0)
        weights = norms / (norms.mean(-1, keepdims=True) + 1e-6)
        return (self.gamma * (wide * weights) + self.beta + wide).astype(x.dtype)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x · Φ(x) in its exact form, by erf: cheaper than `jax.nn.gelu(approximate=False)`, which goes by erfc."""
    return x * _normal_cdf(x)


@gelu.defjvp
def _gelu_and_tangent(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The slope Φ(x) + x · φ(x) as it stands: JAX's derivative of erf computes an exponential in double words.

    Φ(x) is 1 − Φ(−x) here, or the compiler would compute the erf of both results by itself, and write it to memory.
    """
    (x,), (dx,) = primals, tangents
    density = jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5
    return gelu(x), dx * (1 - _normal_cdf(-x) + x * density)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)


def drop_path(x: jax.Array, rate: jax.Array | float, keys: jax.Array) -> jax.Array:
    """Drops the whole branch of an image with probability `rate`, and divides what is kept by 1 − rate.

    Args:
        x: (N, H, W, C), a block's branch before it is added to the input.
        rate: probability in [0, 1).
        keys: (N,), one key for each image, of this block alone.
    """
    keep = 1 - jnp.asarray(rate, jnp.float32)
    factors = jnp.where(jax.vmap(jax.random.uniform)(keys) < keep, 1 / keep, 0)
    return (x * factors[:, None, None, None]).astype(x.dtype)
