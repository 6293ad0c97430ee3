"""Encoders pre-trained here, in the libraries that fine-tune them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
from transformers import AutoModel

from convnext_jax import save_pretrained
from convnext_jax.config import default_config
from convnext_jax.models import get_parameters, with_parameters
from convnext_jax.tasks import abstract_model, make_task
from tests.reference import draw_parameters

IMAGES = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)


@pytest.fixture(scope='module')
def pretrained():
    config = default_config('fcmae')
    config.model.name = 'convnextv2_atto'
    model = abstract_model(config)
    drawn = draw_parameters({name: x.shape for name, x in get_parameters(model).items()})
    return make_task(config).pretrained(with_parameters(model, jax.tree.map(jnp.asarray, drawn)), {})


@pytest.mark.parametrize('layout', ['huggingface', 'timm', 'original'])
def test_other_libraries_load_an_encoder_and_compute_the_same(pretrained, tmp_path, layout):
    """A tensor under a wrong name would be newly initialised, with no more than a warning."""
    save_pretrained(pretrained.model, tmp_path / 'out', layout=layout, head=False)
    expected = np.asarray(jax.jit(lambda model, x: model.features(x)['stage4'])(pretrained.model, IMAGES))
    images = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    if layout == 'original':
        state = torch.load(tmp_path / 'out' / 'model.pth')['model']
        assert not any(name.startswith('head') for name in state)
        np.testing.assert_array_equal(state['norm.weight'], np.ones(320))
        return
    with torch.no_grad():
        if layout == 'huggingface':
            model, info = AutoModel.from_pretrained(tmp_path / 'out', output_loading_info=True)
            assert not info['missing_keys']
            assert not info['unexpected_keys']
            features = model.eval()(images).last_hidden_state
        else:
            features = (
                timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval().forward_features(images)
            )
    np.testing.assert_allclose(features.permute(0, 2, 3, 1), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
