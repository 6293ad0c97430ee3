"""The overlapping stems against float64 numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import build, some_images

from convnext_jax.errors import UserError
from convnext_jax.models import VARIANTS, Execution, Variant
from convnext_jax.models.masked import Visible
from convnext_jax.models.stems import OverlapStem


def halving_conv(x, conv):
    """A 3×3 convolution of stride 2 with a padding of 1, in numpy."""
    kernel, bias = np.asarray(conv.kernel[...], np.float64), np.asarray(conv.bias[...], np.float64)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = -(-x.shape[1] // 2), -(-x.shape[2] // 2)
    y = np.zeros((len(x), rows, columns, len(bias))) + bias
    for row in range(rows):
        for column in range(columns):
            window = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            y[:, row, column] += np.einsum('nijc,ijco->no', window, kernel)
    return y


@pytest.mark.parametrize('kind', ['overlap', 'overlap_act', 'overlap_tiered'])
def test_values_equal_float64(kind):
    """timm's models with these stems would give other logits. The sides of the image are not multiples of 4."""
    variant = Variant((1,), (40,), stem=kind)
    stem = OverlapStem(3, variant=variant, execution=Execution(), key=jax.random.key(0))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 9, 14, 3)).astype(np.float32)
    for conv in (stem.first_conv, stem.second_conv):
        conv.kernel[...] *= 10
        conv.bias[...] = rng.standard_normal(conv.bias.shape).astype(np.float32)
    y = halving_conv(x, stem.first_conv)
    if kind == 'overlap_act':
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / 2**0.5))
    y = halving_conv(y, stem.second_conv)
    expected = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(stem(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('name', 'channels'), {'convnext_atto_ols': 24, 'convnext_femto_ols': 24, 'convnext_pico_ols': 32}.items()
)
def test_a_tiered_stem_has_the_channels_of_timm(name, channels):
    """Published weights would not fit: half of the channels are rounded to a multiple of 8."""
    assert VARIANTS[name].stem_channels == channels


def test_a_stem_of_stride_4_refuses_another_patch_size():
    """The option would be ignored."""
    with pytest.raises(UserError, match="patch_size=2: the stem 'overlap' always has stride 4"):
        Variant((1,), (8,), stem='overlap').replace(patch_size=2)


def test_masks_need_a_patch_stem():
    """The pixels of invisible patches would have an effect on visible ones."""
    model = build(Variant((1, 1), (8, 16), stem='overlap'))
    with pytest.raises(UserError, match="the stem 'overlap' mixes neighbouring patches"):
        model.features(some_images(), visible=Visible(jnp.ones((16, 2, 2), bool)))
