"""V1 fine-tuned on ImageNet-1k (arXiv:2201.03545, table 6).

    python train.py --config=configs/finetune.py:base_22k_384 --config.data.dir=DATA \\
        --config.init.weights=runs/base_22k --workdir=runs/base_22k_384

After the colon: SIZE_22k or SIZE_22k_384 from weights of configs/imagenet22k.py at 224 or 384 pixels, SIZE one of tiny,
small, base, large, xlarge; or base_1k_384 and large_1k_384 from configs/imagenet1k.py. The weights may be anybody's:
a workdir, a folder or file, a hub id such as timm/convnext_base.fb_in22k. All start from raw weights but large_1k_384,
which starts from the average.

Published top-1: 22k T/S/B/L/XL 82.9/84.6/85.8/86.6/87.0 % at 224, 84.1/85.8/86.8/87.5/87.8 % at 384; 1k at 384 B/L
85.1/85.5 %. Meant for accelerators that hold 512 images of the size between them, 8 to 16 of them.
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
        raise UserError(f'there is no configs/finetune.py:{variant}: {", ".join(VARIANTS)}')
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
