"""Images with any number of channels: .npy and TIFF files, from the folder to a prediction."""

import io
import json
import sys

import numpy as np
import pytest
from conftest import strict_json
from PIL import Image

import eval as eval_command
import train as train_command
from convnext_jax import __main__ as package_command
from convnext_jax.data.arrays import NPY, decode_array
from convnext_jax.data.decode import decode, decode_channels, eval_resize, train_crop, upright_size
from convnext_jax.data.image_files import find_images
from convnext_jax.data.labelled_images import EvalImages
from convnext_jax.data.measure import mean_and_std
from convnext_jax.data.sources import EncodedImage, open_source
from convnext_jax.errors import UserError
from convnext_jax.interop import ImageProcessor, read_pretrained
from convnext_jax.training.weights import read_weights

CHANNELS = 5


def npy(pixels) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    return buffer.getvalue()


def tiff(pages, **arguments) -> bytes:
    buffer = io.BytesIO()
    first, *others = [Image.fromarray(page) for page in pages]
    first.save(buffer, 'TIFF', save_all=True, append_images=others, **arguments)
    return buffer.getvalue()


def draw(dtype, shape=(9, 12, CHANNELS)):
    values = np.random.default_rng(0).random(shape)
    return (values * 7 - 3).astype(dtype) if dtype == np.float32 else (values * np.iinfo(dtype).max).astype(dtype)


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize('encode', [npy, lambda x: npy(np.asfortranarray(x)), lambda x: tiff(np.moveaxis(x, 2, 0))])
def test_integers_are_divided_by_their_largest_value_and_floats_are_unchanged(dtype, encode):
    """The mean and std that the user gives would belong to other values."""
    pixels = draw(dtype)
    scale = 1 if dtype == np.float32 else np.iinfo(dtype).max
    decoded = np.asarray(decode_array(encode(pixels), CHANNELS, 'a'))
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, pixels.astype(np.float32) / np.float32(scale))


def test_a_page_with_several_channels_needs_tifffile(monkeypatch):
    """Files of satellite images have all channels on one page, and users would not know how to read them."""
    content = tiff([draw(np.uint8, (8, 6, 4))])
    monkeypatch.setitem(sys.modules, 'tifffile', None)
    with pytest.raises(UserError, match='pip install tifffile imagecodecs to read it'):
        decode_array(content, 4, 'a.tif')


@pytest.mark.parametrize('planar', ['contig', 'separate'])
@pytest.mark.parametrize('compression', [None, 'lzw'])
def test_tifffile_reads_pages_with_several_channels(planar, compression):
    """The height or the width would be used as the channel axis."""
    tifffile = pytest.importorskip('tifffile', reason='tifffile is not installed')
    if compression:
        pytest.importorskip('imagecodecs', reason='imagecodecs is not installed')
    pixels, buffer = draw(np.uint16, (8, 6, CHANNELS)), io.BytesIO()
    stored = pixels if planar == 'contig' else np.moveaxis(pixels, 2, 0)
    tifffile.imwrite(buffer, stored, photometric='minisblack', planarconfig=planar, compression=compression)
    decoded = np.asarray(decode_array(buffer.getvalue(), CHANNELS, 'a'))
    np.testing.assert_array_equal(decoded, pixels.astype(np.float32) / np.float32(65535))


@pytest.mark.parametrize(
    ('content', 'line'),
    [
        (npy(draw(np.uint8, (5, 9, 12))), r'a has the shape \(5, 9, 12\), not \(height, width, 5\)'),
        (npy(draw(np.uint8, (9, 12))), r'a has the shape \(9, 12, 1\), not'),
        (npy(np.zeros((2, 2, 5), np.int16)), 'a is int16, whose range is unknown: save it as uint8, uint16 or float32'),
        (npy(np.full((2, 2, 5), np.nan, np.float32)), 'a contains NaN or infinity'),
        (npy(np.full((2, 2, 5), 1e300)), 'a contains NaN or infinity'),
        (npy(np.array([{}], object)), 'a contains object, not numbers'),
        (npy(draw(np.uint8))[:-1], r'its size does not fit its shape \(9, 12, 5\)'),
        (NPY + b'\x01\x00\x08\x00garbage\n', 'a is not a complete .npy file'),
        (NPY + b'\x09\x00', 'a is not a complete .npy file'),
        (NPY + b'\x01\x00\x02\x00{\n', 'a is not a complete .npy file'),
        (tiff(np.moveaxis(draw(np.uint8), 2, 0))[:200], 'a cannot be decoded as a TIFF image'),
        (tiff([np.zeros((4, 4), np.uint8), np.zeros((4, 3), np.uint8)]), 'a cannot be decoded as a TIFF image'),
        (b'\xff\xd8\xff', 'a is neither a .npy nor a TIFF file, which images of 5 channels need'),
    ],
)
def test_what_cannot_be_read_is_named(content, line):
    """A damaged file would end the run with a traceback, and values of unknown range would be trained on silently."""
    with pytest.raises(UserError, match=line):
        decode_channels(content, CHANNELS, 'a')


