"""The image tower of OpenCLIP, built from timm and torch as in open_clip/timm_model.py."""

import jax
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from convnext_jax.interop import read_pretrained
from convnext_jax.interop.open_clip import image_embedding
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
