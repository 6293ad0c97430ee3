"""Padded images: UPerNet's logits inside an image are the logits of the image without padding."""

import jax
import numpy as np
import pytest

from convnext_jax.models import Backbone, Variant
from convnext_jax.models.extent import Extent
from tests import reference
from tests.reference import cases

CANVAS = (210, 140)
BOUND = 2e-5  # in standard deviations of the reference, for float32

logits_of_sizes = jax.jit(lambda network, images, sizes: network(images, sizes=sizes))


def padded(images, canvas):
    """The images with padding that is not 0, and their sizes."""
    below, right = (new - old for new, old in zip(canvas, images.shape[1:3], strict=True))
    widths = ((0, 0), (0, below), (0, right), (0, 0))
    return np.pad(images, widths, constant_values=5), np.full((len(images), 2), images.shape[1:3])


@pytest.mark.parametrize('kind', cases.UPERNETS)
def test_the_padding_does_not_change_the_logits(kind):
    """Images of another size would get other masks than in mmsegmentation, or each size would need its own program."""
    examples = [padded(cases.segmented(size)[0], CANVAS) for size in cases.UPERNET_SIZES]
    images, sizes = (np.concatenate(arrays) for arrays in zip(*examples, strict=True))
    logits = np.asarray(logits_of_sizes(cases.random_upernet(kind), images, sizes))
    for found, size in zip(np.split(logits, len(examples)), cases.UPERNET_SIZES, strict=True):
        stored = reference.arrays('upernets')[f'{kind}/{size[0]}x{size[1]}']
        assert reference.difference(found[:, : size[0], : size[1]], stored) < BOUND


def test_padding_with_an_overlapping_stem_and_a_dilated_stage():
    """These networks read more positions of padding than the published ones."""
    variant = Variant((1, 1), (4, 8), grn=True, layer_scale_init=0, stem='overlap_act')
    backbone = Backbone(variant, key=jax.random.key(0), output_stride=4)
    images = reference.draw('dilated', (2, 15, 23, 3))
    batch, sizes = padded(images, (24, 32))
    maps = jax.jit(lambda backbone, images, sizes: backbone(images, extent=Extent(sizes)))(backbone, batch, sizes)
    for name, expected in jax.jit(backbone)(images).items():
        np.testing.assert_allclose(maps[name][:, :4, :6], expected, atol=1e-4, err_msg=name)


def test_an_image_that_is_smaller_than_the_largest_stride_is_enlarged_with_zeros():
    """A strip of a few rows would have feature maps without positions, and logits that are NaN."""
    network, sizes = cases.random_upernet('v1'), np.full((12, 2), (7, 40))
    batch = reference.draw('strips', (12, *CANVAS, 3))
    logits = logits_of_sizes(network, batch, sizes)[:, :7, :40]
    assert np.isfinite(logits).all()
    batch[:, 7:] += 1
    np.testing.assert_array_equal(logits_of_sizes(network, batch, sizes)[:, :7, :40], logits)
