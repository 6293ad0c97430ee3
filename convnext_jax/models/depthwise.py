"""The depthwise convolution and its derivatives, with a separate implementation for each platform.

- NVIDIA GPUs: the Pallas kernels of `depthwise_gpu`.
- TPU: the compiler's convolution, or with `pallas=True` the Pallas kernel of `depthwise_tpu`.
- CPU: shifted multiply-adds over the padded image, because the compiler's depthwise convolution reaches only about 0.5
  GFLOP/s and its gradient is slower still.
- Other platforms: the compiler's convolution.

JAX selects the implementation when it lowers the program for a platform.

The convolution and the gradient of its kernel are JAX primitives. Both are linear in each of their two arguments, and
the derivatives and the batching rule of each consist of these two primitives only. Therefore derivatives of any order
and `vmap` work.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from convnext_jax.models import depthwise_gpu
from convnext_jax.models.depthwise_tpu import depthwise_conv_on_tpu, fits
from convnext_jax.models.nvidia import has_kernels
from convnext_jax.models.parameters import AnyArray

# The convolution on CPU makes several passes over the image. The weights of a pass, 12 KiB in float32, must fit the L1
# cache of 32 KiB or more. A pass has at least MIN_POSITIONS kernel positions: with fewer, the additional passes would
# cost more time than the cache saves.
PASS_WEIGHTS, MIN_POSITIONS = 3072, 5
MAX_ROWS = 7  # rows per step of the kernel gradient on CPU


@functools.partial(jax.jit, static_argnames=('dilation', 'pallas'), inline=True)
def depthwise_conv(
    x: Float[Array, 'n h w c'], kernel: Float[AnyArray, 'k k c'], *, dilation: int = 1, pallas: bool = False
) -> Float[Array, 'n h w c']:
    """A convolution of each channel with its own square kernel: stride 1, zero padding that preserves H and W.

    Args:
        x: (N, H, W, C) float.
        kernel: (K, K, C) float, K odd. It is cast to x's dtype; its gradient has the kernel's own dtype.
        dilation: distance in pixels of x between neighbouring kernel positions.
        pallas: use the Pallas kernel on TPU for the shapes that it supports.

    Returns:
        (N, H, W, C) of x's dtype.
    """
    return conv_p.bind(x, kernel, dilation=dilation, pallas=pallas)


conv_p = Primitive('depthwise_conv')
"""x (N, H, W, C), kernel (K, K, C) → y (N, H, W, C) of x's dtype."""

kernel_gradient_p = Primitive('depthwise_kernel_gradient')
"""x and the cotangent of y, (N, H, W, C) each → the cotangent of the kernel, (K, K, C) of a given dtype: at (r, c) the
sum over N, H and W of the cotangent of y times x shifted by (r, c)."""


def _conv_native(
    x: Float[Array, 'n h w c'], kernel: Float[Array, 'k k c'], *, dilation: int, pallas: bool
) -> Float[Array, 'n h w c']:
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None, :].astype(x.dtype),
        window_strides=(1, 1),
        padding='SAME',
        rhs_dilation=(dilation, dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=x.shape[-1],
    )


def _kernel_gradient_native(
    x: Float[Array, 'n h w c'],
    cotangent: Float[Array, 'n h w c'],
    *,
    size: int,
    dilation: int,
    pallas: bool,
    dtype: DTypeLike,
) -> Float[Array, '{size} {size} c']:
    """A convolution of x with the cotangent as the kernel; the axes of images and channels are exchanged."""
    reach = size // 2 * dilation
    gradient = lax.conv_general_dilated(
        x,
        cotangent,
        window_strides=(dilation, dilation),
        padding=[(reach, reach)] * 2,
        dimension_numbers=('CHWN', 'IHWO', 'HWNC'),
        batch_group_count=x.shape[-1],
        preferred_element_type=jnp.promote_types(x.dtype, dtype),
    )
    return gradient[:, :, 0].astype(dtype)


