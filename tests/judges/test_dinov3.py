"""DINOv3's ConvNeXt of transformers: outputs, folders in both directions, spellings of names, and preprocessing."""

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from convnext_jax import ImageProcessor, save_pretrained
from convnext_jax.interop import read_pretrained
from convnext_jax.models import Variant
from tests.interop.random_models import assert_equal, random_model
from tests.judges import record
from tests.published_files import dinov3_pixels
from tests.reference import cases

BOUND = 1e-5  # in standard deviations of the reference, for float32
SMALL = Variant((1, 2, 3, 1), (8, 16, 24, 32))


def differ(ours: np.ndarray, theirs: torch.Tensor) -> float:
    reference = theirs.numpy()
    return float(np.abs(np.asarray(ours) - reference).max() / reference.std())


@pytest.mark.parametrize('variant', [SMALL, SMALL.replace(norm_eps=1e-3)], ids=['eps 1e-6', 'eps 1e-3'])
def test_transformers_and_we_load_each_other_s_folders(tmp_path, variant):
    """Published weights would give other tokens, or a distilled model could not be used with transformers."""
    model = random_model(variant, num_classes=0)
    save_pretrained(model, tmp_path / 'ours', layout='dinov3')
    theirs, info = transformers.AutoModel.from_pretrained(tmp_path / 'ours', output_loading_info=True)
    assert isinstance(theirs, transformers.DINOv3ConvNextModel)
    assert not any(info[problem] for problem in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))

    x = cases.images((96, 160))
    with torch.no_grad():
        expected = theirs.eval()(record.nchw(x))
    tokens, pooled = jax.jit(lambda model, x: (model.tokens(x), model(x)))(model, x)
    assert tokens.patches.shape == (2, 3, 5, 32)
    assert differ(tokens.pooled, expected.pooler_output) < BOUND
    assert differ(tokens.patches.reshape(2, 15, 32), expected.last_hidden_state[:, 1:]) < BOUND
    np.testing.assert_array_equal(pooled, tokens.pooled)

    theirs.save_pretrained(tmp_path / 'theirs')
    loaded = read_pretrained(tmp_path / 'theirs', num_classes=0)
    assert_equal(loaded.model, model)
    assert (loaded.model.variant, loaded.layout, loaded.notes) == (variant, 'dinov3', [])


@pytest.mark.parametrize('name', ['convnext_tiny'])
def test_the_names_in_memory_are_read(tmp_path, name):
    """A state dict saved with torch.save or save_file could not be loaded: its names begin with 'model.'."""
    model = random_model(name, num_classes=0)
    save_pretrained(model, tmp_path / 'ours', layout='dinov3')
    theirs = transformers.AutoModel.from_pretrained(tmp_path / 'ours')
    assert any(name.startswith('model.stages.') for name in theirs.state_dict())
    save_file(theirs.state_dict(), tmp_path / 'model.safetensors')
    assert_equal(read_pretrained(tmp_path / 'model.safetensors', num_classes=0).model, model)


def test_the_processor_is_that_of_transformers(tmp_path):
    """Images would be cropped, or have another size. Their resize of floats may differ by one grey level from ours."""
    processor = transformers.DINOv3ViTImageProcessor(size={'height': 64, 'width': 64})
    processor.save_pretrained(tmp_path)
    ours = ImageProcessor.from_pretrained(str(tmp_path))
    assert (ours.size, ours.squashes, ours.resample) == (64, True, 2)
    for size in cases.PICTURES:
        picture = cases.picture(*size)
        theirs = processor(picture, return_tensors='pt')['pixel_values'].numpy().transpose(0, 2, 3, 1)
        levels = (ours(picture) - theirs) * ours.std * 255
        assert np.abs(levels).max() < 1.01, size
        assert np.abs(levels).mean() < 0.35, size

    picture = cases.picture(*cases.PICTURES[0])  # with the preprocessing of `pytest -m hub`, for the published values
    theirs = processor(picture, return_tensors='pt')['pixel_values'].numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(dinov3_pixels(picture, 64), theirs, atol=1e-5)

    save_pretrained(random_model(SMALL, num_classes=0), tmp_path / 'ours', layout='dinov3', processor=ours)
    prepared = transformers.AutoImageProcessor.from_pretrained(tmp_path / 'ours')
    assert isinstance(prepared, transformers.DINOv3ViTImageProcessor)
    assert (prepared.size['height'], prepared.size['width'], prepared.resample) == (64, 64, 2)
