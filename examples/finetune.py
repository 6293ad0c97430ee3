"""Fine-tunes a classifier in plain JAX, without the command line, and saves it for Hugging Face.

python examples/finetune.py facebook/convnextv2-atto-1k-224 tuned
"""

import io
import sys

import jax
import numpy as np
import optax
from PIL import Image

import convnext_jax as cx
from convnext_jax.data.sources import open_source
from convnext_jax.interop import read_pretrained
from convnext_jax.models import get_parameters, with_parameters


def finetune(
    weights: str, folder: str, images: int = 1024, epochs: int = 5, batch_size: int = 32, learning_rate: float = 1e-3
) -> float:
    """Trains on the bundled Fashion-MNIST images, and returns the accuracy on the first 200 test images."""
    train = open_source('fashion_mnist_mini', '', f'train[:{images}]')
    test = open_source('fashion_mnist_mini', '', 'test[:200]')
    # The weights may be in any supported layout. The head is newly initialised, because the classes are different.
    loaded = read_pretrained(weights, num_classes=len(train.class_names), key=jax.random.key(0), drop_path_rate=0.1)
    model, processor = loaded.model, loaded.processor or cx.ImageProcessor()

    steps = epochs * (images // batch_size)
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 10, steps)
    optimizer = optax.adamw(schedule, weight_decay=0.05)

    @jax.jit
    def step(parameters, state, pixels, labels, key):
        def loss(parameters):
            logits = with_parameters(model, parameters)(pixels, key=key)  # the key draws which blocks are dropped
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradient = jax.value_and_grad(loss)(parameters)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    def batch(source, indices):
        examples = [source[int(index)] for index in indices]
        pixels = processor([Image.open(io.BytesIO(example.image)) for example in examples])
        return pixels, np.asarray([example.label for example in examples])

    parameters = get_parameters(model)  # a flat dict: name → array
    state, key = optimizer.init(parameters), jax.random.key(1)
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(images)
        for indices in order[: images - images % batch_size].reshape(-1, batch_size):
            key, drop_key = jax.random.split(key)
            parameters, state, value = step(parameters, state, *batch(train, indices), drop_key)
        print(f'epoch {epoch + 1}  loss {value:.3f}')

    model = with_parameters(model, parameters)
    pixels, labels = batch(test, range(len(test)))
    accuracy = float((jax.jit(lambda model, x: model(x))(model, pixels).argmax(-1) == labels).mean())
    names = list(train.class_names)
    cx.save_pretrained(model, folder, class_names=names, processor=processor, licence=loaded.licence)
    return accuracy


if __name__ == '__main__':
    print(f'accuracy {finetune(*sys.argv[1:3]):.1%}')
