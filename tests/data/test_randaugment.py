"""RandAugment on the device, compared with Pillow's operations and with timm's arguments from `tests/reference`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from convnext_jax.data.randaugment import (
    IDENTITY,
    OPERATIONS,
    RandAugment,
    apply_operations,
    operation_argument,
    parse_randaugment,
    rand_augment,
)
from convnext_jax.errors import UserError
from tests import reference
from tests.reference import cases

FILL = (124, 116, 104)
TRANSFORM = {'resample': Image.Resampling.BICUBIC, 'fillcolor': FILL}


def affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, **TRANSFORM)


# The Pillow functions that timm's operations call.
PILLOW = {
    'AutoContrast': lambda image, _: ImageOps.autocontrast(image),
    'Equalize': lambda image, _: ImageOps.equalize(image),
    'Invert': lambda image, _: ImageOps.invert(image),
    'Rotate': lambda image, degrees: image.rotate(degrees, **TRANSFORM),
    'Posterize': lambda image, bits: ImageOps.posterize(image, int(bits)),
    'Solarize': lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    'SolarizeAdd': lambda image, add: image.point([min(255, i + int(add)) if i < 128 else i for i in range(256)] * 3),
    'Color': lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    'Contrast': lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    'Brightness': lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    'Sharpness': lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    'ShearX': lambda image, factor: affine(image, 1, factor, 0, 0, 1, 0),
    'ShearY': lambda image, factor: affine(image, 1, 0, 0, factor, 1, 0),
    'TranslateX': lambda image, fraction: affine(image, 1, 0, fraction * image.width, 0, 1, 0),
    'TranslateY': lambda image, fraction: affine(image, 1, 0, 0, 0, 1, fraction * image.height),
}
ARGUMENTS = {
    'AutoContrast': [0],
    'Equalize': [0],
    'Invert': [0],
    'Rotate': [-30, -7.3, 13, 30],
    'Posterize': [1, 3, 4, 8],
    'Solarize': [0, 26, 128, 256],
    'SolarizeAdd': [0, 50, 110],
    'ShearX': [-0.3, 0.11, 0.3],
    'ShearY': [-0.3, 0.11, 0.3],
    'TranslateX': [-0.45, 0.1, 0.3],
    'TranslateY': [-0.45, 0.1, 0.3],
}
ENHANCEMENTS = [0.1, 0.6, 1.0, 1.37, 1.9]
CASES = [(name, argument) for name in OPERATIONS for argument in ARGUMENTS.get(name, ENHANCEMENTS)]

argument = jax.jit(operation_argument, static_argnums=3)
apply = jax.jit(lambda images, operation, argument: apply_operations(images, operation, argument, FILL))


@pytest.fixture(scope='module')
def photos():
    """Four smooth images with edges and noise, like photographs, one of a single value and a dark one; not square."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(4):
        coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        pixels = np.array(coarse.resize((72, 60), Image.Resampling.BICUBIC), np.int32)
        pixels[20:35, 10:40] += 60
        images.append(np.clip(pixels + rng.normal(0, 3, pixels.shape), 0, 255))
    images += [np.full((60, 72, 3), 77), images[0] // 4]
    return np.stack(images).astype(np.uint8)


def differences(photos, name, argument):
    count = len(photos)
    ours = apply(photos, jnp.full(count, OPERATIONS.index(name)), jnp.full(count, argument, jnp.float32))
    theirs = np.stack([np.asarray(PILLOW[name](Image.fromarray(image), argument)) for image in photos])
    return np.abs(np.asarray(ours, np.int32) - theirs)


@pytest.mark.parametrize(('name', 'argument'), [case for case in CASES if case[0] != 'Rotate'])
def test_differs_from_pillow_by_at_most_1(photos, name, argument):
    """Published recipes use Pillow's operations: another contrast or border would be another recipe."""
    difference = differences(photos, name, argument)
    assert difference.max() <= 1
    assert difference.mean() < 0.02


@pytest.mark.parametrize('degrees', ARGUMENTS['Rotate'])
def test_rotation_is_close_to_pillow(photos, degrees):
    """Rotations are resampled three times, not once: larger differences than these would be another recipe."""
    difference = differences(photos, 'Rotate', degrees)
    assert difference.mean() < 1.5
    assert np.percentile(difference, 99) <= 12


def test_each_image_gets_only_its_own_operation(photos):
    """One program computes all operations, so an image could get the operation of another image."""
    names = ['Equalize', 'Rotate', 'Color', 'ShearX']
    operation = jnp.asarray([*map(OPERATIONS.index, names), IDENTITY, IDENTITY])
    argument = jnp.asarray([0, 20, 0.3, 0.2, 0.7, -0.7])
    together = np.asarray(apply(photos, operation, argument))
    for i, name in enumerate(names):
        alone = apply(photos, jnp.full(6, OPERATIONS.index(name)), jnp.full(6, argument[i]))
        np.testing.assert_array_equal(together[i], alone[i], err_msg=name)
    np.testing.assert_array_equal(together[4:], photos[4:])


def test_greyscale_images_support_every_operation(photos):
    """The recipes would fail for Fashion-MNIST, which has one channel."""
    grey = photos[:, :, :, :1]
    run = jax.jit(lambda images, operation: apply_operations(images, operation, jnp.full(6, 0.5), FILL[:1]))
    for number, name in enumerate(OPERATIONS):
        out = np.asarray(run(grey, jnp.full(6, number)))
        assert out.shape == grey.shape
        assert (out != grey).any() == (name not in ('Color', 'SolarizeAdd')), name  # it adds 0.5, rounded down


def test_the_program_for_accelerators_equals_that_for_cpu(photos, monkeypatch):
    """Histogram and look-up table have another implementation on accelerators, which tests on CPU do not run."""
    expected = [np.asarray(apply(photos, jnp.full(6, number), jnp.full(6, 3.0))) for number in range(15)]
    take_default = lambda *arrays, default, **_: default(*arrays)  # noqa: E731 - replaces a function
    monkeypatch.setattr('convnext_jax.data.pillow_arithmetic.lax.platform_dependent', take_default)
    run = jax.jit(lambda images, operation, argument: apply_operations(images, operation, argument, FILL))
    for number, image in enumerate(expected):
        np.testing.assert_array_equal(run(photos, jnp.full(6, number), jnp.full(6, 3.0)), image)


@pytest.mark.parametrize('increasing', [False, True])
@pytest.mark.parametrize('level', cases.LEVELS)
def test_arguments_equal_timm(level, increasing):
    """With other arguments, the augmentation would be stronger or weaker than the recipe's."""
    stored = reference.table('randaugment')['increasing' if increasing else 'plain'][str(level)]
    assert [name.removesuffix('Increasing').removesuffix('Rel') for name, _ in stored] == list(OPERATIONS)
    for number, (name, theirs) in enumerate(stored):
        if theirs is not None:
            ours = {float(argument(number, level, negate, increasing)) for negate in (True, False)}
            np.testing.assert_allclose(sorted(ours), theirs, rtol=1e-6, err_msg=name)


def test_operations_are_uniform_and_magnitudes_follow_the_policy():
    """No metric would show an operation that is never used, or always."""
    policy = RandAugment(magnitude=9.0, magnitude_std=0.5, probability=0.5, increasing=True)
    from convnext_jax.data.randaugment import _draw

    operation, argument = jax.jit(jax.vmap(lambda key: _draw(key, policy)))(jax.random.split(jax.random.key(0), 30000))
    counts = np.bincount(np.asarray(operation), minlength=16)
    assert abs(counts[IDENTITY] - 15000) < 5 * 87
    assert np.abs(counts[:15] - 1000).max() < 5 * 31
    degrees = np.asarray(argument)[np.asarray(operation) == OPERATIONS.index('Rotate')]
    assert np.abs(degrees).max() <= 30
    assert abs(np.abs(degrees).mean() - 26.9) < 0.4
    assert abs((degrees < 0).mean() - 0.5) < 0.08


def test_the_draw_of_an_image_depends_on_its_key_only(photos):
    """Gradient accumulation, sharding or another batch size would change the run."""
    policy = parse_randaugment('rand-m9-mstd0.5-inc1')
    run = jax.jit(lambda images, keys: rand_augment(images, keys, policy, FILL))
    keys = jax.random.split(jax.random.key(0), 6)
    out = np.asarray(run(photos, keys))
    order = np.asarray([3, 1, 0, 5, 4, 2])
    np.testing.assert_array_equal(run(photos[order], keys[order]), out[order])
    assert (np.asarray(run(photos, jax.random.split(jax.random.key(1), 6))) != out).any()


def test_parse_randaugment():
    """The policy of the published recipe would be read wrongly."""
    policy = parse_randaugment('rand-m9-mstd0.5-inc1')
    assert policy == RandAugment(magnitude=9.0, magnitude_std=0.5, layers=2, probability=0.5, increasing=True)
    assert parse_randaugment('rand-m5-n3-p1') == RandAugment(magnitude=5.0, layers=3, probability=1.0)


@pytest.mark.parametrize(
    'text', ['augmix-m3', 'rand-m9-w0', 'rand-m11', 'rand-mstd', 'rand-n0', 'rand-n1.5', 'rand-p2']
)
def test_invalid_policies_are_refused(text):
    """A misspelt policy would silently be another one."""
    with pytest.raises(UserError, match=f"augment.policy='{text}'"):
        parse_randaugment(text)
