"""Downloads for the tests of published weights. Without a network, the test is skipped with the reason."""

import io
import urllib.request

import jax
import numpy as np
import pytest
from PIL import Image

from convnext_jax.errors import UserError
from convnext_jax.interop.hub import download

CATS = 'http://images.cocodataset.org/val2017/000000039769.jpg'
WALL = 'https://huggingface.co/datasets/hf-internal-testing/fixtures_ade20k/resolve/main/ADE_val_00000001.jpg'
"""The photographs for which the expected values of transformers were computed."""
REASONS = ('the hub cannot be reached', 'the hub does not provide it', ' is gated: ')
"""Parts of the errors of the hub for which a test is skipped. Other errors fail it."""


def need(hub_id: str) -> str:
    """Downloads a repository, and returns its id; skips the test if the hub cannot be reached or refuses access."""
    try:
        download(hub_id)
    except UserError as error:
        if any(reason in str(error) for reason in REASONS):
            pytest.skip(str(error))
        raise
    return hub_id


def photo(address: str) -> Image.Image:
    """Downloads a photograph; skips the test if this is not possible."""
    try:
        with urllib.request.urlopen(address, timeout=60) as response:
            content = response.read()
    except OSError as error:
        pytest.skip(f'{address} cannot be downloaded: {error}')
    return Image.open(io.BytesIO(content)).convert('RGB')


def dinov3_pixels(image: Image.Image, size: int = 224) -> np.ndarray:
    """DINOv3's own preprocessing, (1, size, size, 3) float32: the pixels are scaled to [0, 1] before the resize.

    Our `ImageProcessor` resizes bytes, so its values are up to one grey level off.
    """
    scaled = np.asarray(image, np.float32) / 255
    resized = jax.image.resize(scaled, (size, size, 3), 'linear')  # antialiased
    return ((resized - np.float32((0.485, 0.456, 0.406))) / np.float32((0.229, 0.224, 0.225)))[None]
