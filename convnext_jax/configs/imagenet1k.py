"""ImageNet-1k from scratch at 224 pixels (arXiv:2201.03545, table 5).

    python train.py --config=configs/imagenet1k.py:tiny --config.data.dir=DATA --workdir=runs/tiny

Variants, after the colon: a V1 size (tiny to xlarge), or any name listed by `python -m convnext_jax models`. DATA is a
TFDS data directory with imagenet2012 in ArrayRecord format.

Published top-1 of T/S/B/L: 82.1/83.1/83.8/84.3 %. No results are published for the other sizes with this recipe.

Hardware: the batch has 4,096 images. 64 chips with 16 GB each are enough for T, B and L: `python -m convnext_jax plan`
gives 2.5 GiB for T, 5.5 GiB for B and 9.6 GiB for L with 64 images on a v5e (with model.pallas). 16 such chips are
enough for T. On fewer chips, raise config.accumulation_steps. The estimates also show that T, B and L do not need
mesh.fsdp, and that model.remat='dots' is the best choice: for T, 'none' needs about twice the memory and is slower.
"""

from ml_collections import ConfigDict

from convnext_jax.config import default_config
from convnext_jax.models import get_variant

DROP_PATH_RATES = {'small': 0.4, 'base': 0.5, 'large': 0.5, 'xlarge': 0.5, 'huge': 0.5}


def get_config(variant: str = 'tiny') -> ConfigDict:
    name = variant if variant.startswith('convnext') else f'convnext_{variant}'
    get_variant(name)  # fails for an unknown name, and suggests similar ones
    config = default_config()
    config.model.name = name
    config.model.drop_path_rate = DROP_PATH_RATES.get(name.split('_')[-1], 0.1)
    config.model.dtype = 'bfloat16'
    config.model.unroll = True  # faster on TPU and GPU than a loop over blocks, which compiles in half the time or less
    config.mix.mixup = 0.8
    config.mix.cutmix = 1.0
    return config