def test_each_channel_is_cropped_and_resized_as_a_float_image():
    """The channels would be shifted against each other, or rounded to 8 bits."""
    pixels = draw(np.float32, (40, 60, CHANNELS))
    content = npy(pixels)
    crops = train_crop(content, 16, channels=CHANNELS, scale=(0.3, 0.6), seed=(1, 2))
    evaluated = eval_resize(decode_channels(content, CHANNELS, 'a'), 16, 0.8)
    assert (crops.dtype, crops.shape, evaluated.dtype) == (np.float32, (16, 16, CHANNELS), np.float32)
    for channel in range(CHANNELS):
        alone = Image.fromarray(np.ascontiguousarray(pixels[:, :, channel]))
        np.testing.assert_array_equal(evaluated[:, :, [channel]], eval_resize(alone, 16, 0.8))
    repeated = train_crop(npy(pixels[:, :, [0] * 7]), 16, channels=7, scale=(0.3, 0.6), seed=(1, 2))
    np.testing.assert_array_equal(repeated, crops[:, :, [0] * 7])


@pytest.mark.parametrize(('shape', 'channels'), [((9, 12), 1), ((9, 12), 3), ((9, 12, 1), 3), ((9, 12, 3), 3)])
def test_grey_and_rgb_arrays_become_8_bit_images(shape, channels):
    """A .npy file would give other pixels than a PNG file with the same values."""
    pixels = draw(np.uint8, shape)
    image = decode(npy(pixels), channels, 'a')
    reference = Image.fromarray(pixels.reshape(9, 12) if shape[2:] != (3,) else pixels)
    np.testing.assert_array_equal(image, reference.convert('L' if channels == 1 else 'RGB'))
    assert image.size == upright_size(npy(pixels), 'a') == (12, 9)
    floats = np.float32(pixels) / 255
    np.testing.assert_array_equal(decode(npy(floats), channels, 'a'), image)
    with pytest.raises(UserError, match=r'outside \[0, 1\]'):
        decode(npy(floats * 2), channels, 'a')


def test_arrays_beside_photographs_are_not_images(tmp_path):
    """Files of features beside the photographs would end a run that worked before."""
    (tmp_path / 'a.npy').write_bytes(npy(draw(np.uint8)))
    (tmp_path / 'b.TIF').write_bytes(tiff([draw(np.uint8, (2, 3))]))
    assert find_images(tmp_path).paths == [str(tmp_path / 'a.npy'), str(tmp_path / 'b.TIF')]
    Image.new('RGB', (3, 2)).save(tmp_path / 'a.jpg')
    found = find_images(tmp_path)
    assert found.paths == [str(tmp_path / 'a.jpg'), str(tmp_path / 'b.TIF')]
    assert found.left_out == {'.npy files beside photographs': 1}


class Images:
    """A source of encoded images."""

    class_names, multi_label, eval_classes = ('a', 'b'), False, None

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return f'image {index}'

    def __getitem__(self, index):
        return EncodedImage(self.images[index], 0, self.name(index))


def test_mean_and_std_are_those_of_all_pixels():
    """The images would be normalised by the statistics of some of them, or by rounded ones."""
    images = [draw(np.uint16, (height, 7, CHANNELS)) for height in (3, 8, 5)]
    mean, std = mean_and_std(Images(list(map(npy, images))), CHANNELS)
    pixels = np.concatenate([x.reshape(-1, CHANNELS) for x in images]) / 65535
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-6)
    shifted = [np.float32(x) + np.float32(1e4) for x in (draw(np.float32), -draw(np.float32))]
    pixels = np.concatenate([x.reshape(-1, CHANNELS) for x in shifted]).astype(np.float64)
    np.testing.assert_allclose(mean_and_std(Images(list(map(npy, shifted))), CHANNELS)[1], pixels.std(0), rtol=1e-6)
    grey = [draw(np.uint8, (6, 4)), draw(np.uint8, (5, 3))]
    pixels = np.concatenate([x.reshape(-1) for x in grey]) / 255
    np.testing.assert_allclose(mean_and_std(Images(list(map(npy, grey))), 1), [[pixels.mean()], [pixels.std()]])


def test_a_constant_channel_is_refused():
    """Training would refuse the standard deviation of 0 without saying why."""
    with pytest.raises(UserError, match='all pixels have the same value in channel 0, 1'):
        mean_and_std(Images([npy(np.full((2, 2, 2), 0.3))] * 3), 2)
    values = np.random.default_rng(0).random(40, np.float32)  # the variance of constants is not always rounded to 0
    with pytest.raises(UserError, match=f'in channel {", ".join(map(str, range(len(values))))}: '):
        mean_and_std(Images([npy(np.full((37, 41, len(values)), values))] * 3), len(values))


