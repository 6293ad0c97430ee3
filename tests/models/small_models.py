"""Small models whose parameters are all random, for the tests of the networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.models import Variant, create_model, get_parameters, with_parameters

DEPTHS = (3, 2)
V1 = Variant(DEPTHS, (8, 16), layer_scale_init=0.5)
V2 = Variant(DEPTHS, (8, 16), grn=True, layer_scale_init=0)
ISOTROPIC = Variant((2,), (8,), patch_size=8, layer_scale_init=0, stem_norm=False)


@functools.cache
def abstract_model(variant, **options):
    """A model with shapes instead of arrays, which is traced once for all tests."""
    return jax.eval_shape(lambda key: create_model(variant, key=key, **options), jax.random.key(0))


def build(variant, **options):
    """A small model whose parameters are all random, so that an omitted one changes the output."""
    model = abstract_model(variant, **{'num_classes': 5, 'drop_path_rate': 0.5, 'remat': 'none'} | options)
    rng = np.random.default_rng(0)
    parameters = {
        name: jnp.asarray(name.endswith('scale') + 0.3 * rng.standard_normal(leaf.shape), jnp.float32)
        for name, leaf in get_parameters(model).items()
    }
    return with_parameters(model, parameters)


call = jax.jit(lambda model, images, key=None: model(images, key=key))


def some_images():
    """A random batch, (16, 16, 16, 3) float32."""
    return jnp.asarray(np.random.default_rng(1).standard_normal((16, 16, 16, 3)), jnp.float32)