def _conv_on_cpu(
    x: Float[Array, 'n h w c'], kernel: Float[Array, 'k k c'], *, dilation: int, pallas: bool
) -> Float[Array, 'n h w c']:
    """K · K shifted multiply-adds over the padded image, in passes of at most two kernel rows each.

    The barriers after the passes prevent their fusion with each other and with the norm that follows, so that the
    weights and the window of a pass stay in the L1 cache. The barrier on the kernel has an effect in a scan over
    stacked blocks: the block's kernel is sliced once, not once for each product.
    """
    size = kernel.shape[0]
    height, width = x.shape[1:3]
    padded, kernel = _pad(_wide(x), size // 2 * dilation), lax.optimization_barrier(_wide(kernel.astype(x.dtype)))
    positions = list(itertools.product(range(size), repeat=2))
    per_pass = min(max(PASS_WEIGHTS // max(x.shape[-1], 1), MIN_POSITIONS), 2 * size)
    total: Any = None
    for first in range(0, len(positions), per_pass):
        for row, column in positions[first : first + per_pass]:
            top, left = row * dilation, column * dilation
            product = padded[:, top : top + height, left : left + width] * kernel[row, column]
            total = product if total is None else total + product
        total = lax.optimization_barrier(total)
    return total.astype(x.dtype)


def _kernel_gradient_on_cpu(
    x: Float[Array, 'n h w c'],
    cotangent: Float[Array, 'n h w c'],
    *,
    size: int,
    dilation: int,
    pallas: bool,
    dtype: DTypeLike,
) -> Float[Array, '{size} {size} c']:
    """A scan over groups of rows of all images, with one accumulator, (W, K, C), for each kernel column.

    For images of 224 pixels the accumulators fit the L2 caches. A step adds to each accumulator one product for each
    row, in one fused loop that the compiler parallelises over W. The accumulators are reduced over W after the scan.
    """
    n, height, width, channels = x.shape
    padded, cotangent = _pad(_wide(x), size // 2 * dilation), _wide(cotangent)
    rows = max(rows for rows in range(1, MAX_ROWS + 1) if height % rows == 0)
    groups = height // rows
    reach = 1 + dilation * (size - 1)

    def add_rows(sums, step):
        image, first = step // groups, step % groups * rows
        # Each row has its own slice: JAX 0.10 compiles a slice with several uses as a call for each of its elements.
        for row in range(rows):
            start = (image, first + row, 0, 0)
            window = lax.dynamic_slice(padded, start, (1, reach, padded.shape[2], channels))[0, ::dilation]
            factor = lax.dynamic_slice(cotangent, start, (1, 1, width, channels))[0, 0, :, None]
            window = window.swapaxes(0, 1)
            shifted = (window[column * dilation : column * dilation + width] for column in range(size))
            sums = tuple(total + part * factor for total, part in zip(sums, shifted, strict=True))
        return sums, None

    sums = (jnp.zeros((width, size, channels), padded.dtype),) * size
    if x.size:
        sums, _ = lax.scan(add_rows, sums, jnp.arange(n * groups))
    return jnp.stack([total.sum(0) for total in sums], axis=1).astype(dtype)


def _wide(x: jax.Array) -> jax.Array:
    """x in at least float32, so that sums do not round at every step."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _pad(x: jax.Array, margin: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))


def _mirrored_conv(x: jax.Array, kernel: jax.Array, **options: object) -> jax.Array:
    return conv_p.bind(x, kernel[::-1, ::-1], **options)


def _batched_conv(arguments: tuple, dimensions: tuple, **options: object) -> tuple[jax.Array, int]:
    x, kernel = arguments
    if dimensions[1] is None:  # one kernel: merge the mapped axis into the images
        x = jnp.moveaxis(x, dimensions[0], 0)
        y = conv_p.bind(x.reshape(-1, *x.shape[2:]), kernel, **options)
        return y.reshape(x.shape), 0
    copies = kernel.shape[dimensions[1]]
    x, kernel = (_as_channels(*each, copies) for each in zip(arguments, dimensions, strict=True))
    y = conv_p.bind(x, kernel, **options)
    return y.reshape(*y.shape[:-1], copies, -1), y.ndim - 1


def _batched_kernel_gradient(arguments: tuple, dimensions: tuple, **options: object) -> tuple[jax.Array, int]:
    pairs = list(zip(arguments, dimensions, strict=True))
    (copies,) = {array.shape[dimension] for array, dimension in pairs if dimension is not None}
    y = kernel_gradient_p.bind(*(_as_channels(*pair, copies) for pair in pairs), **options)
    return y.reshape(*y.shape[:-1], copies, -1), y.ndim - 1


def _as_channels(x: jax.Array, dimension: int | None, copies: int) -> jax.Array:
    """x with its mapped axis `dimension` merged into the channels; None repeats x `copies` times."""
    if dimension is None:
        x = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], copies, x.shape[-1]))
    else:
        x = jnp.moveaxis(x, dimension, -2)
    return x.reshape(*x.shape[:-2], -1)


def _define(primitive: Primitive, result: Callable, on_cpu: Callable, native: Callable, batch: Callable) -> None:
    """Registers the abstract evaluation, the implementations and the batching rule of a primitive."""
    primitive.def_abstract_eval(result)
    primitive.def_impl(lambda *arguments, **options: _outside_jit(on_cpu, native)(*arguments, **options))
    mlir.register_lowering(primitive, mlir.lower_fun(native, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=False), platform='cpu')
    batching.primitive_batchers[primitive] = batch


def _outside_jit(on_cpu: Callable, native: Callable) -> Callable:
    return on_cpu if jax.default_backend() == 'cpu' else native


def _conv_on_tpu(
    x: Float[Array, 'n h w c'], kernel: Float[Array, 'k k c'], *, dilation: int, pallas: bool
) -> Float[Array, 'n h w c']:
    if pallas and fits(x, kernel.shape[0], dilation):
        return depthwise_conv_on_tpu(x, kernel, dilation=dilation)
    return _conv_native(x, kernel, dilation=dilation, pallas=pallas)


_define(conv_p, lambda x, kernel, dilation, pallas: x.update(), _conv_on_cpu, _conv_native, _batched_conv)
mlir.register_lowering(conv_p, mlir.lower_fun(_conv_on_tpu, multiple_results=False), platform='tpu')
_define(
    kernel_gradient_p,
    lambda x, cotangent, size, dilation, pallas, dtype: x.update(shape=(size, size, x.shape[-1]), dtype=dtype),
    _kernel_gradient_on_cpu,
    _kernel_gradient_native,
    _batched_kernel_gradient,
)


def _conv_on_gpu(
    x: Float[Array, 'n h w c'], kernel: Float[Array, 'k k c'], *, dilation: int, pallas: bool
) -> Float[Array, 'n h w c']:
    if has_kernels(x) and depthwise_gpu.fits(x, kernel.shape[0], dilation):
        return depthwise_gpu.depthwise_conv_on_gpu(x, kernel)
    return _conv_native(x, kernel, dilation=dilation, pallas=pallas)


def _kernel_gradient_on_gpu(
    x: Float[Array, 'n h w c'],
    cotangent: Float[Array, 'n h w c'],
    *,
    size: int,
    dilation: int,
    pallas: bool,
    dtype: DTypeLike,
) -> Float[Array, '{size} {size} c']:
    if has_kernels(x) and depthwise_gpu.fits(x, size, dilation):
        return depthwise_gpu.depthwise_kernel_gradient_on_gpu(x, cotangent, size=size).astype(dtype)
    return _kernel_gradient_native(x, cotangent, size=size, dilation=dilation, pallas=pallas, dtype=dtype)


for primitive, on_gpu in ((conv_p, _conv_on_gpu), (kernel_gradient_p, _kernel_gradient_on_gpu)):
    mlir.register_lowering(primitive, mlir.lower_fun(on_gpu, multiple_results=False), platform='cuda')
ad.defbilinear(
    conv_p,
    lambda y, x, kernel, **options: _mirrored_conv(y, kernel, **options),
    lambda y, x, kernel, **options: kernel_gradient_p.bind(
        x, y, size=kernel.aval.shape[0], dtype=kernel.aval.dtype, **options
    ),
)
ad.defbilinear(
    kernel_gradient_p,
    lambda kernel, x, cotangent, size, dtype, **options: _mirrored_conv(cotangent, kernel, **options),
    lambda kernel, x, cotangent, size, dtype, **options: conv_p.bind(x, kernel, **options),
)
