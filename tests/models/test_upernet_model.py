"""UPerNet: parameter counts, pooling and interpolation against plain numpy, both modes, every output stride."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.errors import UserError
from convnext_jax.models import (
    UPerNet,
    Variant,
    get_parameters,
    get_statistics,
    get_variant,
    parameter_roles,
    with_parameters,
)
from convnext_jax.models.upernet import adaptive_average_pool, resize
from tests import reference
from tests.reference import cases

BOUND = 2e-5  # in standard deviations of the reference, for float32
PUBLISHED = {
    'convnext_tiny': 60_242_636,
    'convnext_small': 81_877_196,
    'convnext_base': 122_102_956,
    'convnext_large': 234_994_796,
    'convnext_xlarge': 391_140_396,
}

call = jax.jit(lambda network, images: network(images))


@jax.jit
def train(network, images, key):
    """The logits of both heads, and the statistics after the call."""
    logits = network.head_logits(images, key=key)
    return logits, get_statistics(network)


@pytest.mark.parametrize(('name', 'count'), PUBLISHED.items())
def test_parameter_counts_equal_those_of_the_published_networks(name, count):
    """The published weights would not fit."""
    network = jax.eval_shape(lambda key: UPerNet(get_variant(name), key=key), jax.random.key(0))
    assert sum(x.size for x in get_parameters(network).values()) == count


@pytest.mark.parametrize('kind', cases.UPERNETS)
@pytest.mark.parametrize('size', cases.UPERNET_SIZES)
def test_equals_the_upernet_of_transformers(kind, size):
    """Published weights would give other masks."""
    stored = reference.arrays('upernets')[f'{kind}/{size[0]}x{size[1]}']
    logits = call(cases.random_upernet(kind), cases.segmented(size)[0])
    assert reference.difference(logits, stored) < BOUND


@pytest.mark.parametrize('bins', [1, 2, 3, 6])
def test_bins_of_the_pooling_overlap_if_they_do_not_divide_the_size(bins):
    """Published weights would get other features at most image sizes."""
    x = reference.draw('pooled', (2, 16, 5, 3))
    expected = np.zeros((2, bins, bins, 3))
    for i, j in np.ndindex(bins, bins):
        rows = slice(16 * i // bins, -(-16 * (i + 1) // bins))
        columns = slice(5 * j // bins, -(-5 * (j + 1) // bins))
        expected[:, i, j] = x[:, rows, columns].mean((1, 2), dtype=np.float64)
    np.testing.assert_allclose(adaptive_average_pool(jnp.asarray(x), bins), expected, atol=1e-6)


@pytest.mark.parametrize('size', [(7, 5), (28, 11), (3, 2), (1, 9)])
def test_interpolation_is_bilinear_between_pixel_centres(size):
    """Masks would be shifted by a part of a pixel, or smoothed where a map is made smaller."""
    x = reference.draw('interpolated', (2, 7, 5, 3))
    expected = x
    for axis, new in zip((1, 2), size, strict=True):
        old = expected.shape[axis]
        position = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(position).astype(int)
        high = np.minimum(low + 1, old - 1)
        weight = (position - low).reshape([-1 if a == axis else 1 for a in range(4)])
        expected = np.take(expected, low, axis) * (1 - weight) + np.take(expected, high, axis) * weight
    np.testing.assert_allclose(resize(jnp.asarray(x), size), expected, atol=1e-5)


@pytest.mark.slow
def test_training_uses_the_statistics_of_the_batch_and_updates_the_running_ones():
    """Fine-tuning would normalise with the statistics of another data set, or inference with those of a batch."""
    network, images = cases.random_upernet('v1'), cases.segmented((64, 96))[0]
    before = get_statistics(network)
    logits, after = train(network, images, jax.random.key(0))
    assert all(bool((before[name] != after[name]).all()) for name in before)
    again, _ = train(with_parameters(network, get_parameters(network) | after), images, jax.random.key(0))
    np.testing.assert_array_equal(logits.main, again.main)
    assert float(jnp.abs(call(network, images) - resize(logits.main, (64, 96))).max()) > 0.1
    inference, unchanged = train(network, images, None)
    assert inference.main.shape == (4, 16, 24, 7)
    assert inference.auxiliary.shape == (4, 4, 6, 7)
    jax.tree.map(np.testing.assert_array_equal, unchanged, before)


def test_dropout_drops_whole_channels_by_the_key_of_the_image():
    """A dropped channel would depend on the other images of the batch, and so on the number of devices."""
    network = cases.random_upernet('v1', dropout_rate=0.5)
    images, keys = cases.segmented((64, 96))[0], jax.random.split(jax.random.key(0), 4)
    first, _ = train(network, images, keys)
    other, _ = train(network, images, keys.at[1:].set(jax.random.split(jax.random.key(1), 3)))
    np.testing.assert_array_equal(first.main[0], other.main[0])
    assert all(float(jnp.abs(first.main[n] - other.main[n]).max()) > 0.1 for n in range(1, 4))
    assert float(jnp.abs(first.auxiliary[1] - other.auxiliary[1]).max()) > 0.1


@pytest.mark.parametrize('stride', [8, 16])
def test_a_dilated_backbone(stride):
    """Segmentation with maps of a higher resolution would not be possible."""
    network = cases.random_upernet('v2', output_stride=stride)
    images = cases.segmented((75, 101))[0]
    assert network.backbone.strides['stage4'] == stride
    assert call(network, images).shape == (4, 75, 101, 7)
    assert get_parameters(network).keys() == get_parameters(cases.random_upernet('v2')).keys()


def test_bfloat16_gives_float32_logits():
    """The loss would be computed from logits of 8 bits."""
    from convnext_jax.models import Execution

    network = cases.random_upernet('v1', execution=Execution('bfloat16'))
    images = cases.segmented((64, 96))[0]
    low, high = call(network, images), call(cases.random_upernet('v1'), images)
    assert low.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(low - high).max() / high.std()) < 0.2


def test_weight_decay_applies_to_kernels_only():
    """The published recipe does not decay norms and biases."""
    roles = parameter_roles(cases.random_upernet('v2'))
    assert {name for name, role in roles.items() if role.decays} == {name for name in roles if 'kernel' in name}


@pytest.mark.parametrize(
    ('arguments', 'match'),
    [
        ({'num_classes': 0}, 'num_classes'),
        ({'pool_scales': ()}, 'pool_scales must be'),
        ({'pool_scales': (0, 2)}, 'pool_scales must be'),
        ({'dropout_rate': 1.0}, 'dropout_rate must be in'),
        ({'variant': Variant((2,), (8,), patch_size=8)}, 'four stages'),
        ({'output_stride': 5}, 'output_stride must be one of'),
    ],
)
def test_bad_arguments(arguments, match):
    """A bad value would cause an obscure error inside JAX, not one line that names it."""
    arguments = {'variant': cases.UPERNETS['v1'], 'key': jax.random.key(0)} | arguments
    with pytest.raises(UserError, match=match):
        jax.eval_shape(lambda key: UPerNet(**(arguments | {'key': key})), jax.random.key(0))


def test_a_single_image_in_training_is_a_user_error():
    """The pooling to one position would divide by a variance of 0."""
    with pytest.raises(UserError, match='increase batch_size'):
        train(cases.random_upernet('v1'), cases.segmented((64, 96))[0][:1], jax.random.key(0))


@pytest.mark.parametrize(('size', 'published'), [('tiny', 939), ('small', 1027), ('base', 1170)])
def test_the_multiply_adds_are_the_published_ones(size, published):
    """The reported utilisation of the accelerators would be wrong. The paper counts an image of 512 × 2048 pixels."""

    def count(**arguments):
        variant = get_variant(f'convnext_{size}')
        network = jax.eval_shape(lambda key: UPerNet(variant, key=key, **arguments), jax.random.key(0))
        return 4 * network.multiply_adds(512) / 1e9

    assert count(auxiliary_channels=0) == pytest.approx(published, abs=1)
    auxiliary = 4 * 32**2 * (9 * get_variant(f'convnext_{size}').widths[2] * 256 + 256 * 150) / 1e9
    assert count() - count(auxiliary_channels=0) == pytest.approx(auxiliary)
