"""The helpers of `test_published_weights.py`, which cannot run without a network."""

import numpy as np
import pytest
from PIL import Image
from test_published_weights import LOGITS, TOKENS

from convnext_jax.errors import UserError
from tests import published_files
from tests.published_files import dinov3_pixels, need, photo

NAME = 'facebook/dinov3-convnext-tiny-pretrain-lvd1689m'


def test_without_a_network_a_test_is_skipped_with_the_reason(tmp_path, monkeypatch):
    """Without a network, `pytest -m hub` would fail as if the weights were wrong."""
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match=f'{NAME} is not a local path, and the hub cannot be reached'):
        need(NAME)
    with pytest.raises(pytest.skip.Exception, match='http://localhost:9/a.jpg cannot be downloaded'):
        photo('http://localhost:9/a.jpg')


@pytest.mark.parametrize(
    ('line', 'outcome'),
    [
        (f'{NAME} is gated: accept its terms', pytest.skip.Exception),
        (f'{NAME} is not a local path, and the hub does not provide it: 503', pytest.skip.Exception),
        (f'{NAME} is neither a local path nor a repository on the hub', UserError),
    ],
)
def test_only_problems_of_access_skip_a_test(monkeypatch, line, outcome):
    """Nobody would notice that a repository was renamed or removed."""

    def refuse(_):
        raise UserError(line)

    monkeypatch.setattr(published_files, 'download', refuse)
    with pytest.raises(outcome, match=line):
        need(NAME)


def test_the_pixels_of_dinov3_are_scaled_before_the_resize():
    """The test of DINOv3 would fail for a reason other than the weights; `tests/judges` compares with transformers."""
    image = Image.fromarray(np.full((48, 64, 3), 51, np.uint8))
    expected = (0.2 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(dinov3_pixels(image, 32), np.broadcast_to(expected, (1, 32, 32, 3)), atol=1e-5)
    assert all(len(values) in (3, 5) for values in LOGITS.values())
    assert all([len(part) for part in tokens] == [5, 5] for tokens in TOKENS.values())
