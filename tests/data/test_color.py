"""Colour jitter and three-augment on the device, compared with Pillow."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from convnext_jax.data.color import (
    BLURRED,
    GREY,
    SOLARIZED,
    _draw_jitter,
    _draw_three,
    adjust,
    jitter_colors,
    three_augment,
)
from convnext_jax.data.pillow_arithmetic import gaussian_blur
from tests.data.test_randaugment import photos  # noqa: F401 - a fixture

ENHANCERS = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]  # indexed by kind

run_adjust = jax.jit(adjust)
run_blur = jax.jit(gaussian_blur)
run_jitter = jax.jit(jitter_colors, static_argnames='strength')
run_three = jax.jit(three_augment)


def difference(ours, theirs):
    return np.abs(np.asarray(ours, np.int32) - np.stack([np.asarray(image, np.int32) for image in theirs]))


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize('factor', [0.0, 0.6, 1.0, 1.31, 2.0])
@pytest.mark.parametrize('kind', range(3))
def test_adjust_differs_from_pillow_by_at_most_1(photos, kind, factor):  # noqa: F811
    """Another saturation or contrast than torchvision's would be another recipe."""
    ours = run_adjust(photos, jnp.full(len(photos), kind), jnp.full(len(photos), factor))
    theirs = [ENHANCERS[kind](Image.fromarray(image)).enhance(factor) for image in photos]
    assert difference(ours, theirs).max() <= 1
    assert difference(ours, theirs).mean() < 0.02


def test_jitter_equals_pillow_with_the_drawn_order_and_factors(photos):  # noqa: F811
    """The order matters, because each adjustment clips at 255."""
    images = np.concatenate([photos] * 8)
    draws = keys(len(images))
    ours = run_jitter(images, draws, strength=0.4)
    theirs = []
    for image, key in zip(images, draws, strict=True):
        image = Image.fromarray(image)
        for kind, factor in zip(*_draw_jitter(key, 0.4), strict=True):
            image = ENHANCERS[int(kind)](image).enhance(float(factor))
        theirs.append(image)
    assert difference(ours, theirs).max() <= 1
    assert difference(ours, theirs).mean() < 0.02


@pytest.mark.parametrize(('strength', 'low', 'high'), [(0.3, 0.7, 1.3), (1.5, 0.0, 2.5)])
def test_jitter_draws_every_order_and_factors_over_the_whole_range(strength, low, high):
    """No metric would show a jitter that is too weak or always in one order."""
    count = 6000
    order, factors = jax.vmap(lambda key: _draw_jitter(key, strength))(keys(count))
    found = [int((np.asarray(order) == permutation).all(1).sum()) for permutation in itertools.permutations(range(3))]
    assert sum(found) == count
    assert np.abs(np.asarray(found) - count / 6).max() < 5 * (count / 6) ** 0.5
    factors = np.asarray(factors)
    assert low <= factors.min() < low + 0.01
    assert high - 0.01 < factors.max() <= high
    assert np.abs(factors.mean(0) - (low + high) / 2).max() < 5 * (high - low) / (12 * count) ** 0.5
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 5 / count**0.5


@pytest.mark.parametrize('radius', [0.1, 0.3, 0.7, 1.0, 1.37, 1.9, 2.0])
def test_blur_differs_from_pillow_by_at_most_1(photos, radius):  # noqa: F811
    """Another blur would be another recipe than DeiT III's."""
    ours = run_blur(photos, jnp.full(len(photos), radius))
    theirs = [Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)) for image in photos]
    assert difference(ours, theirs).max() <= 1
    assert difference(ours, theirs).mean() < 0.02


def test_three_augment_applies_the_drawn_operation_to_each_image(photos):  # noqa: F811
    """An image with the wrong operation, or two of them, would be another recipe than DeiT III's."""
    images = np.concatenate([photos] * 4)
    draws = keys(len(images))
    choice, radius = jax.vmap(_draw_three)(draws)
    theirs = []
    for image, which, size in zip(images, np.asarray(choice), np.asarray(radius), strict=True):
        image = Image.fromarray(image)
        theirs.append(
            {
                GREY: lambda image, _: image.convert('L').convert('RGB'),
                SOLARIZED: lambda image, _: ImageOps.solarize(image, 128),
                BLURRED: lambda image, size: image.filter(ImageFilter.GaussianBlur(float(size))),
            }[int(which)](image, size)
        )
    assert set(np.asarray(choice)) == {GREY, SOLARIZED, BLURRED}
    assert difference(run_three(images, draws), theirs).max() <= 1


def test_three_augment_draws_uniformly():
    """Other probabilities or blur radii would be another recipe than DeiT III's."""
    count = 6000
    choice, radius = jax.vmap(_draw_three)(keys(count))
    assert np.abs(np.bincount(np.asarray(choice)) - count / 3).max() < 5 * (count / 3) ** 0.5
    assert 0.1 <= radius.min() < 0.11
    assert 1.99 < radius.max() <= 2
    assert abs(float(radius.mean()) - 1.05) < 5 * 1.9 / (12 * count) ** 0.5


@pytest.mark.parametrize('run', [run_three, lambda images, keys: run_jitter(images, keys, strength=0.4)])
def test_the_draw_of_an_image_depends_on_its_key_only(photos, run):  # noqa: F811
    """Gradient accumulation, sharding or another batch size would change the run."""
    draws = keys(6)
    out = np.asarray(run(photos, draws))
    order = np.asarray([3, 1, 0, 5, 4, 2])
    np.testing.assert_array_equal(run(photos[order], draws[order]), out[order])
    assert (np.asarray(run(photos, keys(6, seed=1))) != out).any()


def test_greyscale_images_are_supported(photos):  # noqa: F811
    """The recipes would fail for Fashion-MNIST, which has one channel."""
    grey = photos[:, :, :, :1]
    assert run_three(grey, keys(6)).shape == grey.shape
    assert run_jitter(grey, keys(6), strength=0.4).shape == grey.shape
    np.testing.assert_array_equal(run_adjust(grey, jnp.full(6, 2), jnp.full(6, 0.2)), grey)
