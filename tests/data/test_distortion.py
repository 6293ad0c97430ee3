"""Photometric distortion: stored results of OpenCV, and the distribution of the random changes."""

import jax
import numpy as np

from convnext_jax.data.distortion import Distortion, apply_distortion, distort, draw_distortion
from tests import reference
from tests.reference import cases


def batch(distortions):
    return Distortion(*map(np.array, zip(*distortions, strict=True)))


def test_pixels_are_equal_to_opencv():
    """The published recipe would be trained with other colours."""
    stored = reference.arrays('opencv')
    images = np.stack([cases.DISTORTED] * len(cases.DISTORTIONS))
    ours = jax.jit(apply_distortion)(images, batch(cases.DISTORTIONS))
    for number, image in enumerate(ours):
        difference = reference.sketch(image) - stored[f'distortion {number}']
        assert np.abs(difference).max() <= 1
        assert np.mean(difference != 0) < 0.01  # see `hsv_to_rgb`


def test_each_change_has_probability_a_half():
    """The recipe would be stronger or weaker than published."""
    drawn = jax.device_get(jax.vmap(draw_distortion)(jax.random.split(jax.random.key(0), 2000)))
    choices = (drawn.contrast_first, drawn.changes_saturation, drawn.changes_hue)
    choices = np.array([drawn.brightness != 0, drawn.contrast != 1, *choices])
    assert (np.abs(choices.mean(1) - 0.5) < 0.05).all()
    assert np.abs(np.corrcoef(choices) - np.eye(5)).max() < 0.1
    changed = drawn.brightness[drawn.brightness != 0]
    assert (changed >= -32).all()
    assert (changed < 32).all()
    assert 17 < changed.std() < 20
    for factor in (drawn.contrast[drawn.contrast != 1], drawn.saturation):
        assert 0.5 <= factor.min() < 0.55
        assert 1.45 < factor.max() <= 1.5
    assert (drawn.hue.min(), drawn.hue.max()) == (-18, 17)


def test_an_image_depends_on_its_key_only():
    """Images would change with the batch size or the number of devices."""
    images = reference.draw_bytes('four', (4, 6, 6, 3))
    keys = jax.random.split(jax.random.key(3), 4)
    whole = jax.jit(distort)(images, keys)
    np.testing.assert_array_equal(jax.jit(distort)(images[2:3], keys[2:3]), whole[2:3])
    assert whole.dtype == np.uint8
    assert (np.asarray(whole) != images).any()
