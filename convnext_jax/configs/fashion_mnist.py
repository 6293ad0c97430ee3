"""The demo: ConvNeXt V2 atto on 5,000 bundled Fashion-MNIST images; takes minutes on a laptop's CPU.

    python train.py --config=configs/fashion_mnist.py --workdir=runs/demo

The images have 28 × 28 pixels, so the stem uses 2 × 2 patches instead of 4 × 4.
"""

from ml_collections import ConfigDict

from convnext_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.epochs = 12
    config.batch_size = 64
    config.model.name = 'convnextv2_atto'
    config.model.patch_size = 2
    config.data.name = 'fashion_mnist_mini'
    config.data.eval_split = 'test'
    config.data.image_size = 28
    config.data.crop_scale = ()
    config.data.crop_pct = 1.0
    config.data.mean = (0.2860,)
    config.data.std = (0.3530,)
    config.augment.crop_padding = 1
    config.augment.policy = ''
    config.augment.erasing = 0.0
    config.optimizer.learning_rate = 1.2e-2
    config.optimizer.warmup_epochs = 1
    config.optimizer.beta2 = 0.95  # a shorter average than 0.999, because the run is short
    config.label_smoothing = 0.0
    config.ema.decay = 0.99
    config.log_every_steps = 20
    config.eval_every_epochs = 3
    config.checkpoint_every_steps = 200
    return config
