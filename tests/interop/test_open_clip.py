"""The image tower of OpenCLIP: names, projection, preprocessing and text tower."""

import dataclasses
import json

import numpy as np
import pytest
from random_models import assert_equal, random_model, save, state_dict

from convnext_jax import load_pretrained
from convnext_jax.embedding import embed
from convnext_jax.errors import UserError
from convnext_jax.interop import ImageProcessor, read_pretrained
from convnext_jax.models import VARIANTS, get_variant

TEXT = {'logit_scale': np.ones((), np.float32), 'token_embedding.weight': np.ones((4, 3), np.float32)}
CLIP = ImageProcessor(
    size=64,
    crop_pct=1.0,
    squash=False,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)


def tower(model) -> dict:
    """The tensors as OpenCLIP stores them. The last layer of a projection has no bias."""
    names = {'head.fc': 'visual.head.proj', 'head.pre_logits.fc': 'visual.head.mlp.fc1'}
    if model.hidden is not None:
        names['head.fc'] = 'visual.head.mlp.fc2'
    tensors = {}
    for name, x in state_dict(model, 'timm').items():
        module, parameter = name.rsplit('.', 1)
        if name != 'head.fc.bias':
            tensors[f'{names.get(module, f"visual.trunk.{module}")}.{parameter}'] = x
    return tensors


@pytest.fixture
def with_mlp(monkeypatch):
    """A small architecture with a hidden layer, as convnext_large_mlp."""
    variant = dataclasses.replace(get_variant('convnext_atto'), head_hidden=24)
    monkeypatch.setitem(VARIANTS, 'convnext_atto_mlp', variant)
    return variant


@pytest.mark.parametrize('projection', ['linear', 'mlp'])
@pytest.mark.parametrize('wrapper', ['', 'module.'])
def test_the_tower_is_read_with_its_projection(tmp_path, with_mlp, projection, wrapper):
    """Embeddings would lack the projection, or towers could not be loaded."""
    model = random_model(with_mlp if projection == 'mlp' else 'convnext_atto', num_classes=12)
    model.head.bias[...] *= 0
    tensors = {wrapper + name: x for name, x in (tower(model) | TEXT).items()}
    save(tensors, tmp_path / 'open_clip_model.safetensors')
    config = {'embed_dim': 12, 'vision_cfg': {'timm_model_name': 'convnext_atto', 'image_size': 64}}
    images = {'mean': list(CLIP.mean), 'std': list(CLIP.std)}
    (tmp_path / 'open_clip_config.json').write_text(json.dumps({'model_cfg': config, 'preprocess_cfg': images}))
    loaded = read_pretrained(tmp_path)
    assert_equal(loaded.model, model)
    prefix = ["the prefix 'module.' of the names in the file is ignored"] if wrapper else []
    assert loaded.notes == ['the text tower is dropped (2 tensors)', *prefix]
    assert (loaded.processor, loaded.class_names, loaded.activation) == (CLIP, None, None)
    np.save(tmp_path / 'a.npy', np.uint8(np.arange(80 * 70 * 3) % 251).reshape(80, 70, 3))
    (embedding,) = embed(loaded, [tmp_path / 'a.npy'], batch_size=1)
    assert embedding.vector.shape == (12,)  # projected; `tests/judges` compares the values
    np.testing.assert_allclose(np.linalg.norm(embedding.vector), 1, rtol=1e-5)


def test_a_file_without_a_config_gets_the_preprocessing_of_clip_with_a_note(tmp_path):
    """ImageNet's mean and std would be used, which costs accuracy."""
    save(tower(random_model('convnext_atto')), tmp_path / 'model.safetensors')
    loaded = read_pretrained(tmp_path / 'model.safetensors')
    assert loaded.processor == dataclasses.replace(CLIP, size=256)
    assert loaded.notes == ['the preprocessing is not stored: it is assumed to be that of CLIP, at 256 pixels']


@pytest.mark.parametrize(
    ('name', 'match'),
    [('visual.head.other.weight', 'is not part of a linear or MLP projection'), (None, 'is not a ConvNeXt')],
)
def test_other_towers_are_refused(tmp_path, name, match):
    """A part of the tower would be dropped silently."""
    tensors = tower(random_model('convnext_atto')) | ({name: np.ones((2, 2), np.float32)} if name else {})
    if name is None:
        tensors = {name: x for name, x in tensors.items() if 'stem' not in name}
    save(tensors, tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match=match):
        load_pretrained(tmp_path / 'model.safetensors')
