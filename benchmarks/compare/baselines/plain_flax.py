"""ConvNeXt in plain Flax NNX, as a user would write it: nnx.Conv for the depthwise convolution, nnx.jit, no scan."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.compare.baselines.on_jax import jax_device
from benchmarks.compare.baselines.workload import LEARNING_RATE, WEIGHT_DECAY, Baseline, Workload, example_batch


class GRN(nnx.Module):
    def __init__(self, channels: int):
        self.gamma = nnx.Param(jnp.zeros(channels))
        self.beta = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        norms = jnp.linalg.norm(x.astype(jnp.float32), axis=(1, 2), keepdims=True)
        weights = norms / (norms.mean(-1, keepdims=True) + 1e-6)
        return (self.gamma * (x * weights) + self.beta + x).astype(x.dtype)


class Block(nnx.Module):
    def __init__(self, channels: int, *, grn: bool, layer_scale_init: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.depthwise = nnx.Conv(channels, channels, (7, 7), feature_group_count=channels, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(channels, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.pointwise1 = nnx.Linear(channels, 4 * channels, dtype=dtype, rngs=rngs)
        self.grn = GRN(4 * channels) if grn else None
        self.pointwise2 = nnx.Linear(4 * channels, channels, dtype=dtype, rngs=rngs)
        self.layer_scale = nnx.Param(jnp.full(channels, layer_scale_init)) if layer_scale_init else None

    def __call__(self, x: jax.Array) -> jax.Array:
        branch = jax.nn.gelu(self.pointwise1(self.norm(self.depthwise(x))), approximate=False)
        if self.grn is not None:
            branch = self.grn(branch)
        branch = self.pointwise2(branch)
        if self.layer_scale is not None:
            branch = branch * self.layer_scale.astype(branch.dtype)
        return x + branch


class ConvNeXt(nnx.Module):
    """(N, H, W, 3) float32 → (N, classes) float32."""

    def __init__(self, workload: Workload, rngs: nnx.Rngs):
        widths, patch, dtype = workload.variant['widths'], workload.variant['patch_size'], jnp.dtype(workload.dtype)

        def norm(channels: int) -> nnx.LayerNorm:
            return nnx.LayerNorm(channels, epsilon=1e-6, dtype=dtype, rngs=rngs)

        layers = [nnx.Conv(3, widths[0], (patch, patch), patch, padding='VALID', dtype=dtype, rngs=rngs)]
        if workload.variant['stem_norm']:
            layers.append(norm(widths[0]))
        for stage, (depth, width) in enumerate(zip(workload.variant['depths'], widths, strict=True)):
            if stage > 0:
                layers.append(norm(widths[stage - 1]))
                layers.append(nnx.Conv(widths[stage - 1], width, (2, 2), 2, padding='VALID', dtype=dtype, rngs=rngs))
            for _ in range(depth):
                scale = workload.variant['layer_scale_init']
                layers.append(Block(width, grn=workload.variant['grn'], layer_scale_init=scale, dtype=dtype, rngs=rngs))
        self.layers = nnx.List(layers)
        self.norm = nnx.LayerNorm(widths[-1], epsilon=1e-6, rngs=rngs)
        self.head = nnx.Linear(widths[-1], workload.classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x.mean((1, 2), dtype=jnp.float32)))


@nnx.jit
def forward(model: ConvNeXt, images: jax.Array) -> jax.Array:
    return model(images)


@nnx.jit
def train_step(model: ConvNeXt, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
    def loss(model: ConvNeXt) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


def build(workload: Workload) -> Baseline:
    """Sets up the workload."""
    model = ConvNeXt(workload, nnx.Rngs(0))
    images, labels = map(jnp.asarray, example_batch(workload))
    adamw = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY, mask=lambda tree: jax.tree.map(_decays, tree))
    optimizer = nnx.Optimizer(model, adamw, wrt=nnx.Param) if workload.training else None

    def step() -> jax.Array:
        return train_step(model, optimizer, images, labels) if optimizer else forward(model, images)

    parameters = sum(array.size for array in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return Baseline(step, parameters, jax_device())


def _decays(parameter: jax.Array) -> bool:
    return parameter.ndim > 1
