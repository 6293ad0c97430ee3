"""Mixup and cutmix: equal weights for images and targets, and the random distributions of the papers."""

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


def own_weights(targets):
    """The weight of each image itself, λ; its neighbour has the weight 1 − λ."""
    targets = np.asarray(targets)
    index = np.arange(COUNT)
    own, other = targets[index, index], targets[index, index ^ 1]
    np.testing.assert_allclose(own + other, 1, rtol=1e-6)
    return own


def test_mixup_uses_one_weight_for_pixels_and_targets():
    """Targets would not describe the images."""
    images, targets = run(jax.random.key(0), mixup=0.8)
    own, index = own_weights(targets), np.arange(COUNT)
    expected = own * index + (1 - own) * (index ^ 1)
    np.testing.assert_allclose(images, np.broadcast_to(expected[:, None, None, None], images.shape), rtol=1e-5)
    assert len(np.unique(own.round(5))) > COUNT // 2, 'each image has its own draw'


def test_cutmix_targets_equal_the_fraction_of_kept_pixels():
    """Without correction of λ for a box that is clipped at the border, the target would be wrong."""
    images, targets = run(jax.random.key(0), cutmix=1.0)
    own, index = own_weights(targets), np.arange(COUNT)
    images = np.asarray(images)
    kept = images == index[:, None, None, None]
    other = images == (index ^ 1)[:, None, None, None]
    assert (kept ^ other).all(), 'pixels are replaced, not blended'
    np.testing.assert_allclose(kept.mean((1, 2, 3)), own, rtol=1e-5)
    for i in range(COUNT):
        ys, xs = np.nonzero(other[i, :, :, 0])
        if len(ys):
            assert other[i, ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].all(), (
                'the replaced pixels are a rectangle'
            )


def test_batch_mode_has_one_draw_and_both_methods_are_used():
    """timm's recipes mix in this mode, with either method half of the time."""
    kinds = []
    for seed in range(60):
        images, targets = run(jax.random.key(seed), mixup=0.8, cutmix=1.0, mode='batch')
        assert np.ptp(own_weights(targets)) < 1e-6
        kinds.append(bool((np.asarray(images) % 1 == 0).all()))
    assert 15 < sum(kinds) < 45


@pytest.mark.parametrize(('mixup', 'cutmix', 'alpha'), [(0.8, 0.0, 0.8), (0.2, 0.0, 0.2)])
def test_weights_have_the_beta_distribution(mixup, cutmix, alpha):
    """Another distribution would be a stronger or weaker regularisation than the recipe's."""
    drawn = np.concatenate(
        [own_weights(run(jax.random.key(seed), mixup=mixup, cutmix=cutmix)[1]) for seed in range(30)]
    )
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(drawn.mean() - 0.5) < 0.05
    assert abs(drawn.var() - variance) < 0.2 * variance


def test_elem_mode_draws_a_method_for_each_image():
    """One method for the whole batch would make the gradients noisier."""
    blended = []
    for seed in range(30):
        images, targets = run(jax.random.key(seed), mixup=0.8, cutmix=1.0)
        own_weights(targets)
        blended.append((np.asarray(images) % 1 != 0).any((1, 2, 3)))
    assert all(0 < kind.mean() < 1 for kind in blended)
    first, second = np.concatenate([kind[::2] for kind in blended]), np.concatenate([kind[1::2] for kind in blended])
    assert abs((first != second).mean() - 0.5) < 5 * 0.5 / len(first) ** 0.5, 'neighbours draw independently'


def test_on_false_changes_nothing():
    """Recipes switch mixing off in the last epochs, and no metric would show that it is still on."""
    images, targets = run(jax.random.key(0), False, mixup=0.8, cutmix=1.0)
    np.testing.assert_array_equal(images, numbered()[0])
    np.testing.assert_array_equal(targets, numbered()[1])


def test_bad_arguments():
    """A bad value would cause an obscure error inside JAX, not one line that names it."""
    images, targets = numbered(3)
    with pytest.raises(UserError, match='batch_size=3 must be even'):
        mix(images, targets, jax.random.key(0), mixup=0.8, cutmix=0.0, mode='batch')
    with pytest.raises(UserError, match="mix.mode must be 'batch' or 'elem', not 'pair'"):
        mix(*numbered(), jax.random.key(0), mixup=0.8, cutmix=0.0, mode='pair')
