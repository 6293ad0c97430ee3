"""UPerNet on ADE20K (arXiv:2201.03545, table 7): semantic segmentation with 150 classes, in 160,000 steps.

    python train.py --config=configs/ade20k.py:tiny --config.data.dir=ADEChallengeData2016 --workdir=runs/ade_tiny
    python eval.py --config=configs/ade20k.py:tiny --config.data.dir=ADEChallengeData2016 \\
        --weights=openmmlab/upernet-convnext-tiny

Variants, after the colon: tiny, small and base from ImageNet-1k, with crops of 512 pixels; base_22k, large and xlarge
from ImageNet-22k, with crops of 640 pixels. The backbone starts from timm's weights; to start from other weights, give
--config.init.weights: a workdir, a folder or file of weights, or a hub id. data.dir is the unpacked
ADEChallengeData2016.zip.

Published mIoU (sliding windows, one scale): 46.0/48.7/49.1 % of T/S/B from ImageNet-1k, and 52.6/53.2/53.6 % of B/L/XL
from ImageNet-22k. The batch of 16 crops is meant for 8 accelerators. It cannot be accumulated, because BatchNorm
normalises over the whole batch. For T, `python -m convnext_jax plan` estimates 2.0 GiB for the 2 crops of a v5e chip.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from convnext_jax.config import default_config
from convnext_jax.errors import UserError


class Recipe(NamedTuple):
    """The hyperparameters that differ between sizes. `learning_rate` is the rate for the batch of 16 crops."""

    weights: str
    crop: int = 640
    drop_path_rate: float = 0.4
    learning_rate: float = 1e-4


RECIPES = {
    'tiny': Recipe('timm/convnext_tiny.fb_in1k', crop=512),
    'small': Recipe('timm/convnext_small.fb_in1k', crop=512, drop_path_rate=0.3),
    'base': Recipe('timm/convnext_base.fb_in1k', crop=512),
    'base_22k': Recipe('timm/convnext_base.fb_in22k'),
    'large': Recipe('timm/convnext_large.fb_in22k'),
    'xlarge': Recipe('timm/convnext_xlarge.fb_in22k', learning_rate=8e-5),
}


def get_config(variant: str = 'tiny') -> ConfigDict:
    if variant not in RECIPES:
        raise UserError(f"configs/ade20k.py has no variant '{variant}'; choose one of {', '.join(RECIPES)}")
    recipe = RECIPES[variant]
    config = default_config('segmentation')
    config.steps = 160_000
    config.batch_size = 16
    config.model.name = f'convnext_{variant.removesuffix("_22k")}'
    config.model.drop_path_rate = recipe.drop_path_rate
    config.model.dtype = 'bfloat16'
    config.init.weights = recipe.weights
    config.data.train_split = 'training'
    config.data.reduce_zero_label = True
    config.data.image_size = recipe.crop
    config.data.resize = (4 * recipe.crop, recipe.crop)
    config.optimizer.learning_rate = recipe.learning_rate * 256 / config.batch_size
    config.optimizer.min_learning_rate = 0.0
    config.optimizer.schedule = 'linear'
    config.optimizer.warmup_steps = 1500
    config.optimizer.layer_decay = 0.9
    config.optimizer.layer_decay_rule = 'stage'
    config.ema.decay = 0.0
    config.eval_every_steps = 16_000
    return config
