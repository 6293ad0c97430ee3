"""Weights on the Hugging Face hub: `pytest -m hub` downloads about 1 GB. Gated repositories need a login.

The expected values are from the conversion scripts of transformers (`convert_convnextv2_to_pytorch.py`,
`convert_dinov3_convnext_to_hf.py`, `convert_convnext_upernet_to_pytorch.py`). For `facebook/convnext-tiny-224`, they
are from the versions of its `test_modeling_convnext.py` that resized the image with Pillow.
"""

import jax
import numpy as np
import pytest

from convnext_jax import load_pretrained
from convnext_jax.errors import UserError
from convnext_jax.interop import ImageProcessor, read_pretrained
from tests.published_files import CATS, WALL, dinov3_pixels, need, photo
from tests.reference import cases

pytestmark = pytest.mark.hub

LOGITS = {
    'facebook/convnext-tiny-224': (-0.0260, -0.4739, 0.1911),
    'facebook/convnextv2-atto-1k-224': (-0.3930, 0.1747, -0.5246, 0.4177, 0.4295),
    'facebook/convnextv2-femto-1k-224': (-0.1727, -0.5341, -0.7818, -0.4745, -0.6566),
    'facebook/convnextv2-pico-1k-224': (-0.0333, 0.1563, -0.9137, 0.1054, 0.0381),
    'facebook/convnextv2-nano-1k-224': (-0.1744, -0.1555, -0.0713, 0.0950, -0.1431),
    'facebook/convnextv2-tiny-1k-224': (0.9996, 0.1966, -0.4386, -0.3472, 0.6661),
}
"""Hub id → the first logits of the photograph `CATS`."""
TOKENS = {
    'facebook/dinov3-convnext-tiny-pretrain-lvd1689m': (
        (-6.372119, 1.300791, 2.074303, -0.079975, 0.607205),
        (0.490530, -3.713466, 1.848513, -1.040319, -1.090818),
    ),
    'facebook/dinov3-convnext-small-pretrain-lvd1689m': (
        (-0.903914, 1.412183, 0.287465, 0.175296, -2.397940),
        (-1.081114, 0.637362, 3.748765, 0.170179, 1.445153),
    ),
}
"""Hub id → the first features of the photograph `CATS`, pooled and of its first patch."""
WALL_LOGITS = ((-8.8110, -8.8110, -8.6521), (-8.8110, -8.8110, -8.6521), (-8.7746, -8.7746, -8.6130))
"""The logits of class 0 in the upper left corner of the photograph `WALL`."""


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
    loaded = read_pretrained(need(name))
    assert (loaded.layout, loaded.model.num_classes, loaded.notes) == (layout, 1000, [])
    assert loaded.licence
    assert loaded.processor
    logits = np.asarray(jax.jit(lambda model, x: model(x))(loaded.model, cases.images((160, 160))))
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1


@pytest.mark.parametrize('name', LOGITS)
def test_published_classifiers_give_the_published_logits(name):
    """Predictions would be worse than published: the weights, the preprocessing or the network would differ."""
    loaded = read_pretrained(need(name))
    logits = jax.jit(lambda model, x: model(x))(loaded.model, loaded.processor(photo(CATS)))
    np.testing.assert_allclose(logits[0, : len(LOGITS[name])], LOGITS[name], atol=1e-3)


@pytest.mark.parametrize('name', TOKENS)
def test_dinov3_gives_the_published_tokens(name):
    """Features of DINOv3 would not be those that probes and detectors were trained on."""
    model = load_pretrained(need(name), num_classes=0)
    tokens = jax.jit(lambda model, x: model.tokens(x))(model, dinov3_pixels(photo(CATS)))
    pooled, patch = TOKENS[name]
    np.testing.assert_allclose(tokens.pooled[0, :5], pooled, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(tokens.patches[0, 0, 0, :5], patch, rtol=1e-3, atol=1e-3)


def test_a_published_upernet_gives_the_published_logits():
    """Masks would be worse than published."""
    name = need('openmmlab/upernet-convnext-tiny')
    pixels = ImageProcessor.from_pretrained(name)(photo(WALL))
    logits = jax.jit(lambda model, x: model(x))(load_pretrained(name), pixels)
    assert logits.shape == (1, 512, 512, 150)
    np.testing.assert_allclose(logits[0, :3, :3, 0], WALL_LOGITS, atol=1e-3)


def test_a_gated_repository_says_what_to_do(tmp_path, monkeypatch):
    """Users would not know that they have to accept the licence of DINOv3."""
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    need('facebook/convnextv2-atto-1k-224')  # skips the test without a network
    name = 'facebook/dinov3-convnext-tiny-pretrain-lvd1689m'
    with pytest.raises(UserError, match=f'{name} is gated: accept its terms at https://huggingface.co/{name}'):
        load_pretrained(name, num_classes=0)


def test_a_missing_repository_says_so():
    """A misspelt id would look like a problem of the network."""
    need('facebook/convnextv2-atto-1k-224')
    with pytest.raises(UserError, match='is neither a local path nor a repository on the hub'):
        load_pretrained('facebook/convnext-tiny-22')
