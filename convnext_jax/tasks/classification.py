"""Image classification: cross-entropy with smoothed labels, mixup and cutmix."""

import jax
import jax.numpy as jnp
import optax

from convnext_jax.data.augment import augment
from convnext_jax.data.mixing import mix
from convnext_jax.models import ConvNeXt
from convnext_jax.tasks.task import Batch, Headline, Loss, Task


class Classification(Task):
    """One label to an image.

    A batch holds `image` (N, H, W, C) uint8 and `label` (N,) int32; augmented, `image` is float and normalised, and
    `target` (N, classes) takes the label's place.
    """

    headline = Headline('top1', 'top-1', ' %')

    def augment(self, batch: Batch, keys: jax.Array, batch_key: jax.Array, epoch: jax.Array) -> Batch:
        """Augments each image by its key, and mixes images and targets until `config.mix.off_epoch`."""
        config = self.config
        images = augment(batch['image'], keys, mean=config.data.mean, std=config.data.std, **config.augment)
        one_hot = jax.nn.one_hot(batch['label'], config.model.num_classes)
        targets = optax.smooth_labels(one_hot, config.label_smoothing)
        if config.mix.mixup or config.mix.cutmix:
            images, targets = mix(
                images,
                targets,
                batch_key,
                mixup=config.mix.mixup,
                cutmix=config.mix.cutmix,
                mode=config.mix.mode,
                on=epoch < config.mix.off_epoch if config.mix.off_epoch else True,
            )
        return {'image': images, 'target': targets}

    def loss(self, model: ConvNeXt, batch: Batch, keys: jax.Array) -> Loss:
        """The cross-entropy of each example, with weight 1."""
        losses = optax.softmax_cross_entropy(model(batch['image'], key=keys), batch['target'])
        return Loss(losses.sum(), jnp.float32(losses.size))
