"""The annotated shapes and dtypes are checked while the tests run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from convnext_jax.data.augment import normalize
from convnext_jax.data.mixing import mix
from convnext_jax.data.selection import apply_to_selected
from convnext_jax.models.activation import gelu
from convnext_jax.models.activation_gpu import gelu_gradients
from convnext_jax.models.batch_norm import BatchNorm
from convnext_jax.models.depthwise import depthwise_conv
from convnext_jax.models.layers import LayerNorm, Linear, drop_path, matmul
from convnext_jax.models.masked import draw_patches
from convnext_jax.models.response_norm import response_norm
from convnext_jax.probing.features import pooled_features
from convnext_jax.probing.knn import knn_classes
from convnext_jax.probing.linear import linear_accuracies
from convnext_jax.tasks.accuracy import _smallest_losses
from convnext_jax.tasks.fcmae import masked_errors

IMAGES = jnp.zeros((2, 4, 4, 8))
FEATURES, LABELS = np.zeros((6, 8), np.float32), np.zeros(6, np.int32)
WRONG = {
    'data.augment': lambda: normalize(IMAGES[0], (0.5,), (0.5,)),
    'data.mixing': lambda: mix(IMAGES, jnp.zeros((3, 5)), jax.random.key(0), mixup=1.0, cutmix=0.0, mode='batch'),
    'data.selection': lambda: apply_to_selected(jnp.negative, jnp.ones(3, bool), IMAGES),
    'models.activation': lambda: gelu(IMAGES, jnp.zeros(4)),
    'models.activation_gpu': lambda: gelu_gradients(IMAGES, jnp.zeros(4), IMAGES),
    'models.batch_norm': lambda: BatchNorm(8)(IMAGES.astype(int), training=True),
    'models.depthwise': lambda: depthwise_conv(IMAGES, np.zeros((7, 7, 4), np.float32)),
    'models.layers: matmul': lambda: matmul(IMAGES.astype(int), jnp.zeros((8, 3))),
    'models.layers: norm': lambda: LayerNorm(4)(jnp.zeros((2, 8))),
    'models.layers: scale': lambda: Linear(8, 3, key=jax.random.key(0))(IMAGES, scale=jnp.ones((1, 3))),
    'models.layers: keys': lambda: drop_path(IMAGES, 0.5, jax.random.split(jax.random.key(0), 3)),
    'models.masked': lambda: draw_patches(jax.random.key(0), 2, 2, 1),
    'models.response_norm': lambda: response_norm(IMAGES, jnp.zeros(8), jnp.zeros(4)),
    'probing.features': lambda: pooled_features(None, IMAGES[0], norm=False),
    'probing.knn': lambda: knn_classes(FEATURES, LABELS[:5], FEATURES, neighbours=1),
    'probing.linear': lambda: linear_accuracies(FEATURES, LABELS, FEATURES[:4], LABELS, epochs=1),
    'tasks.accuracy': lambda: _smallest_losses(jnp.zeros((2, 5)), jnp.zeros((3, 1), int)),
    'tasks.fcmae': lambda: masked_errors(None, IMAGES[0], None),
}


@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_shape_is_an_error(name):
    """A module that was imported too early, or excluded, would no longer be checked, and nobody would notice."""
    with pytest.raises(TypeCheckError):
        WRONG[name]()
