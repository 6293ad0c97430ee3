"""Isotropic ConvNeXt, one resolution throughout, ImageNet-1k from scratch at 224 pixels (arXiv:2201.03545, table 2).

    python train.py --config=configs/isotropic.py:small --config.data.dir=DATA --workdir=runs/isotropic

After the colon: 'small', 'base' or 'large'. DATA is a TFDS data directory with imagenet2012 in ArrayRecord form.

Published top-1 of S/B/L: 78.7/82.0/82.6 %. Hardware as for configs/imagenet1k.py.
"""

from ml_collections import ConfigDict

from configs.imagenet1k import get_config as imagenet1k
from convnext_jax.errors import UserError

DROP_PATH_RATES = {'small': 0.1, 'base': 0.2, 'large': 0.5}


def get_config(variant: str = 'small') -> ConfigDict:
    if variant not in DROP_PATH_RATES:
        raise UserError(f'there is no configs/isotropic.py:{variant}: {", ".join(DROP_PATH_RATES)}')
    config = imagenet1k(f'convnext_isotropic_{variant}')
    config.model.drop_path_rate = DROP_PATH_RATES[variant]
    config.optimizer.warmup_epochs = 50.0
    return config
