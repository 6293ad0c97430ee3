"""A small task for tests: predict the mean colour of an image, with weighted examples and a running statistic."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convnext_jax.data.dataset import Dataset
from convnext_jax.fields import Fields
from convnext_jax.models import ConvNeXt, Variant
from convnext_jax.models.layers import mean_over_devices
from convnext_jax.tasks import Evaluator, Headline, Loss, Measured, Task

VARIANT = Variant((1,), (8,), patch_size=4, layer_scale_init=0)
FEATURES = {'image': jax.ShapeDtypeStruct((16, 16, 3), np.float32), 'weight': jax.ShapeDtypeStruct((), np.float32)}


class Colours(Dataset):
    """Images of noise around a colour. Every fifth image has weight 0."""

    features, facts = FEATURES, {'noise': 'normal'}

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def load(self, index, draw=()):
        rng = np.random.default_rng(index)
        return {'image': rng.normal(rng.normal(), 1, (16, 16, 3)).astype(np.float32), 'weight': np.float32(index % 5)}

    def name(self, index):
        return f'colour {index}'


class Network(ConvNeXt):
    """Predicts the difference between the colour of an image and the running mean of earlier colours."""

    def __init__(self, key):
        super().__init__(VARIANT, key=key, num_classes=3, drop_path_rate=0.2)
        self.seen = nnx.BatchStat(jnp.zeros(3))

    def __call__(self, images, *, key=None):
        if key is not None:
            self.seen[...] = 0.9 * self.seen[...] + 0.1 * mean_over_devices(images.mean((0, 1, 2)))
        return super().__call__(images, key=key) + self.seen


class Errors(Evaluator):
    def measure(self, model, batch):
        errors = jnp.square(model(batch['image']) - batch['image'].mean((1, 2))).sum(-1)
        weight = batch['weight']
        return Measured({'loss': (errors * weight).sum(), 'weight': weight.sum()}, {'error': errors})

    def summary(self, measured):
        errors = measured.examples['error']
        loss = float(measured.sums['loss'] / measured.sums['weight'])
        return {'loss': loss, 'close': 100 * float(np.mean(errors < np.median(errors)))}


class MeanColour(Task):
    """Predicts the mean colour of an image. Examples have different weights, some of them 0."""

    headline = Headline('close', 'close', ' %')
    fields = Fields(lambda config: None)
    features, multiply_adds = FEATURES, 1000

    def open(self):
        return Colours(int(self.config.data.train_split)), Colours(int(self.config.data.eval_split))

    def open_split(self, name, split, facts):
        assert facts['noise'] == 'normal'
        return Colours(int(split))

    def build(self, key):
        return Network(key)

    def augment(self, batch, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (16, 16, 3)))(keys)
        return batch | {'image': batch['image'] + 0.1 * noise}

    def loss(self, model, batch, keys):
        errors = jnp.square(model(batch['image'], key=keys) - batch['image'].mean((1, 2))).sum(-1)
        weight = batch['weight']
        return Loss((errors * weight).sum(), weight.sum(), {'first': (errors * weight)[:1].sum()})

    def evaluator(self, dataset):
        return Errors()

    def figures(self, model, batch):
        colours = jnp.clip(128 + 50 * model(batch['image']), 0, 255).astype(jnp.uint8)
        return {'colours': jnp.broadcast_to(colours[:, None], (len(colours), 4, 3))}
