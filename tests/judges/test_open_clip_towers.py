"""Image towers of OpenCLIP: of the library itself, and rebuilt from timm and torch as in open_clip/timm_model.py."""

import jax
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from convnext_jax.embedding import embed
from convnext_jax.interop import ImageProcessor, read_pretrained
from convnext_jax.interop.open_clip import image_embedding
from convnext_jax.models import VARIANTS, get_variant
from tests.judges import record
from tests.reference import cases

BOUND = 1e-5  # in standard deviations of the reference, for float32


class Tower(torch.nn.Module):
    """`open_clip.timm_model.TimmModel`: a trunk without head, and a projection without bias in its last layer."""

    def __init__(self, name: str, channels: int):
        super().__init__()
        self.trunk = timm.create_model(name, num_classes=0)
        self.head = torch.nn.Sequential()
        self.head.add_module('proj', torch.nn.Linear(self.trunk.num_features, channels, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self.head(self.trunk(x)), dim=-1)


@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto'])
def test_embeddings_equal_those_of_the_tower(tmp_path, name):
    """Zero-shot classification would fail: the embeddings of images would not match those of texts."""
    tower = Tower(name, 24).eval()
    shapes = {f'visual.{tensor}': tuple(x.shape) for tensor, x in tower.state_dict().items()}
    tensors = {tensor: torch.from_numpy(cases.foreign_tensor(tensor, shape)) for tensor, shape in shapes.items()}
    tower.load_state_dict({tensor.removeprefix('visual.'): x for tensor, x in tensors.items()})
    save_file(tensors | {'logit_scale': torch.ones(())}, tmp_path / 'open_clip_model.safetensors')
    x = cases.images((64, 96))
    with torch.no_grad():
        theirs = tower(record.nchw(x)).numpy()
    ours = jax.jit(image_embedding)(read_pretrained(tmp_path / 'open_clip_model.safetensors').model, x)
    assert np.abs(ours - theirs).max() / theirs.std() < BOUND


@pytest.mark.parametrize('projection', ['linear', 'mlp'])
def test_embed_equals_encode_image(tmp_path, monkeypatch, projection):
    """A search by text would not find the images, because `embed` would write other vectors than OpenCLIP."""
    open_clip = pytest.importorskip('open_clip', reason='open_clip_torch is not installed')
    vision = {'timm_model_name': 'convnext_atto', 'timm_proj': projection, 'timm_pool': '', 'image_size': 64}
    text = {'context_length': 4, 'vocab_size': 8, 'width': 16, 'heads': 2, 'layers': 1}
    if projection == 'mlp':  # convnext_large_mlp, the only published one, is too large for a test
        monkeypatch.setitem(VARIANTS, 'convnext_atto_mlp', get_variant('convnext_atto').replace(head_hidden=48))
    model = open_clip.model.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items() if name.startswith('visual.')}
    tensors = {name: torch.from_numpy(cases.foreign_tensor(name, shape)) for name, shape in shapes.items()}
    model.load_state_dict(tensors, strict=False)
    save_file(model.state_dict(), tmp_path / 'open_clip_model.safetensors')
    pixels = np.uint8(np.random.default_rng(0).integers(0, 256, (64, 64, 3)))
    np.save(tmp_path / 'a.npy', pixels)
    processor = ImageProcessor(size=64, crop_pct=1.0)
    with torch.no_grad():
        theirs = model.encode_image(record.nchw(processor(pixels)), normalize=True).numpy()[0]
    loaded = read_pretrained(tmp_path / 'open_clip_model.safetensors')._replace(processor=processor)
    (ours,) = embed(loaded, [tmp_path / 'a.npy'])
    assert np.abs(ours.vector - theirs).max() / theirs.std() < BOUND
