"""FCMAE pre-training of ConvNeXt V2 on ImageNet-1k without its labels (arXiv:2301.00808, appendix A).

    python train.py --config=configs/fcmae.py:atto --config.data.dir=DATA --workdir=runs/fcmae_atto
    python train.py --config=configs/v2_finetune.py:atto --config.data.dir=DATA \\
        --config.init.weights=runs/fcmae_atto --workdir=runs/atto

The variant after the colon is a size: atto, femto, pico, nano, tiny, base, large or huge. It trains for 1600 epochs, as
the published weights were. SIZE_800 trains for 800 epochs, the default of the original code.

To train on a folder of images: --config.data.name=folder --config.data.dir=PHOTOS. If the folder has no subfolders for
splits, add --config.data.train_split=images[:95%] --config.data.eval_split=images[95%:].

Compare the top-1 accuracy after fine-tuning with configs/v2_finetune.py. The recipes are meant for 16 to 64
accelerators.
"""

from ml_collections import ConfigDict

from convnext_jax.config import default_config
from convnext_jax.errors import UserError

SIZES = ('atto', 'femto', 'pico', 'nano', 'tiny', 'base', 'large', 'huge')
VARIANTS = (*SIZES, *(f'{size}_800' for size in SIZES))


def get_config(variant: str = 'atto') -> ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"configs/fcmae.py has no variant '{variant}'; choose one of {', '.join(VARIANTS)}")
    size, _, epochs = variant.partition('_')
    config = default_config('fcmae')
    config.model.name = f'convnextv2_{size}'
    config.model.dtype = 'bfloat16'
    config.epochs = float(epochs or 1600)
    config.batch_size = 4096
    config.optimizer.learning_rate = 1.5e-4
    config.optimizer.min_learning_rate = 0.0
    config.optimizer.warmup_epochs = 40.0
    config.optimizer.weight_decay = 0.05
    config.optimizer.beta2 = 0.95
    config.ema.decay = 0.0
    return config
