"""The depthwise convolution, with its gradient, in the formulation that is fastest where it runs.

On accelerators that is the compiler's own convolution. On CPU the compiler's depthwise convolution is very slow
(about 0.5 GFLOP/s, and its gradient slower), so there it is written as shifted multiply-adds over the padded image.
The platform is chosen when the program is lowered, not by a flag.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def depthwise_conv(x: jax.Array, kernel: jax.Array, *, dilation: int = 1) -> jax.Array:
    """Convolves each channel with its own square kernel, stride 1, zero padding that keeps H and W.

    Args:
        x: (N, H, W, C).
        kernel: (K, K, C) of x's dtype, K odd.
        dilation: distance of neighbouring kernel places in x.

    Returns:
        (N, H, W, C) of x's dtype.
    """
    cpu = functools.partial(_shifted, dilation)
    default = functools.partial(_native, dilation)
    return lax.platform_dependent(x, kernel, cpu=cpu, default=default)


def _native(dilation: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None, :],
        window_strides=(1, 1),
        padding='SAME',
        rhs_dilation=(dilation, dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=x.shape[-1],
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shifted(dilation: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """K·K shifted multiply-adds over the padded image, two kernel rows to a pass.

    The barriers keep the compiler from merging the passes: the weights and the window of one pass stay in the
    first-level cache.
    """
    size = kernel.shape[0]
    height, width = x.shape[1:3]
    padded, kernel = _pad(_wide(x), size // 2 * dilation), _wide(kernel)
    total = None
    for first in range(0, size, 2):
        for row in range(first, min(first + 2, size)):
            for column in range(size):
                top, left = row * dilation, column * dilation
                product = padded[:, top : top + height, left : left + width] * kernel[row, column]
                total = product if total is None else total + product
        if first + 2 < size:
            total = lax.optimization_barrier(total)
    return total.astype(x.dtype)


def _shifted_forward(dilation, x, kernel):
    return _shifted(dilation, x, kernel), (x, kernel)


def _shifted_backward(dilation, residuals, gradient):
    x, kernel = residuals
    return (
        _shifted(dilation, gradient, kernel[::-1, ::-1]),
        _kernel_gradient(x, gradient, kernel.shape[0], dilation),
    )


_shifted.defvjp(_shifted_forward, _shifted_backward)


def _kernel_gradient(x: jax.Array, gradient: jax.Array, size: int, dilation: int) -> jax.Array:
    """∂/∂kernel[r, c] = Σ over images and positions of x, shifted by (r, c), times the gradient.

    A scan over the rows of all images, with one accumulator (K, W, C) for each kernel column: small enough for the
    second-level cache, and updated by one fused multiply-add. The only reduction comes at the end.
    """
    n, height, width, channels = x.shape
    padded, gradient = _pad(_wide(x), size // 2 * dilation), _wide(gradient)
    reach = dilation * (size - 1) + 1

    def add_row(sums, step):
        image, row = step // height, step % height
        window = lax.dynamic_slice(padded, (image, row, 0, 0), (1, reach, padded.shape[2], channels))[0, ::dilation]
        errors = lax.dynamic_slice(gradient, (image, row, 0, 0), (1, 1, width, channels))[0]
        shifted = (window[:, column * dilation : column * dilation + width] for column in range(size))
        return tuple(total + part * errors for total, part in zip(sums, shifted, strict=True)), None

    zeros = (jnp.zeros((size, width, channels), padded.dtype),) * size
    sums, _ = lax.scan(add_row, zeros, jnp.arange(n * height))
    return jnp.stack([total.sum(1) for total in sums], axis=1).astype(x.dtype)


def _wide(x: jax.Array) -> jax.Array:
    """At least float32, so that sums do not round at every step."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _pad(x: jax.Array, margin: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
