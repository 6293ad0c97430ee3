"""Keras's own ConvNeXt on its JAX backend, by the methods that its users call."""

import os

os.environ['KERAS_BACKEND'] = 'jax'  # Keras reads it when it is imported

import jax.numpy as jnp
import keras
from contender import LEARNING_RATE, WEIGHT_DECAY, Contender, Task, example_batch
from on_jax import device_kind, make_matmul

SIZES = {'tiny': 'Tiny', 'small': 'Small', 'base': 'Base', 'large': 'Large', 'xlarge': 'XLarge'}


def build(task: Task) -> Contender:
    """Sets it up.

    Raises:
        ValueError: Keras has no such model.
    """
    version, size = task.model.split('_', 1)
    if version != 'convnext' or size not in SIZES:
        raise ValueError(f'keras.applications has no {task.model}')
    keras.config.set_dtype_policy('mixed_bfloat16' if task.dtype == 'bfloat16' else 'float32')
    model = getattr(keras.applications, f'ConvNeXt{SIZES[size]}')(
        include_preprocessing=False,
        weights=None,
        input_shape=(task.size, task.size, 3),
        classes=task.classes,
        classifier_activation=None,
    )
    images, labels = map(jnp.asarray, example_batch(task))
    optimizer = keras.optimizers.AdamW(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    optimizer.exclude_from_weight_decay(var_list=[weight for weight in model.weights if len(weight.shape) <= 1])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    def step() -> None:
        if task.training:
            model.train_on_batch(images, labels)
        else:
            model.predict_on_batch(images)

    return Contender(step, make_matmul(task.dtype), model.count_params(), device_kind())
