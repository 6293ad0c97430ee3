"""Mixup and cutmix: shares of images and targets agree, and what is drawn is what the papers draw."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.data.mixing import mix
from convnext_jax.errors import UserError

COUNT, SIDE = 64, 16


def numbered(count=COUNT):
    """Image i is filled with i, and its target is class i."""
    images = jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32)[:, None, None, None], (count, SIDE, SIDE + 4, 3))
    return images, jnp.eye(count)


@partial(jax.jit, static_argnames=('mixup', 'cutmix', 'mode'))
def run(key, on=True, *, mixup=0.0, cutmix=0.0, mode='elem'):
    return mix(*numbered(), key, mixup=mixup, cutmix=cutmix, mode=mode, on=on)


def shares(targets):
    """Of each row itself; the rest is its neighbour's."""
    targets = np.asarray(targets)
    rows = np.arange(COUNT)
    own, other = targets[rows, rows], targets[rows, rows ^ 1]
    np.testing.assert_allclose(own + other, 1, rtol=1e-6)
    return own


def test_mixup_mixes_pixels_and_targets_by_the_same_share():
    images, targets = run(jax.random.key(0), mixup=0.8)
    own, rows = shares(targets), np.arange(COUNT)
    expected = own * rows + (1 - own) * (rows ^ 1)
    np.testing.assert_allclose(images, np.broadcast_to(expected[:, None, None, None], images.shape), rtol=1e-5)
    assert len(np.unique(own.round(5))) > COUNT // 2, 'each image draws for itself'


def test_cutmix_targets_count_the_pixels_that_stayed():
    """A λ that is not corrected where the box was cut off at the side labels the image wrongly."""
    images, targets = run(jax.random.key(0), cutmix=1.0)
    own, rows = shares(targets), np.arange(COUNT)
    images = np.asarray(images)
    stayed = images == rows[:, None, None, None]
    other = images == (rows ^ 1)[:, None, None, None]
    assert (stayed ^ other).all(), 'pixels are swapped, not blended'
    np.testing.assert_allclose(stayed.mean((1, 2, 3)), own, rtol=1e-5)
    for row in range(COUNT):
        ys, xs = np.nonzero(other[row, :, :, 0])
        if len(ys):
            assert other[row, ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].all(), 'it is one box'


def test_a_batch_has_one_draw_and_the_kinds_take_turns():
    kinds = []
    for seed in range(60):
        images, targets = run(jax.random.key(seed), mixup=0.8, cutmix=1.0, mode='batch')
        assert np.ptp(shares(targets)) < 1e-6
        kinds.append(bool((np.asarray(images) % 1 == 0).all()))
    assert 15 < sum(kinds) < 45


@pytest.mark.parametrize(('mixup', 'cutmix', 'alpha'), [(0.8, 0.0, 0.8), (0.2, 0.0, 0.2)])
def test_shares_are_of_the_beta_distribution(mixup, cutmix, alpha):
    drawn = np.concatenate([shares(run(jax.random.key(seed), mixup=mixup, cutmix=cutmix)[1]) for seed in range(30)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(drawn.mean() - 0.5) < 0.05
    assert abs(drawn.var() - variance) < 0.2 * variance


def test_each_image_has_its_own_kind():
    """One kind for all halves what a small batch sees of the other."""
    blended = []
    for seed in range(30):
        images, targets = run(jax.random.key(seed), mixup=0.8, cutmix=1.0)
        shares(targets)
        blended.append((np.asarray(images) % 1 != 0).any((1, 2, 3)))
    assert all(0 < kind.mean() < 1 for kind in blended)
    first, second = np.concatenate([kind[::2] for kind in blended]), np.concatenate([kind[1::2] for kind in blended])
    assert abs((first != second).mean() - 0.5) < 5 * 0.5 / len(first) ** 0.5, 'neighbours draw apart'


def test_off_leaves_all_as_it_is():
    """The recipes end without mixing: what still mixes then is seen in no metric's name."""
    images, targets = run(jax.random.key(0), False, mixup=0.8, cutmix=1.0)
    np.testing.assert_array_equal(images, numbered()[0])
    np.testing.assert_array_equal(targets, numbered()[1])


def test_bad_arguments():
    images, targets = numbered(3)
    with pytest.raises(UserError, match='batch_size=3 must be even'):
        mix(images, targets, jax.random.key(0), mixup=0.8, cutmix=0, mode='batch')
    with pytest.raises(UserError, match="mix.mode must be 'batch' or 'elem', not 'pair'"):
        mix(*numbered(), jax.random.key(0), mixup=0.8, cutmix=0, mode='pair')
