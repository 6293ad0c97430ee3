"""The masked autoencoder: the original's loss, masks, decoder and reconstructions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.errors import UserError
from convnext_jax.models import Variant, create_model, get_parameters, get_variant
from convnext_jax.models.fcmae import (
    MaskedAutoencoder,
    images_of,
    patch_errors,
    patch_statistics,
    patches_of,
    reconstruct,
    split_decoder,
)
from convnext_jax.models.masked import Visible, draw_patches

V2 = Variant((1, 1, 1, 1), (4, 4, 4, 8), grn=True, layer_scale_init=0)
IMAGES = np.random.default_rng(0).standard_normal((2, 64, 96, 3)).astype(np.float32)
VISIBLE = Visible(jnp.asarray([[[1, 0, 0], [0, 1, 0]], [[0, 0, 0], [1, 0, 1]]], bool))


@pytest.fixture(scope='module')
def model():
    return jax.jit(lambda key: MaskedAutoencoder(V2, key=key))(jax.random.key(0))


def test_the_loss_is_the_original_s():
    """Its targets are normalised by patch with the unbiased variance, and only masked patches count."""
    rng = np.random.default_rng(1)
    predicted = rng.standard_normal((2, 2, 3, 32 * 32 * 3)).astype(np.float32)
    masked = ~np.asarray(VISIBLE.patches)
    ours = patch_errors(jnp.asarray(predicted), jnp.asarray(IMAGES))

    # ConvNeXt-V2, models/fcmae.py, on its layout (N, C, H, W).
    images = IMAGES.transpose(0, 3, 1, 2)
    target = np.einsum('nchpwq->nhwpqc', images.reshape(2, 3, 2, 32, 3, 32)).reshape(2, 6, -1)
    target = (target - target.mean(-1, keepdims=True)) / (target.var(-1, ddof=1, keepdims=True) + 1e-6) ** 0.5
    loss, mask = ((predicted.reshape(2, 6, -1) - target) ** 2).mean(-1), masked.reshape(2, 6)
    assert np.sum(np.where(masked, ours, 0)) / masked.sum() == pytest.approx((loss * mask).sum() / mask.sum(), rel=1e-5)


@pytest.mark.slow
def test_masked_pixels_are_not_seen_and_visible_ones_are(model):
    """An encoder or a decoder that sees what it predicts learns nothing."""
    predict = jax.jit(lambda images: model(images, VISIBLE))
    predicted = predict(IMAGES)
    hidden = np.kron(~np.asarray(VISIBLE.patches), np.ones((1, 32, 32), bool))[..., None]
    np.testing.assert_array_equal(predict(np.where(hidden, np.nan, IMAGES)), predicted)
    other = np.asarray(predict(np.where(hidden, IMAGES, -IMAGES)))
    assert np.abs(other - predicted).max((-1, -3, -2)).min() > 1e-4, 'no prediction depends on what is visible'


@pytest.mark.slow
def test_a_mask_token_stands_for_what_the_encoder_did_not_see(model):
    """Without it the decoder cannot tell a masked patch from a black one."""

    def loss(model, patches):
        return jnp.square(model(IMAGES, Visible(patches))).sum()

    gradient = jax.jit(jax.grad(loss))
    assert np.abs(get_parameters(gradient(model, VISIBLE.patches))['decoder.mask_token']).min() > 0
    assert not np.any(get_parameters(gradient(model, jnp.ones((2, 2, 3), bool)))['decoder.mask_token'])


@pytest.mark.parametrize('visible', [1, 19, 48])
def test_masks_have_the_exact_count_and_follow_from_an_image_s_own_key(visible):
    """A mask that depended on the rest of the batch would depend on the devices, and change when a run resumes."""
    keys = jax.random.split(jax.random.key(0), 200)
    patches = np.asarray(draw_patches(keys, 7, 7, visible))
    assert (patches.sum((1, 2)) == visible).all()
    np.testing.assert_array_equal(draw_patches(keys[50:60], 7, 7, visible), patches[50:60])
    assert patches.mean(0).std() < 0.05, 'some patches are drawn more often than others'


def test_reconstructions_of_perfect_predictions_are_the_images():
    """A picture with patches in the wrong order would look like a network that has not learned."""
    patches = patches_of(jnp.asarray(IMAGES))
    np.testing.assert_array_equal(images_of(patches), IMAGES)
    mean, std = patch_statistics(patches)
    np.testing.assert_allclose(reconstruct((patches - mean) / std, jnp.asarray(IMAGES), VISIBLE), IMAGES, atol=1e-5)
    blank = np.asarray(reconstruct(jnp.zeros_like(patches), jnp.asarray(IMAGES), VISIBLE))
    np.testing.assert_array_equal(blank[0, :32, :32], IMAGES[0, :32, :32])
    np.testing.assert_allclose(blank[0, :32, 32:64].std((0, 1)), 0, atol=1e-6)


def test_the_encoder_has_the_names_of_a_classifier():
    """Fine-tuning takes over by name what pre-training learned."""
    autoencoder = jax.eval_shape(lambda key: MaskedAutoencoder(V2, key=key), jax.random.key(0))
    classifier = jax.eval_shape(lambda key: create_model(V2, key=key), jax.random.key(0))
    encoder, decoder = split_decoder(get_parameters(autoencoder))
    shapes = {name: x.shape for name, x in get_parameters(classifier).items()}
    assert {name: x.shape for name, x in encoder.items()} == {
        name: shape for name, shape in shapes.items() if not name.startswith(('norm', 'head'))
    }
    assert decoder.keys() | encoder.keys() == get_parameters(autoencoder).keys()


@pytest.mark.parametrize('name', ['convnext_isotropic_small', 'convnext_atto'])
def test_backbones_of_another_stride_are_refused(name):
    """Their maps do not have one position for each 32-pixel patch."""
    with pytest.raises(UserError, match='FCMAE needs a backbone with a total stride of 32, not (16|64)'):
        MaskedAutoencoder(get_variant(name).replace(patch_size=16 if 'iso' in name else 8), key=jax.random.key(0))
