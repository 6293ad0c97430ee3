"""The activation between a block's two linear layers: bias and GELU, followed in V2 by GRN.

Each function, except `gelu_tanh` and `silu`, has a hand-written derivative that saves only its inputs: recomputing the
other values is cheaper than reading them from memory. On NVIDIA GPUs these functions run as the Pallas kernels of
`activation_gpu`.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from convnext_jax.models import activation_gpu
from convnext_jax.models.normal import density_and_cdf, widened
from convnext_jax.models.nvidia import Result, on_nvidia_gpu
from convnext_jax.models.parameters import AnyArray
from convnext_jax.models.response_norm import response_norm


@jax.custom_vjp
def gelu(x: Float[Array, '*batch c'], bias: Float[AnyArray, ' c']) -> Float[Array, '*batch c']:
    """The GELU in its erf form: y · Φ(y) with y = x + bias, exact up to the rounding of x's dtype.

    Args:
        x: (..., C) float, without the bias.
        bias: (C,) float32.

    Returns:
        (..., C) of x's dtype.
    """
    y = widened(x) + bias
    return (y * density_and_cdf(y, x.dtype)[1]).astype(x.dtype)


def _gelu_gradients(
    x: Float[Array, '*batch c'], bias: Float[AnyArray, ' c'], cotangent: Float[Array, '*batch c']
) -> tuple[Float[Array, '*batch c'], Float[Array, ' c']]:
    y = widened(x) + bias
    # Φ(y) is computed as 1 − Φ(−y): otherwise XLA shares one erf with the forward pass and writes it to memory.
    density, upper_tail = density_and_cdf(-y, x.dtype)
    gradient = widened(cotangent) * (1 - upper_tail + y * density)
    return gradient.astype(x.dtype), gradient.sum(range(x.ndim - 1)).astype(bias.dtype)


def _gelu_backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _on_nvidia_gpu(activation_gpu.gelu_gradients, _gelu_gradients, *saved, cotangent)


def _on_nvidia_gpu(
    kernel: Callable[..., Result], native: Callable[..., Result], x: jax.Array, *others: AnyArray
) -> Result:
    """`on_nvidia_gpu` if x has 16 bits, else `native`: float32 needs erf, which the Triton backend lacks."""
    return on_nvidia_gpu(kernel, native, x, *others) if x.dtype.itemsize < 4 else native(x, *others)


gelu.defvjp(lambda *arguments: (gelu(*arguments), arguments), _gelu_backward)


@jax.custom_vjp
def gelu_and_response_norm(
    x: Float[Array, 'n h w c'], bias: Float[AnyArray, ' c'], gamma: Float[AnyArray, ' c'], beta: Float[AnyArray, ' c']
) -> Float[Array, 'n h w c']:
    """GELU followed by GRN: `response_norm(gelu(x, bias), gamma, beta)`.

    Args:
        x: (N, H, W, C) float, without the bias.
        bias, gamma, beta: (C,) float32.

    Returns:
        (N, H, W, C) of x's dtype.
    """
    return _on_nvidia_gpu(activation_gpu.gelu_and_response_norm, _gelu_and_response_norm, x, bias, gamma, beta)


def _gelu_and_response_norm(x: jax.Array, bias: AnyArray, gamma: AnyArray, beta: AnyArray) -> jax.Array:
    return response_norm(gelu(x, bias), gamma, beta)


def _gelu_and_response_norm_gradients(*saved_and_cotangent: jax.Array) -> tuple[jax.Array, ...]:
    *saved, cotangent = saved_and_cotangent
    return jax.vjp(_gelu_and_response_norm, *saved)[1](cotangent)


def _gelu_and_response_norm_backward(saved: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, ...]:
    kernel, native = activation_gpu.gelu_and_response_norm_gradients, _gelu_and_response_norm_gradients
    return _on_nvidia_gpu(kernel, native, *saved, cotangent)


gelu_and_response_norm.defvjp(
    lambda *arguments: (gelu_and_response_norm(*arguments), arguments), _gelu_and_response_norm_backward
)


def gelu_tanh(x: Float[Array, '*batch c'], bias: Float[AnyArray, ' c']) -> Float[Array, '*batch c']:
    """The approximation of the GELU by a tanh; arguments and result as for `gelu`."""
    return jax.nn.gelu(widened(x) + bias, approximate=True).astype(x.dtype)


def silu(x: Float[Array, '*batch c'], bias: Float[AnyArray, ' c']) -> Float[Array, '*batch c']:
    """y · sigmoid(y) with y = x + bias; arguments and result as for `gelu`."""
    return jax.nn.silu(widened(x) + bias).astype(x.dtype)


ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array, AnyArray], jax.Array]] = {
    'gelu': gelu,
    'gelu_tanh': gelu_tanh,
    'silu': silu,
}
"""Value of `Variant.activation` → function of x and bias."""
