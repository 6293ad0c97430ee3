"""ImageNet-1k from scratch at 224 pixels (arXiv:2201.03545, table 5).

    python train.py --config=configs/imagenet1k.py:tiny --config.data.dir=DATA --workdir=runs/tiny

After the colon: a V1 size ('tiny' … 'xlarge'), or any name of `python -m convnext_jax models`. DATA is a TFDS data
directory with imagenet2012 in ArrayRecord form.

Published top-1 of T/S/B/L: 82.1/83.1/83.8/84.3 %. For the other sizes no such run is published. Meant for accelerators
that hold 4,096 images at once between them. 64 chips of 16 GB do for T, B and L: by `python -m convnext_jax plan` 64
images take 3.6, 7.2 and 12.6 GiB of a v5e. For T 16 of them do. On fewer set config.accumulation_steps. That
model.remat is 'dots' and no mesh.fsdp is set follows from there as well: for T 'none' takes twice the memory and is
slower.
"""

from ml_collections import ConfigDict

from convnext_jax.config import default_config
from convnext_jax.models import get_variant

DROP_PATH_RATES = {'small': 0.4, 'base': 0.5, 'large': 0.5, 'xlarge': 0.5, 'huge': 0.5}


def get_config(variant: str = 'tiny') -> ConfigDict:
    name = variant if variant.startswith('convnext') else f'convnext_{variant}'
    get_variant(name)  # an unknown name fails here, with the nearest ones
    config = default_config()
    config.model.name = name
    config.model.drop_path_rate = DROP_PATH_RATES.get(name.split('_')[-1], 0.1)
    config.model.dtype = 'bfloat16'
    config.mix.mixup = 0.8
    config.mix.cutmix = 1.0
    return config
