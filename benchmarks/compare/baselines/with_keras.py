"""ConvNeXt from keras.applications on the JAX backend, run with Keras's public methods."""

import os

os.environ['KERAS_BACKEND'] = 'jax'  # Keras reads it when it is imported

import jax.numpy as jnp
import keras

from benchmarks.compare.baselines.on_jax import jax_device
from benchmarks.compare.baselines.workload import LEARNING_RATE, WEIGHT_DECAY, Baseline, Workload, example_batch

SIZES = {'tiny': 'Tiny', 'small': 'Small', 'base': 'Base', 'large': 'Large', 'xlarge': 'XLarge'}


def build(workload: Workload) -> Baseline:
    """Sets up the workload.

    Raises:
        ValueError: Keras has no such model.
    """
    version, size = workload.model.split('_', 1)
    if version != 'convnext' or size not in SIZES:
        raise ValueError(f'keras.applications has no {workload.model}')
    keras.config.set_dtype_policy('mixed_bfloat16' if workload.dtype == 'bfloat16' else 'float32')
    model = getattr(keras.applications, f'ConvNeXt{SIZES[size]}')(
        include_preprocessing=False,
        weights=None,
        input_shape=(workload.size, workload.size, 3),
        classes=workload.classes,
        classifier_activation=None,
    )
    images, labels = map(jnp.asarray, example_batch(workload))
    optimizer = keras.optimizers.AdamW(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    optimizer.exclude_from_weight_decay(var_list=[weight for weight in model.weights if len(weight.shape) <= 1])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    def step() -> object:  # both methods return NumPy values, so they wait for the result of every step
        return model.train_on_batch(images, labels) if workload.training else model.predict_on_batch(images)

    return Baseline(step, model.count_params(), jax_device())
