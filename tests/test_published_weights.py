"""Weights on the Hugging Face hub: `pytest -m hub` downloads about 40 MB."""

import jax
import numpy as np
import pytest

from convnext_jax import load_pretrained
from convnext_jax.errors import UserError
from convnext_jax.interop import read_pretrained
from tests.reference import cases

pytestmark = pytest.mark.hub


@pytest.mark.parametrize(
    ('name', 'layout'),
    [
        ('timm/convnext_zepto_rms_ols.ra4_e3600_r224_in1k', 'timm'),
        ('timm/test_convnext3.r160_in1k', 'timm'),
        ('timm/convnextv2_atto.fcmae_ft_in1k', 'timm'),
        ('facebook/convnextv2-atto-1k-224', 'huggingface'),
    ],
)
def test_published_weights_load_and_give_finite_logits(name, layout):
    """Users could not load weights by their hub id."""
    loaded = read_pretrained(name)
    assert (loaded.layout, loaded.model.num_classes, loaded.notes) == (layout, 1000, [])
    assert loaded.licence
    assert loaded.processor
    logits = np.asarray(jax.jit(lambda model, x: model(x))(loaded.model, cases.images((160, 160))))
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1


def test_a_gated_repository_says_what_to_do(tmp_path, monkeypatch):
    """Users would not know that they have to accept the licence of DINOv3."""
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    name = 'facebook/dinov3-convnext-tiny-pretrain-lvd1689m'
    with pytest.raises(UserError, match=f'{name} is gated: accept its terms at https://huggingface.co/{name}'):
        load_pretrained(name, num_classes=0)


def test_a_missing_repository_says_so():
    """A misspelt id would look like a problem of the network."""
    with pytest.raises(UserError, match='is neither a local path nor a repository on the hub'):
        load_pretrained('facebook/convnext-tiny-22')
