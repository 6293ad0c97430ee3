"""ImageNet-1k from scratch at 224 pixels, V1 and V2, supervised.

    python train.py --config=configs/imagenet1k.py:tiny --config.data.dir=DATA --workdir=runs/tiny

After the colon: a V1 size ('tiny' … 'xlarge'), or any name of `python -m convnext_jax models`. DATA is a TFDS data
directory with imagenet2012 in ArrayRecord form. The hyperparameters are those of arXiv:2201.03545, table 5: 4,096
images to a step, 300 epochs. On fewer devices set config.accumulation_steps.

The published top-1 of T/S/B/L is 82.1/83.1/83.8/84.3 %. For the other sizes no such run is published.
"""

from ml_collections import ConfigDict

from convnext_jax.config import default_config
from convnext_jax.models import get_variant

DROP_PATH_RATES = {
    'convnext_small': 0.4,
    'convnext_base': 0.5,
    'convnext_large': 0.5,
    'convnext_xlarge': 0.5,
    'convnext_isotropic_base': 0.2,
    'convnext_isotropic_large': 0.5,
    'convnextv2_small': 0.4,
    'convnextv2_base': 0.5,
    'convnextv2_large': 0.5,
    'convnextv2_huge': 0.5,
}


def get_config(variant: str = 'tiny') -> ConfigDict:
    name = variant if variant.startswith('convnext') else f'convnext_{variant}'
    get_variant(name)  # an unknown name fails here, with the nearest ones
    config = default_config()
    config.model.name = name
    config.model.drop_path_rate = DROP_PATH_RATES.get(name, 0.1)
    if 'isotropic' in name:
        config.optimizer.warmup_epochs = 50.0
    config.model.dtype = 'bfloat16'
    return config