@pytest.fixture
def folder(tmp_path):
    """Two classes of 5-channel images in .npy and TIFF files, which differ in the mean of the last channel."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 8), ('val', 2)):
        for label, name in enumerate('ab'):
            for i in range(count):
                pixels = rng.integers(0, 2000, (24, 20, CHANNELS), dtype=np.uint16)
                pixels[..., -1] += 4000 * label
                path = tmp_path / 'data' / split / name / f'{i}.{"npy" if label else "tif"}'
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(npy(pixels) if label else tiff(np.moveaxis(pixels, 2, 0)))
    return tmp_path / 'data'


CONFIG = (
    *('--config=configs/image_folder.py:atto', '--config.data.image_size=16', '--config.batch_size=8'),
    *('--config.augment.policy=', '--config.augment.crop_padding=2', '--config.augment.erasing=0.0'),
    *('--config.steps=30', '--config.optimizer.warmup_steps=5', '--config.eval_every_steps=30'),
    *('--config.ema.decay=0.0', '--config.model.remat=none', '--config.model.drop_path_rate=0.0'),
)


def test_five_channels_from_the_measurement_to_the_prediction(folder, tmp_path, one_device, small_models, capsys):
    """Images with more channels than RGB could not be used, or only by some of the commands."""

    def package(*arguments):
        capsys.readouterr()
        package_command.main(['convnext_jax', *map(str, arguments)])
        return capsys.readouterr().out

    data = f'--config.data.dir={folder}'
    printed = package('measure', *CONFIG, data, f'--channels={CHANNELS}')
    flags = [line.replace("'", '') for line in printed.splitlines()]
    assert [flag.split('=')[0] for flag in flags] == ['--config.data.mean', '--config.data.std']
    run = tmp_path / 'run'
    train_command.main(['train.py', *CONFIG, data, *flags, f'--workdir={run}'])
    capsys.readouterr()
    eval_command.main(['eval.py', f'--workdir={run}'])
    result = strict_json(capsys.readouterr().out.splitlines()[-1])
    assert (result['images'], result['top1']) == (4, 100)
    photos = folder / 'val'
    predictions = [json.loads(line) for line in package('predict', photos, f'--weights={run}', '--json').splitlines()]
    assert [prediction['best'][0]['name'] for prediction in predictions] == ['a', 'a', 'b', 'b']
    package('convert', run, tmp_path / 'timm', '--layout=timm')
    converted = read_pretrained(tmp_path / 'timm')
    assert (converted.model.in_channels, converted.processor.size) == (CHANNELS, 16)
    np.testing.assert_allclose(converted.processor.mean, read_weights(str(run), 'raw').processor.mean, rtol=1e-12)
    package('prepare', 'folder', f'--manual_dir={folder}', f'--data_dir={tmp_path / "prepared"}', '--name=bands')
    prepared = EvalImages(open_source('bands', str(tmp_path / 'prepared'), 'val'), 16, CHANNELS, crop_pct=1.0)
    assert len(prepared) == 4
    assert prepared.load(0)['image'].shape == (16, 16, CHANNELS)


def test_photographs_and_colours_are_refused(folder, tmp_path, small_models):
    """A run would augment channels as if they were red, green and blue."""
    arguments = (*CONFIG, f'--config.data.dir={folder}', f'--workdir={tmp_path / "run"}')
    five = [f'--config.data.{name}={(0.5,) * CHANNELS}' for name in ('mean', 'std')]
    with pytest.raises(UserError, match=r'change colours, but data.mean has 5 values.*policy=.. --config'):
        train_command.main(['train.py', *arguments, *five, '--config.augment.color_jitter=0.4'])
    with pytest.raises(UserError, match='fcmae needs images of 1 or 3 channels'):
        train_command.main(['train.py', '--config=configs/fcmae.py:atto', *five, f'--workdir={tmp_path / "run"}'])
    with pytest.raises(UserError, match=r'has the shape \(24, 20, 5\), not \(height, width, 3\): data.mean and'):
        decode(npy(draw(np.uint8, (24, 20, 5))), 3, 'a')


def test_a_processor_takes_arrays_of_many_channels():
    """Users of the library would have to write files."""
    processor = ImageProcessor(size=8, crop_pct=1.0, mean=(0.1, 0.2), std=(0.5, 0.25))
    pixels = draw(np.uint16, (8, 8, 2))
    expected = (pixels / 65535 - [0.1, 0.2]) / [0.5, 0.25]
    np.testing.assert_allclose(processor(pixels)[0], expected, atol=1e-6)
    with pytest.raises(UserError, match='must be arrays or files'):
        processor(Image.new('RGB', (8, 8)))
