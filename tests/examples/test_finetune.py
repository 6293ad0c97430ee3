"""The examples run unchanged, because users copy them."""

import sys

import jax
import pytest
from conftest import ROOT

from convnext_jax import ImageProcessor, create_model, save_pretrained
from convnext_jax.interop import Licence, read_pretrained

sys.path.insert(0, str(ROOT / 'examples'))
import finetune


@pytest.mark.slow
def test_finetune_learns_and_saves_what_it_learned(small_models, tmp_path):
    """The head of three classes is replaced, the loss falls, and the folder holds names, preprocessing and licence."""
    build = jax.jit(lambda key: create_model('convnextv2_atto', num_classes=3, patch_size=2, key=key))
    model = build(jax.random.key(0))
    save_pretrained(model, tmp_path / 'weights', processor=ImageProcessor(size=32), licence=Licence('mit'))
    weights, tuned = str(tmp_path / 'weights'), str(tmp_path / 'tuned')
    accuracy = finetune.finetune(weights, tuned, images=256, epochs=5, learning_rate=1e-2)
    assert accuracy > 0.25  # chance is 0.1
    loaded = read_pretrained(tuned)
    assert loaded.class_names[0] == 'T-shirt/top'
    assert loaded.processor == ImageProcessor(size=32)
    assert loaded.licence.identifier == 'mit'
