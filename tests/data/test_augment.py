"""Augmentation on the device: its effect on an image, and independent draws for each image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from convnext_jax.data.augment import augment, normalize, random_crop, random_erasing, random_flip
from convnext_jax.errors import UserError

PLAIN = {'mean': (0.0,), 'std': (1 / 255,)}  # normalisation that does not change the pixel values
PLAIN |= {'policy': '', 'color_jitter': 0.0, 'erasing': 0.0, 'erasing_mode': 'pixel'}


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def noise(count, height=5, width=6, channels=3):
    return np.random.default_rng(0).integers(1, 256, (count, height, width, channels), dtype=np.uint8)


def test_normalize_values():
    """Published weights expect images normalised by the mean and std of each channel."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = noise(3)
    images[0, 0, 0], images[0, 0, 1] = 0, 255
    out = normalize(jnp.asarray(images), mean, std)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, (images / 255.0 - mean) / std, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out[0, 0, 0], [-2.117904, -2.035714, -1.804444], rtol=1e-5)
    np.testing.assert_allclose(out[0, 0, 1], [2.248908, 2.428571, 2.64], rtol=1e-5)


def test_a_wrong_shape_or_dtype_is_an_error_in_tests():
    """The annotated shapes could be wrong without notice; the hook in `tests/conftest.py` checks them."""
    for images in (jnp.zeros((5, 6, 3), jnp.uint8), jnp.zeros((2, 5, 6, 3), bool)):
        with pytest.raises(TypeCheckError):
            normalize(images, (0.0,), (1.0,))
    with pytest.raises(TypeCheckError):
        random_flip(jnp.asarray(noise(3)), keys(2))


def test_flip_mirrors_left_to_right_half_the_time():
    """Images that are flipped vertically, or all at once, would train another model."""
    images = np.broadcast_to(noise(1), (1024, 5, 6, 3))
    flipped = np.asarray(random_flip(jnp.asarray(images), keys(1024)))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert ((flipped == images).all((1, 2, 3)) != mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / 1024**0.5
    assert flipped.dtype == np.uint8


def test_crop_shifts_and_fills_with_zeros():
    """Some shifts would be missing or more frequent, or the channels shifted differently."""
    image, padding, count = noise(1)[0], 2, 2500
    images = jnp.asarray(np.broadcast_to(image, (count, *image.shape)))
    cropped = np.asarray(random_crop(images, keys(count), padding))
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    found = np.zeros((5, 5), int)
    for top in range(5):
        for left in range(5):
            found[top, left] = (cropped == padded[top : top + 5, left : left + 6]).all((1, 2, 3)).sum()
    assert found.sum() == count
    assert np.abs(found - count / 25).max() < 5 * (count / 25) ** 0.5


def test_flip_and_crop_are_independent():
    """A flip and a crop from one key would be correlated."""
    count = 9000
    images = np.zeros((count, 5, 5, 1), np.uint8)
    images[:, 2, 2], images[:, 2, 3] = 100, 200
    out = np.asarray(augment(jnp.asarray(images), keys(count), flip=True, crop_padding=1, **PLAIN))[..., 0].round()
    image, row, column = np.nonzero(out == 100)
    assert len(image) == count
    flipped = (np.argmax(out[np.arange(count), row], axis=1) < column).astype(int)
    column = np.where(flipped, 4 - column, column)
    pairs = np.bincount(9 * flipped + 3 * (row - 1) + column - 1, minlength=18)
    assert np.abs(pairs - count / 18).max() < 5 * (count / 18) ** 0.5


def test_the_draw_of_an_image_depends_on_its_key_only():
    """Gradient accumulation, sharding or another batch size would change the run."""
    images, draws = jnp.asarray(noise(32)), keys(32)
    run = jax.jit(lambda images, draws: augment(images, draws, flip=True, crop_padding=2, **PLAIN))
    out = np.asarray(run(images, draws))
    np.testing.assert_array_equal(run(images, draws), out)
    order = np.random.default_rng(1).permutation(32)
    np.testing.assert_array_equal(run(images[order], draws[order]), out[order])
    np.testing.assert_array_equal(run(images[8:12], draws[8:12]), out[8:12])
    assert (np.asarray(run(images, keys(32, seed=1))) != out).any()


@pytest.mark.parametrize(('flip', 'crop_padding'), [(False, 0), (True, 0), (False, 2)])
def test_each_part_can_be_switched_off(flip, crop_padding):
    """Digits must not be mirrored, and no metric would show an augmentation that cannot be switched off."""
    images = noise(64)
    out = np.asarray(augment(jnp.asarray(images), keys(64), flip=flip, crop_padding=crop_padding, **PLAIN)).round()
    unchanged = (out == images).all((1, 2, 3))
    mirrored = (out == images[:, :, ::-1]).all((1, 2, 3))
    if flip:
        assert (unchanged | mirrored).all()
        assert mirrored.any()
    elif crop_padding:
        assert not mirrored.any()
        assert not unchanged.all()
    else:
        assert unchanged.all()


@pytest.mark.parametrize('changed', [{'policy': '3a'}, {'policy': 'rand-m9-mstd0.5-inc1'}, {'color_jitter': 0.4}])
def test_policy_and_jitter_are_switched_on_by_their_fields(changed):
    """A field without effect would silently remove the augmentation of the recipe."""
    images = noise(32)
    run = jax.jit(lambda x, k: augment(x, k, flip=False, crop_padding=0, **PLAIN | changed))
    out = np.asarray(run(jnp.asarray(images), keys(32)))
    assert (out.round() != images).any((1, 2, 3)).mean() > 0.4


def erased(mode, probability=1.0, count=2000):
    images = jnp.full((count, 24, 32, 3), 7.0)
    out = np.asarray(jax.jit(lambda x, k: random_erasing(x, k, probability, mode))(images, keys(count)))
    return out, (out != 7).any(-1)


def test_erasing_overwrites_one_rectangle_of_the_published_area_and_aspect():
    """Another distribution of rectangles would be another recipe."""
    _, mask = erased('pixel')
    areas, aspects = [], []
    for one in mask:
        ys, xs = np.nonzero(one)
        assert one[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].all()
        areas.append(one.mean())
        aspects.append((np.ptp(ys) + 1) / (np.ptp(xs) + 1))
    assert min(areas) > 0.01
    assert max(areas) < 0.36
    assert abs(np.mean(areas) - 0.17) < 0.02
    assert min(aspects) > 0.2
    assert max(aspects) < 4.5
    covered = mask.mean(0)
    assert covered.min() > 0, 'every pixel is erased in some images, also the corners'


@pytest.mark.parametrize('mode', ['pixel', 'rand', 'const'])
def test_the_values_of_erased_pixels(mode):
    """The three modes would not differ, or the noise would have another scale than in the paper."""
    out, mask = erased(mode)
    values = out[mask]
    if mode == 'const':
        assert (values == 0).all()
        return
    assert abs(values.mean()) < 0.1
    assert abs(values.std() - 1) < 0.1
    first = out[0][mask[0]]
    assert len(np.unique(first[:, 0])) == (1 if mode == 'rand' else len(first))
    assert len(np.unique(first[0])) == 3


def test_erasing_changes_an_image_with_the_given_probability():
    """Recipes erase a quarter of the images, not all."""
    _, mask = erased('pixel', probability=0.25)
    assert abs(mask.any((1, 2)).mean() - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5


def test_an_unknown_erasing_mode_is_refused():
    """A misspelt mode would silently use another one."""
    with pytest.raises(UserError, match="augment.erasing_mode must be 'pixel', 'rand' or 'const', not 'mean'"):
        erased('mean')
