"""What lies between a block's two linear layers: bias and GELU, and in V2 the global response normalisation (GRN).

Each is one function with a derivative of its own that saves only the first layer's product: everything else is cheaper
to compute again than to read. On NVIDIA GPUs the passes over memory are laid out by hand, see `activation_gpu`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from convnext_jax.models import activation_gpu
from convnext_jax.models.activation_gpu import response_weights
from convnext_jax.models.normal import density_and_cdf, widened
from convnext_jax.models.nvidia import Result, on_nvidia_gpu


@jax.custom_vjp
def gelu(x: jax.Array, bias: jax.Array) -> jax.Array:
    """y · Φ(y) of y = x + bias, exact to the rounding of x's dtype.

    Args:
        x: (..., C).
        bias: (C,) float32.

    Returns:
        (..., C) of x's dtype.
    """
    y = widened(x) + bias
    return (y * density_and_cdf(y, x.dtype)[1]).astype(x.dtype)


def _gelu_gradients(x: jax.Array, bias: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = widened(x) + bias
    # Φ(y) as 1 − Φ(−y): otherwise XLA shares one erf with the GELU, computes it in a pass of its own and writes it.
    density, above = density_and_cdf(-y, x.dtype)
    gradient = widened(cotangent) * (1 - above + y * density)
    return gradient.astype(x.dtype), gradient.sum(range(x.ndim - 1)).astype(bias.dtype)


def _gelu_backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _on_nvidia_gpu(activation_gpu.gelu_gradients, _gelu_gradients, *saved, cotangent)


def _on_nvidia_gpu(
    kernel: Callable[..., Result], native: Callable[..., Result], x: jax.Array, *others: jax.Array
) -> Result:
    """As `on_nvidia_gpu`, for x of 16 bits: the Triton backend has no erf, which float32 needs."""
    return on_nvidia_gpu(kernel, native, x, *others) if x.dtype.itemsize < 4 else native(x, *others)


gelu.defvjp(lambda *arguments: (gelu(*arguments), arguments), _gelu_backward)


def response_norm(x: jax.Array, gamma: jax.Array, beta: jax.Array) -> jax.Array:
    """Global response normalisation (arXiv:2301.00808, algorithm 1): (N, H, W, C) → (N, H, W, C).

    Each channel of each image is weighed by its norm over H and W against the mean norm of all channels.

    Args:
        x: (N, H, W, C).
        gamma, beta: (C,) float32.
    """
    wide = widened(x)
    weights = response_weights(jnp.square(wide).sum((1, 2), keepdims=True))
    return (gamma * (wide * weights) + beta + wide).astype(x.dtype)


@jax.custom_vjp
def gelu_and_response_norm(x: jax.Array, bias: jax.Array, gamma: jax.Array, beta: jax.Array) -> jax.Array:
    """`response_norm` of `gelu`.

    Args:
        x: (N, H, W, C).
        bias, gamma, beta: (C,) float32.

    Returns:
        (N, H, W, C) of x's dtype.
    """
    return _on_nvidia_gpu(activation_gpu.gelu_and_response_norm, _gelu_and_response_norm, x, bias, gamma, beta)


def _gelu_and_response_norm(x: jax.Array, bias: jax.Array, gamma: jax.Array, beta: jax.Array) -> jax.Array:
    return response_norm(gelu(x, bias), gamma, beta)


def _gelu_and_response_norm_gradients(*saved_and_cotangent: jax.Array) -> tuple[jax.Array, ...]:
    *saved, cotangent = saved_and_cotangent
    return jax.vjp(_gelu_and_response_norm, *saved)[1](cotangent)


def _gelu_and_response_norm_backward(saved: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, ...]:
    on_gpu, native = activation_gpu.gelu_and_response_norm_gradients, _gelu_and_response_norm_gradients
    return _on_nvidia_gpu(on_gpu, native, *saved, cotangent)


gelu_and_response_norm.defvjp(
    lambda *arguments: (gelu_and_response_norm(*arguments), arguments), _gelu_and_response_norm_backward
)
