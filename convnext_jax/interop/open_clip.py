"""The image tower of an OpenCLIP model as a ConvNeXt of timm whose head is the projection."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from convnext_jax.errors import UserError
from convnext_jax.interop.files import Tensors, printable
from convnext_jax.models import ConvNeXt
from convnext_jax.models.parameters import AnyArray

TOWER = 'visual.'
TRUNK = 'visual.trunk.'
PROJECTION = {
    'visual.head.proj.weight': 'head.fc.weight',
    'visual.head.mlp.fc1.weight': 'head.pre_logits.fc.weight',
    'visual.head.mlp.fc1.bias': 'head.pre_logits.fc.bias',
    'visual.head.mlp.fc2.weight': 'head.fc.weight',
}
"""Name of a tensor of a linear or MLP projection in OpenCLIP → name in timm. Its last layer has no bias."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of the images in the training of CLIP."""
SIZE = 256
"""Side of the images if a file does not state it; most of the published towers use it."""


def image_embedding(model: ConvNeXt, images: Float[AnyArray, 'n h w c']) -> Float[Array, 'n channels']:
    """The embeddings of images, of length 1, from an image tower: (N, channels) float32.

    They are equal to OpenCLIP's `encode_image(images, normalize=True)`.
    """
    x = model(images)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def image_tower(tensors: Tensors, where: str) -> tuple[Tensors, list[str]] | None:
    """The image tower in timm's layout, and messages for the user; None for tensors of another model.

    Args:
        tensors: name → tensor, without prefixes of wrappers. The text tower is dropped.
        where: the file, for error messages.

    Raises:
        UserError: the image tower is not a ConvNeXt with one of the two projections.
    """
    if not any(name.startswith(TRUNK) for name in tensors):
        return None
    tower: dict[str, Any] = {}
    text = []
    for name, x in tensors.items():
        if name.startswith(TRUNK):
            tower[name.removeprefix(TRUNK)] = x
        elif name in PROJECTION:
            tower[PROJECTION[name]] = x
        elif name.startswith(TOWER):
            raise UserError(f'{where}: {printable(name)} is not part of a linear or MLP projection')
        else:
            text.append(name)
    if 'stem.0.weight' not in tower:
        raise UserError(f'{where}: the image tower of this OpenCLIP model is not a ConvNeXt')
    if 'head.fc.weight' in tower:
        tower['head.fc.bias'] = np.zeros(tower['head.fc.weight'].shape[0], np.float32)
    return tower, [f'the text tower is dropped ({len(text)} tensors)'] if text else []


def tower_config(config: dict) -> tuple[dict, list[str]]:
    """The content of an `open_clip_config.json` as a config of timm, and messages for the user.

    Args:
        config: the content; {} if there is none.

    Raises:
        UserError: the config has an invalid value.
    """
    parts = [config.get('model_cfg', {}), config.get('preprocess_cfg', {})]
    vision = parts[0].get('vision_cfg', {}) if isinstance(parts[0], dict) else None
    if not isinstance(vision, dict) or not isinstance(parts[1], dict):
        raise UserError('open_clip_config.json: model_cfg, vision_cfg and preprocess_cfg must be objects')
    images, size = parts[1], vision.get('image_size', SIZE)
    if images.get('resize_mode', 'shortest') not in ('shortest', 'squash'):
        raise UserError(f"open_clip_config.json: resize_mode '{images['resize_mode']}' is not supported")
    notes = []
    if 'image_size' not in vision:
        notes = [f'the preprocessing is not stored: it is assumed to be that of CLIP, at {SIZE} pixels']
    pretrained_cfg = {
        'input_size': [3, size, size],
        'interpolation': images.get('interpolation', 'bicubic'),
        'crop_pct': 1.0,
        'crop_mode': 'squash' if images.get('resize_mode') == 'squash' else 'center',
        'mean': list(images.get('mean', MEAN)),
        'std': list(images.get('std', STD)),
    }
    # The outputs are the coordinates of an embedding, not scores of classes.
    return {'pretrained_cfg': pretrained_cfg, 'problem_type': 'regression'}, notes
