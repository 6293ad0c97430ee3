"""Isotropic ConvNeXt (no downsampling) on ImageNet-1k, from scratch at 224 pixels (arXiv:2201.03545, table 2).

    python train.py --config=configs/isotropic.py:small --config.data.dir=DATA --workdir=runs/isotropic

Variants, after the colon: small, base or large. DATA is a TFDS data directory with imagenet2012 in ArrayRecord format.

Published top-1 of S/B/L: 78.7/82.0/82.6 %. Hardware: as for configs/imagenet1k.py.
"""

from ml_collections import ConfigDict

from convnext_jax.configs.imagenet1k import get_config as imagenet1k
from convnext_jax.errors import UserError

DROP_PATH_RATES = {'small': 0.1, 'base': 0.2, 'large': 0.5}


def get_config(variant: str = 'small') -> ConfigDict:
    if variant not in DROP_PATH_RATES:
        sizes = ', '.join(DROP_PATH_RATES)
        raise UserError(f"configs/isotropic.py has no variant '{variant}'; choose one of {sizes}")
    config = imagenet1k(f'convnext_isotropic_{variant}')
    config.model.drop_path_rate = DROP_PATH_RATES[variant]
    config.optimizer.warmup_epochs = 50.0
    return config
