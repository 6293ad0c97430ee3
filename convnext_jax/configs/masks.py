"""UPerNet on your own images with masks, DIR/images/SPLIT/*.jpg and DIR/annotations/SPLIT/*.png.

    python train.py --config=configs/masks.py:tiny --config.data.dir=DIR --workdir=runs/mine \\
        --config.init.weights=timm/convnext_tiny.fb_in22k

The splits are called training and validation. For other folders than images and annotations, set config.data.image_dir
and config.data.mask_dir. The value of a pixel of a mask is the number of its class, from 0; 255 means no class. If 0
means no class and 1 is the first class, add --config.data.reduce_zero_label=True. DIR/classes.txt has one class name on
each line.

Variants, after the colon: a V1 size such as tiny, or any name listed by `python -m convnext_jax models`. The backbone
starts from config.init.weights: a hub id, a folder or file of a classifier or of a UPerNet, or a workdir, for example
of a run of configs/fcmae.py. Set config.epochs and config.batch_size according to the size of your data set.
"""

from ml_collections import ConfigDict

from convnext_jax.configs.ade20k import get_config as ade20k
from convnext_jax.models import get_variant


def get_config(variant: str = 'tiny') -> ConfigDict:
    name = variant if variant.startswith('convnext') else f'convnext_{variant}'
    get_variant(name)  # fails for an unknown name, and suggests similar ones
    config = ade20k('tiny')
    config.steps = 0
    config.epochs = 50.0
    config.batch_size = 8
    config.model.name = name
    config.model.drop_path_rate = 0.1
    config.init.weights = ''
    config.data.reduce_zero_label = False
    config.optimizer.warmup_steps = 0
    config.optimizer.warmup_epochs = 1.0
    config.ema.decay = 0.99
    config.log_every_steps = 10
    config.eval_every_steps = 0
    return config
