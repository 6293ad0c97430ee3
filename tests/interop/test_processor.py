"""The same photograph gives the same numbers as in the reference processor."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convnext_jax import ImageProcessor
from convnext_jax.errors import UserError

PHOTOS = Path(__file__).parents[3] / 'shared' / 'data'


@pytest.fixture(scope='module')
def reference():
    module = pytest.importorskip('transformers.models.convnext.image_processing_pil_convnext')
    return module.ConvNextImageProcessorPil


def pixels(processor, image) -> np.ndarray:
    return processor(image, return_tensors='np')['pixel_values'][0].transpose(1, 2, 0)


def picture(width: int, height: int, mode: str = 'RGB') -> Image.Image:
    """Smooth shades with a little noise, as in a photograph."""
    rng = np.random.default_rng(width)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 4), dtype=np.uint8), 'RGBA').resize((width, height))
    noisy = np.asarray(coarse).astype(int) + rng.integers(-9, 10, (height, width, 4))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8), 'RGBA').convert(mode)


CONFIGS = [
    {'size': {'shortest_edge': 224}},
    {'size': {'shortest_edge': 224}, 'resample': 2, 'image_mean': [0.485, 0.456, 0.406], 'image_std': [0.2, 0.3, 0.4]},
    {'size': {'shortest_edge': 288}, 'crop_pct': 0.95, 'do_normalize': False},
    {'size': {'shortest_edge': 383}, 'crop_pct': 1.0},
    {'size': {'shortest_edge': 384}, 'do_rescale': False},
]


@pytest.mark.parametrize('config', CONFIGS)
@pytest.mark.parametrize('size', [(500, 375), (333, 501), (60, 45), (224, 224), (1021, 300)])
def test_every_number_is_the_references(reference, config, size):
    theirs = reference(**config)
    ours = ImageProcessor.from_huggingface(theirs.to_dict())
    assert np.abs(ours(picture(*size))[0] - pixels(theirs, picture(*size))).max() == 0


@pytest.mark.parametrize('folder', ['imagenet_samples', 'clothing'])
def test_every_number_of_real_photographs_is_the_references(reference, folder):
    load_image = pytest.importorskip('transformers.image_utils').load_image
    photos = sorted(path for path in (PHOTOS / folder).rglob('*') if path.suffix.lower() in ('.jpg', '.jpeg'))
    if not photos:
        pytest.skip(f'needs the photographs of {PHOTOS / folder}')
    theirs = reference(size={'shortest_edge': 224})
    ours = ImageProcessor.from_huggingface(theirs.to_dict())
    for path in photos:
        difference = np.abs(ours(path)[0] - pixels(theirs, load_image(str(path)))).max()
        assert difference == 0, path


@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', 'CMYK', 'LA', '1'])
def test_files_of_other_modes_are_read_as_the_reference_reads_them(reference, tmp_path, mode):
    load_image = pytest.importorskip('transformers.image_utils').load_image
    path = tmp_path / ('image.tif' if mode == 'CMYK' else 'image.png')
    picture(90, 70, 'RGB' if mode in ('P', 'CMYK', '1') else mode).convert(mode).save(path)
    theirs = reference(size={'shortest_edge': 64})
    ours = ImageProcessor.from_huggingface(theirs.to_dict())
    assert np.abs(ours(path)[0] - pixels(theirs, load_image(str(path)))).max() == 0


def test_sixteen_bits_are_scaled_where_the_reference_cuts_them_off(reference, tmp_path):
    """transformers converts by Pillow, which makes every value above 255 white; we give it the scaled image instead."""
    load_image = pytest.importorskip('transformers.image_utils').load_image
    values = (np.arange(90 * 70).reshape(70, 90) * 9).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / 'deep.png')
    theirs = reference(size={'shortest_edge': 64})
    ours = ImageProcessor.from_huggingface(theirs.to_dict())
    expected = pixels(theirs, Image.fromarray(np.uint8(np.round(values / 257))).convert('RGB'))
    with Image.open(tmp_path / 'deep.png') as opened:
        for image in (tmp_path / 'deep.png', opened):
            assert np.abs(ours(image)[0] - expected).max() == 0
    assert np.asarray(load_image(str(tmp_path / 'deep.png'))).mean() > 250


def test_a_file_is_turned_upright_and_a_pillow_image_is_not(reference, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(90, 70).save(tmp_path / 'turned.jpg', exif=exif)
    load_image = pytest.importorskip('transformers.image_utils').load_image
    theirs = reference(size={'shortest_edge': 64})
    ours = ImageProcessor.from_huggingface(theirs.to_dict())
    upright = ours(tmp_path / 'turned.jpg')[0]
    assert np.abs(upright - pixels(theirs, load_image(str(tmp_path / 'turned.jpg')))).max() == 0
    with Image.open(tmp_path / 'turned.jpg') as image:
        assert np.abs(ours(image)[0] - upright).max() > 0.1


def test_arrays_lists_and_paths_give_the_same(reference, tmp_path):
    image = picture(90, 70)
    image.save(tmp_path / 'image.png')
    processor = ImageProcessor(size=64)
    expected = processor(image)
    assert expected.shape == (1, 64, 64, 3)
    assert expected.dtype == np.float32
    array = np.asarray(image)
    for same in (array, array[None], [array, array], [tmp_path / 'image.png'], str(tmp_path / 'image.png')):
        for row in processor(same):
            np.testing.assert_array_equal(row, expected[0])
    floats = np.random.default_rng(0).random((70, 90, 3), dtype=np.float32)
    theirs = reference(size={'shortest_edge': 64})(floats, do_rescale=False, return_tensors='np')['pixel_values'][0]
    ours = ImageProcessor.from_huggingface({'size': 64})(floats)[0]
    np.testing.assert_array_equal(ours, theirs.transpose(1, 2, 0))


def test_the_config_file_comes_back(reference, tmp_path):
    processor = ImageProcessor(size=288, crop_pct=0.95, resample=2, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    processor.save(tmp_path)
    assert ImageProcessor.from_pretrained(tmp_path) == processor
    theirs = reference.from_pretrained(tmp_path)
    assert np.abs(processor(picture(300, 400))[0] - pixels(theirs, picture(300, 400))).max() == 0


def test_timm_prepares_the_same(tmp_path):
    """Where the margin is even; of an odd one timm crops half a pixel further, and Hugging Face half a pixel less."""
    timm = pytest.importorskip('timm')
    for images in (
        {'input_size': [3, 224, 224], 'crop_pct': 0.875, 'interpolation': 'bicubic'},
        {'input_size': [3, 384, 384], 'crop_pct': 1.0, 'interpolation': 'bicubic', 'crop_mode': 'squash'},
        {'input_size': [3, 384, 384], 'crop_pct': 1.0, 'interpolation': 'bilinear'},
    ):
        (tmp_path / 'config.json').write_text(json.dumps({'architecture': 'convnext_tiny', 'pretrained_cfg': images}))
        ours = ImageProcessor.from_pretrained(tmp_path)
        values = {**images, 'input_size': tuple(images['input_size'])}
        theirs = timm.data.create_transform(**values, mean=ours.mean, std=ours.std)
        expected = theirs(picture(400, 500)).numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(ours(picture(400, 500))[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ('config', 'match'),
    [
        ({'size': {'height': 224, 'width': 224}}, 'size must have a shortest_edge'),
        ({'size': 224, 'do_resize': False}, 'do_resize=false'),
        ({'size': 10**6}, 'must be in'),
        ({'size': 224, 'crop_pct': 2}, 'crop_pct must be in'),
        ({'size': 224, 'resample': 9}, 'resample must be one of'),
        ({'size': 224, 'image_std': [0, 1, 1]}, 'std above 0'),
        ({'size': 224, 'image_mean': ['a', 'b', 'c']}, 'takes numbers'),
        ({'size': 224, 'image_mean': [0.5, 0.5, float('inf')]}, 'takes numbers'),
        ({'size': 224, 'rescale_factor': float('nan')}, 'takes numbers'),
        ({'size': 224, 'crop_pct': 1e-300}, 'crop_pct must be in'),
        ({'size': 224, 'resample': 3.0}, 'resample must be one of'),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(config, match):
    with pytest.raises(UserError, match=match):
        ImageProcessor.from_huggingface(config)


def test_one_number_stands_for_three_channels_and_timm_gets_the_factor():
    processor = ImageProcessor.from_huggingface(
        {'size': 224, 'image_mean': 1, 'image_std': 1, 'rescale_factor': 1 / 127.5}
    )
    assert processor.mean == (1, 1, 1)
    assert processor.to_timm()['mean'] == pytest.approx([0.5] * 3)


def test_what_is_no_image_is_refused(tmp_path):
    Image.new('L', (1, 40_000)).save(tmp_path / 'thin.png')
    (tmp_path / 'text.jpg').write_text('not an image')
    for image, match in (
        (tmp_path / 'text.jpg', 'cannot be decoded as an image'),
        (tmp_path / 'gone.jpg', 'gone.jpg cannot be read: No such file or directory'),
        (np.zeros((4, 4, 7), np.uint8), 'has shape'),
        (np.zeros((4, 4), np.int64), 'not uint8 or float'),
        (np.full((4, 4), 3.0), 'outside 0 to 1'),
        (np.full((4, 4), np.nan), 'outside 0 to 1'),
        ([], 'no images'),
        ([3], 'image 0 is a int'),
        (3, 'must be an image or many'),
        (tmp_path / 'thin.png', 'is too thin'),
    ):
        with pytest.raises(UserError, match=match):
            ImageProcessor()(image)
