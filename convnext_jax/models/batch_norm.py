"""Batch normalisation over the global batch of all devices."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from convnext_jax.errors import UserError
from convnext_jax.models.layers import device_axes, mean_over_devices
from convnext_jax.models.parameters import AnyArray


class BatchNorm(nnx.Module):
    """Normalises each channel over a batch, then scales and shifts it: (..., C) → (..., C).

    In training it uses the mean and variance of the batch. Inside `jax.shard_map` this is the global batch of all
    devices. Each training call also updates the running mean and variance, which inference uses. Results, `momentum`
    and `epsilon` agree with `torch.nn.SyncBatchNorm`.

    Args:
        channels: C.
        momentum: weight of the batch in the update of the running mean and variance.
        epsilon: value added to the variance before the square root.
    """

    def __init__(self, channels: int, *, momentum: float = 0.1, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(channels, jnp.float32))
        self.variance = nnx.BatchStat(jnp.ones(channels, jnp.float32))
        self.momentum = momentum
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, '*batch c'], *, training: bool) -> Float[Array, '*batch c']:
        """The normalised x.

        Args:
            x: (..., C) float.
            training: whether to normalise by the statistics of x and to update the running statistics.

        Returns:
            (..., C) of x's dtype; the statistics are computed in float32.

        Raises:
            UserError: in training, the global batch has only one value per channel, so the variance is undefined.
        """
        if not training:
            inverse = jax.lax.rsqrt(self.variance[...] + self.epsilon)
            return ((x - self.mean) * (inverse * self.scale) + self.bias).astype(x.dtype)
        values = math.prod(x.shape[:-1]) * math.prod(jax.lax.axis_size(axis) for axis in device_axes())
        if values == 1:
            raise UserError('BatchNorm needs more than one value per channel: increase batch_size')
        y, mean, variance = _batch_norm(x, self.scale[...], self.bias[...], self.epsilon)
        self._update(self.mean, mean)
        self._update(self.variance, variance * (values / (values - 1)))  # unbiased, as in PyTorch
        return y

    def _update(self, running: nnx.BatchStat, new: jax.Array) -> None:
        running[...] = (1 - self.momentum) * running[...] + self.momentum * jax.lax.stop_gradient(new)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _batch_norm(
    x: Float[Array, '*batch c'], scale: Float[AnyArray, ' c'], bias: Float[AnyArray, ' c'], epsilon: float
) -> tuple[Float[Array, '*batch c'], Float[Array, ' c'], Float[Array, ' c']]:
    """The normalised x, and the mean and the biased variance of the global batch.

    No gradient flows through mean and variance. The hand-written derivative needs one all-reduce. It saves x in x's
    dtype, and no other array of x's size.
    """
    return _batch_norm_forward(x, scale, bias, epsilon)[0]


def _batch_norm_forward(
    x: jax.Array, scale: AnyArray, bias: AnyArray, epsilon: float
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[AnyArray, ...]]:
    axes = tuple(range(x.ndim - 1))
    wide = jnp.asarray(x, jnp.float32)
    mean = mean_over_devices(wide.mean(axes))
    variance = mean_over_devices(jnp.square(wide - mean).mean(axes))
    inverse = jax.lax.rsqrt(variance + epsilon)
    y = ((wide - mean) * (inverse * scale) + bias).astype(x.dtype)
    return (y, mean, variance), (x, scale, mean, inverse)


def _batch_norm_backward(
    epsilon: float, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale, mean, inverse = saved
    axes = tuple(range(x.ndim - 1))
    cotangent = jnp.asarray(cotangents[0], jnp.float32)
    normalised = (jnp.asarray(x, jnp.float32) - mean) * inverse
    dbias, dscale = cotangent.sum(axes), (cotangent * normalised).sum(axes)  # sums over this device's examples
    count = math.prod(x.shape[:-1])
    mean_cotangent, mean_product = mean_over_devices(jnp.stack([dbias, dscale]) / count)
    dx = scale * inverse * (cotangent - mean_cotangent - normalised * mean_product)
    return dx.astype(x.dtype), dscale, dbias


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)
