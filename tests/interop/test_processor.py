"""ImageProcessor, compared with the processors of transformers and timm in `tests/reference`."""

import json

import numpy as np
import pytest
from PIL import Image

from convnext_jax import ImageProcessor
from convnext_jax.errors import UserError
from tests import reference
from tests.reference import cases
from tests.reference.cases import picture


@pytest.fixture(scope='module')
def stored():
    """The pictures as processed by transformers and timm."""
    return reference.arrays('processors')


def assert_equals_sketch(array, sketch):
    """Compares the stored values exactly, and the sums up to rounding."""
    ours, half = reference.sketch(array), len(sketch) // 2
    np.testing.assert_array_equal(ours[:half], sketch[:half])
    np.testing.assert_allclose(ours[half:], sketch[half:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('config', range(len(cases.PROCESSORS)))
@pytest.mark.parametrize('size', cases.PICTURES)
def test_every_value_equals_the_reference(stored, config, size):
    """Other pixels would cost published models a part of their accuracy."""
    ours = ImageProcessor.from_huggingface(cases.PROCESSORS[config])(picture(*size))[0]
    assert_equals_sketch(ours, stored[f'{config}/{size[0]}x{size[1]}'])


def test_files_of_other_modes_equal_the_reference(stored, tmp_path):
    """Greyscale, palette or CMYK files would give other pixels than in transformers."""
    ours = ImageProcessor.from_huggingface({'size': {'shortest_edge': 64}})
    for mode, path in cases.write_pictures(tmp_path).items():
        assert_equals_sketch(ours(path)[0], stored[f'file/{mode}'])


def test_sixteen_bits_are_scaled(tmp_path):
    """16-bit images would become white, as in transformers, which converts them by Pillow without scaling."""
    values = (np.arange(90 * 70).reshape(70, 90) * 9).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / 'deep.png')
    ours = ImageProcessor(size=64)
    expected = ours(Image.fromarray(np.uint8(np.round(values / 257))).convert('RGB'))[0]
    with Image.open(tmp_path / 'deep.png') as opened:
        for image in (tmp_path / 'deep.png', opened):
            np.testing.assert_array_equal(ours(image)[0], expected)


def test_a_file_is_rotated_by_exif_and_a_pillow_image_is_not(tmp_path):
    """Photographs from phones would be classified sideways."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(90, 70).save(tmp_path / 'rotated.jpg', exif=exif)
    ours = ImageProcessor(size=64)
    upright = ours(tmp_path / 'rotated.jpg')[0]
    with Image.open(tmp_path / 'rotated.jpg') as image:
        np.testing.assert_array_equal(upright, ours(image.transpose(Image.Transpose.ROTATE_270))[0])
        assert np.abs(ours(image)[0] - upright).max() > 0.1


def test_arrays_lists_and_paths_give_equal_results(stored, tmp_path):
    """The result would depend on the type of the argument."""
    image = picture(90, 70)
    image.save(tmp_path / 'image.png')
    processor = ImageProcessor(size=64)
    expected = processor(image)
    assert expected.shape == (1, 64, 64, 3)
    assert expected.dtype == np.float32
    array = np.asarray(image)
    for given in (array, array[None], [array, array], [tmp_path / 'image.png'], str(tmp_path / 'image.png')):
        for result in processor(given):
            np.testing.assert_array_equal(result, expected[0])
    assert_equals_sketch(ImageProcessor.from_huggingface({'size': 64})(cases.float_picture())[0], stored['floats'])


def test_the_config_file_round_trips(tmp_path):
    """A saved processor would prepare images differently."""
    processor = ImageProcessor(size=288, crop_pct=0.95, resample=2, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    processor.save(tmp_path)
    assert ImageProcessor.from_pretrained(tmp_path) == processor


@pytest.mark.parametrize('number', range(len(cases.TIMM_PROCESSORS)))
def test_the_processor_of_a_timm_folder_equals_timm(stored, tmp_path, number):
    """Other pixels would cost timm's models accuracy. (The margins here are even; see `from_timm` for odd ones.)"""
    config = {'architecture': 'convnext_tiny', 'pretrained_cfg': cases.TIMM_PROCESSORS[number]}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    ours = ImageProcessor.from_pretrained(tmp_path)(picture(400, 500))[0]
    np.testing.assert_allclose(reference.sketch(ours), stored[f'timm/{number}'], atol=1e-5)


@pytest.mark.parametrize(
    ('config', 'match'),
    [
        ({'size': {'height': 224, 'width': 224}}, 'size must have a shortest_edge'),
        (
            {'image_processor_type': 'SegformerImageProcessor', 'size': {'height': 512, 'width': 640}},
            'height and width must be equal',
        ),
        ({'size': 224, 'do_resize': False}, 'do_resize=false'),
        ({'size': 10**6}, 'must be in'),
        ({'size': 224, 'crop_pct': 2}, 'crop_pct must be in'),
        ({'size': 224, 'resample': 9}, 'resample must be one of'),
        ({'size': 224, 'image_std': [0, 1, 1]}, 'std above 0'),
        ({'size': 224, 'image_mean': ['a', 'b', 'c']}, 'needs numbers'),
        ({'size': 224, 'image_mean': [0.5, 0.5, float('inf')]}, 'needs numbers'),
        ({'size': 224, 'rescale_factor': float('nan')}, 'needs numbers'),
        ({'size': 224, 'crop_pct': 1e-300}, 'crop_pct must be in'),
        ({'size': 224, 'resample': 3.0}, 'resample must be one of'),
    ],
)
def test_an_unsupported_config_is_refused(config, match):
    """Images would silently be prepared differently."""
    with pytest.raises(UserError, match=match):
        ImageProcessor.from_huggingface(config)


def test_timm_s_test_size_and_crop_are_an_option():
    """The published accuracy could not be reproduced, or training would use the larger size."""
    config = {'input_size': [3, 224, 224], 'crop_pct': 0.875, 'interpolation': 'bicubic'}
    test = {'test_input_size': [3, 288, 288], 'test_crop_pct': 0.95}
    train, tested = ImageProcessor.from_timm(config | test), ImageProcessor.from_timm(config | test, test=True)
    assert (train.size, train.crop_pct, tested.size, tested.crop_pct) == (224, 0.875, 288, 0.95)
    assert ImageProcessor.from_timm(config | dict.fromkeys(test), test=True) == train


@pytest.mark.parametrize('side', [224, 256])
def test_the_processor_of_dinov3_does_not_crop(side):
    """Images for DINOv3 (224) and EUPE (256) would lose their borders."""
    config = {'image_processor_type': 'DINOv3ViTImageProcessorFast', 'size': {'height': side, 'width': side}}
    processor = ImageProcessor.from_huggingface(config | {'resample': 2})
    assert (processor.size, processor.squashes, processor.resample) == (side, True, 2)
    assert ImageProcessor.from_huggingface(processor.to_dinov3()) == processor
    assert ImageProcessor.from_huggingface(ImageProcessor().to_dinov3()) == ImageProcessor()
    wide = Image.fromarray(np.repeat(np.arange(0, 250, 5, np.uint8)[None], 20, 0))
    pixels = processor.resize(wide)
    assert (pixels[:, 0].max(), pixels[:, -1].min()) == (0, 245)


def test_one_number_is_used_for_three_channels_and_timm_gets_the_factor():
    """timm, which always divides by 255, would get images in another range."""
    processor = ImageProcessor.from_huggingface(
        {'size': 224, 'image_mean': 1, 'image_std': 1, 'rescale_factor': 1 / 127.5}
    )
    assert processor.mean == (1, 1, 1)
    assert processor.to_timm()['mean'] == pytest.approx([0.5] * 3)


def test_invalid_images_are_refused(tmp_path):
    """An error of NumPy or Pillow would not say which image is wrong."""
    Image.new('L', (1, 40_000)).save(tmp_path / 'thin.png')
    (tmp_path / 'text.jpg').write_text('not an image')
    for image, match in (
        (tmp_path / 'text.jpg', 'cannot be decoded as an image'),
        (tmp_path / 'gone.jpg', 'gone.jpg cannot be read: No such file or directory'),
        (np.zeros((4, 4, 7), np.uint8), 'has shape'),
        (np.zeros((4, 4), np.int64), 'not uint8 or float'),
        (np.full((4, 4), 3.0), r'outside \[0, 1\]'),
        (np.full((4, 4), np.nan), r'outside \[0, 1\]'),
        ([], 'no images'),
        ([3], 'image 0 is a int'),
        (3, 'must be one image or a sequence'),
        (tmp_path / 'thin.png', 'is too narrow'),
    ):
        with pytest.raises(UserError, match=match):
            ImageProcessor()(image)
