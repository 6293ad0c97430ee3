"""Fine-tuning of V2 after FCMAE pre-training (arXiv:2301.00808, tables 12 to 15).

    python train.py --config=configs/v2_finetune.py:atto --config.data.dir=DATA \\
        --config.init.weights=convnextv2_atto_1k_224_fcmae.pt --workdir=runs/atto

Variants, after the colon:
- SIZE: ImageNet-1k at 224 pixels, from FCMAE weights. SIZE is atto, femto, pico, nano, tiny, base, large or huge.
- SIZE_22k: ImageNet-22k at 224 pixels, from FCMAE weights. SIZE is nano, tiny, base, large or huge, here and below.
  config.data.dir is a folder as in configs/imagenet22k.py.
- SIZE_22k_1k and SIZE_22k_1k_384: ImageNet-1k at 224 or 384 pixels, from SIZE_22k weights.
- huge_22k_1k_512: ImageNet-1k at 512 pixels, from huge_22k weights.

init.weights is a workdir, for example of configs/fcmae.py, a folder or file of weights, or a hub id such as
facebook/convnextv2-base-22k-224.

Published top-1 on ImageNet-1k:
- from FCMAE, at 224: A/F/P/N/T/B/L/H 76.7/78.5/80.3/81.9/83.0/84.9/85.8/86.3 %
- from 22k, at 224: N/T/B/L 82.1/83.9/86.8/87.3 %
- from 22k, at 384: N/T/B/L/H 83.4/85.1/87.7/88.2/88.7 %; at 512: H 88.9 %
Hardware: 16 to 64 accelerators.

The learning rate of huge is the one in the paper, but it may be a mistake there: it is higher than for all other sizes.
If the papers do not say whether layer decay applies to single blocks or to groups of blocks, this file uses single
blocks, the default of the original code.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from convnext_jax.config import default_config
from convnext_jax.errors import UserError


class Recipe(NamedTuple):
    """The hyperparameters that differ between sizes. `learning_rate` is the peak for a batch of 256 images."""

    batch_size: int
    learning_rate: float
    epochs: float
    warmup_epochs: float
    weight_decay: float
    drop_path_rate: float
    layer_decay: float
    layer_decay_rule: str = 'single'
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.1
    ema: float = 0.9999


TO_1K = {
    'atto': Recipe(1024, 2e-4, 600, 0, 0.3, 0.1, 0.9, label_smoothing=0.2),
    'femto': Recipe(1024, 2e-4, 600, 0, 0.05, 0.0, 0.9, mixup=0.3, cutmix=0.3, label_smoothing=0.2),
    'pico': Recipe(1024, 2e-4, 600, 0, 0.3, 0.0, 0.9, mixup=0.3, cutmix=0.3, label_smoothing=0.2),
    'nano': Recipe(1024, 2e-4, 600, 0, 0.3, 0.1, 0.9, mixup=0.5, cutmix=0.5, label_smoothing=0.2),
    'tiny': Recipe(1024, 8e-4, 300, 40, 0.05, 0.2, 0.9, mixup=0.8, cutmix=1.0),
    'base': Recipe(1024, 6.25e-4, 100, 20, 0.05, 0.1, 0.6, 'group', mixup=0.8, cutmix=1.0),
    'large': Recipe(1024, 6.25e-4, 100, 20, 0.05, 0.2, 0.6, 'group', mixup=0.8, cutmix=1.0),
    'huge': Recipe(1024, 1.25e-3, 50, 10, 0.05, 0.3, 0.75, mixup=0.8, cutmix=1.0),
}
TO_22K = {
    'nano': Recipe(4096, 2.5e-4, 90, 5, 0.05, 0.0, 0.9, mixup=0.8, cutmix=1.0, ema=0.0),
    'tiny': Recipe(4096, 2.5e-4, 90, 5, 0.05, 0.0, 0.9, mixup=0.8, cutmix=1.0, ema=0.0),
    'base': Recipe(4096, 2.5e-4, 90, 5, 0.05, 0.1, 0.8, mixup=0.8, cutmix=1.0, ema=0.0),
    'large': Recipe(4096, 2.5e-4, 90, 5, 0.05, 0.1, 0.8, mixup=0.8, cutmix=1.0, ema=0.0),
    'huge': Recipe(4096, 2.5e-4, 90, 5, 0.05, 0.3, 0.8, mixup=0.8, cutmix=1.0, ema=0.0),
}
FROM_22K_TO_1K = {
    'nano': Recipe(512, 2.5e-5, 90, 0, 1e-8, 0.1, 0.9),
    'tiny': Recipe(512, 2.5e-5, 90, 0, 1e-8, 0.1, 0.9),
    'base': Recipe(512, 2.5e-5, 30, 0, 1e-8, 0.2, 0.8),
    'large': Recipe(512, 2.5e-5, 30, 0, 1e-8, 0.3, 0.8),
    'huge': Recipe(512, 2.5e-5, 30, 0, 1e-8, 0.5, 0.85, ema=0.0),
}
RECIPES = {
    **TO_1K,
    **{f'{size}_22k': recipe for size, recipe in TO_22K.items()},
    **{f'{size}_22k_1k': recipe for size, recipe in FROM_22K_TO_1K.items()},
    **{f'{size}_22k_1k_384': recipe for size, recipe in FROM_22K_TO_1K.items()},
    'huge_22k_1k_512': FROM_22K_TO_1K['huge'],
}


def get_config(variant: str = 'atto') -> ConfigDict:
    if variant not in RECIPES:
        raise UserError(f"configs/v2_finetune.py has no variant '{variant}'; choose one of {', '.join(RECIPES)}")
    recipe, ending = RECIPES[variant], variant.split('_')[-1]
    config = default_config()
    config.epochs = float(recipe.epochs)
    config.batch_size = recipe.batch_size
    config.model.name = f'convnextv2_{variant.split("_")[0]}'
    config.model.drop_path_rate = recipe.drop_path_rate
    config.model.head_init_scale = 0.001
    config.model.dtype = 'bfloat16'
    config.data.image_size = int(ending) if ending.isdigit() else 224
    if ending == '22k':
        config.model.num_classes = 21841
        config.data.name = 'folder'
        config.data.eval_split = 'val'
    config.mix.mixup = recipe.mixup
    config.mix.cutmix = recipe.cutmix
    config.label_smoothing = recipe.label_smoothing
    config.optimizer.learning_rate = recipe.learning_rate
    config.optimizer.warmup_epochs = float(recipe.warmup_epochs)
    config.optimizer.weight_decay = recipe.weight_decay
    config.optimizer.layer_decay = recipe.layer_decay
    config.optimizer.layer_decay_rule = recipe.layer_decay_rule
    config.ema.decay = recipe.ema
    return config
