"""The ConvNeXt of torchvision: logits, maps, and weights files in both directions."""

import jax
import numpy as np
import pytest
import torch
from torchvision.models import convnext_tiny

from convnext_jax import save_pretrained
from convnext_jax.interop import read_pretrained
from convnext_jax.models import Variant
from tests.interop.random_models import assert_equal, random_model, state_dict
from tests.judges import record
from tests.reference import cases

BOUND = 1e-5  # in standard deviations of the reference, for float32
SMALL = Variant((1, 2, 3, 1), (8, 16, 24, 32))


@pytest.mark.parametrize('variant', [SMALL, 'convnext_tiny'], ids=['small', 'tiny'])
@torch.no_grad()
def test_torchvision_and_we_load_each_other_s_files(tmp_path, variant):
    """Weights of torchvision would give other predictions, or a fine-tuned model could not be used with torchvision."""
    model = random_model(variant, num_classes=cases.CLASSES)
    theirs = record.torchvision(SMALL) if variant is SMALL else convnext_tiny(num_classes=cases.CLASSES)
    if variant is SMALL:  # no architecture of the table, so our functions cannot find it by the file's shapes
        theirs.load_state_dict({name: torch.from_numpy(x) for name, x in state_dict(model, 'torchvision').items()})
    else:
        save_pretrained(model, tmp_path / 'ours', layout='torchvision')
        theirs.load_state_dict(torch.load(tmp_path / 'ours' / 'model.pth', weights_only=True))
        torch.save(theirs.state_dict(), tmp_path / 'theirs.pth')
        loaded = read_pretrained(tmp_path / 'theirs.pth')
        assert_equal(loaded.model, model)
        assert (loaded.layout, loaded.notes) == ('torchvision', [])

    x = cases.images((64, 96))
    ours = jax.jit(lambda model, x: {'logits': model(x)} | model.features(x))(model, x)
    expected, y = {}, record.nchw(x)
    for number, layer in enumerate(theirs.eval().features):
        y = layer(y)
        if number % 2 or number == 0:
            expected[cases.FEATURES[(number + 1) // 2]] = record.nhwc(y)
    expected['logits'] = theirs(record.nchw(x)).numpy()
    assert ours.keys() == expected.keys()
    for feature, array in expected.items():
        assert float(np.abs(ours[feature] - array).max() / array.std()) < BOUND, feature
