"""V1 on ImageNet-22k, from scratch at 224 pixels (arXiv:2201.03545, table 5).

    python train.py --config=configs/imagenet22k.py:base --config.data.dir=DIR --workdir=runs/base_22k

Variants, after the colon: tiny, small, base, large or xlarge. DIR holds train/SYNSET/*.JPEG of all 21,841 classes, and
val/SYNSET/*.JPEG with a few images of each class that you hold out. No top-1 is published for this stage: the paper
evaluates after fine-tuning on ImageNet-1k (configs/finetune.py).

Hardware: as for configs/imagenet1k.py. The run has about three times as many steps: 90 epochs instead of 300, of a data
set that is about ten times as large.
"""

from ml_collections import ConfigDict

from convnext_jax.configs.imagenet1k import get_config as imagenet1k
from convnext_jax.errors import UserError

DROP_PATH_RATES = {'tiny': 0.0, 'small': 0.0, 'base': 0.1, 'large': 0.1, 'xlarge': 0.2}


def get_config(variant: str = 'tiny') -> ConfigDict:
    if variant not in DROP_PATH_RATES:
        raise UserError(
            f"configs/imagenet22k.py has no variant '{variant}'; choose one of {', '.join(DROP_PATH_RATES)}"
        )
    config = imagenet1k(variant)
    config.epochs = 90.0
    config.model.drop_path_rate = DROP_PATH_RATES[variant]
    config.model.num_classes = 21841
    config.data.name = 'folder'
    config.data.eval_split = 'val'
    config.optimizer.warmup_epochs = 5.0
    config.ema.decay = 0.0
    return config
