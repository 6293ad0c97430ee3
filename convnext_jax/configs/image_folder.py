"""Your own images, DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, from scratch or fine-tuned.

    python train.py --config=configs/image_folder.py:tiny --config.data.dir=DIR --workdir=runs/mine
    python train.py --config=configs/image_folder.py:tiny --config.data.dir=DIR --workdir=runs/tuned \\
        --config.init.weights=runs/mine --config.optimizer.learning_rate=1e-4

Variants, after the colon: a V1 size such as tiny, or any name listed by `python -m convnext_jax models`. Folder names
are class names. Fine-tuning copies the output of each class whose name the weights also have. Set config.epochs and
config.batch_size according to the size of your data set.
"""

from ml_collections import ConfigDict

from convnext_jax.config import default_config
from convnext_jax.models import get_variant


def get_config(variant: str = 'atto') -> ConfigDict:
    name = variant if variant.startswith('convnext') else f'convnext_{variant}'
    get_variant(name)  # fails for an unknown name, and suggests similar ones
    config = default_config()
    config.epochs = 50
    config.batch_size = 32
    config.model.name = name
    config.model.drop_path_rate = 0.1
    config.data.name = 'folder'
    config.data.eval_split = 'val'
    config.data.crop_scale = (0.35, 1.0)
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_epochs = 5
    config.ema.decay = 0.99
    config.log_every_steps = 10
    config.checkpoint_every_steps = 500
    return config
