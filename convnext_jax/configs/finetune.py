"""Fine-tuning of V1 on ImageNet-1k (arXiv:2201.03545, table 6).

    python train.py --config=configs/finetune.py:base_22k_384 --config.data.dir=DATA \\
        --config.init.weights=runs/base_22k --workdir=runs/base_22k_384

Variants, after the colon:
- SIZE_22k and SIZE_22k_384: from weights trained with configs/imagenet22k.py, at 224 or 384 pixels. SIZE is tiny,
  small, base, large or xlarge.
- base_1k_384 and large_1k_384: from weights trained with configs/imagenet1k.py, at 384 pixels.

init.weights is a workdir, a folder or file of weights, or a hub id such as timm/convnext_base.fb_in22k. large_1k_384
starts from the moving average of the weights (init.params='ema'), all other variants from the raw weights.

Published top-1 of T/S/B/L/XL from 22k: 82.9/84.6/85.8/86.6/87.0 % at 224 pixels, 84.1/85.8/86.8/87.5/87.8 % at 384.
Published top-1 of B/L from 1k: 85.1/85.5 % at 384 pixels. The batch of 512 images needs 8 to 16 accelerators.
"""

from ml_collections import ConfigDict

from convnext_jax.config import default_config
from convnext_jax.errors import UserError

FROM_22K = {'tiny': 0.0, 'small': 0.1, 'base': 0.2, 'large': 0.3, 'xlarge': 0.4}  # size → drop path rate
FROM_1K = {'base': 0.8, 'large': 0.95}
VARIANTS = [
    *(f'{size}_22k' for size in FROM_22K),
    *(f'{size}_22k_384' for size in FROM_22K),
    *(f'{size}_1k_384' for size in FROM_1K),
]


def get_config(variant: str = 'tiny_22k') -> ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"configs/finetune.py has no variant '{variant}'; choose one of {', '.join(VARIANTS)}")
    size, source, *resolution = variant.split('_')
    config = default_config()
    config.epochs = 30.0
    config.batch_size = 512
    config.model.name = f'convnext_{size}'
    config.model.drop_path_rate = (FROM_22K if source == '22k' else FROM_1K)[size]
    config.model.head_init_scale = 0.001
    config.model.dtype = 'bfloat16'
    config.init.params = 'ema' if variant == 'large_1k_384' else 'raw'
    config.data.image_size = 384 if resolution else 224
    config.optimizer.learning_rate = 2.5e-5
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.weight_decay = 1e-8
    config.optimizer.layer_decay = 0.8 if source == '22k' else 0.7
    config.optimizer.layer_decay_rule = 'group'
    config.ema.decay = 0.9999 if size == 'xlarge' else 0.0
    return config
