"""Image decoding: file formats and modes, the evaluation resize, and the training crop."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps

from convnext_jax.data import decode as decode_module
from convnext_jax.data.decode import convert_mode, decode, decode_rgb, eval_resize, resize, train_crop, upright_size
from convnext_jax.errors import UserError

SAMPLES = Path(__file__).parents[3] / 'shared' / 'data' / 'imagenet_samples'
COLOUR = (200, 30, 90)


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def with_palette(alpha):
    """A palette image of COLOUR; with `alpha` all entries of the palette have this opacity."""
    image = Image.new('RGB', (9, 7), COLOUR).convert('P', palette=Image.Palette.ADAPTIVE)
    if alpha is not None:
        image.info['transparency'] = bytes([alpha] * 256)
    return image


def solid(mode, value):
    if mode.startswith('I;16'):
        return Image.fromarray(np.full((7, 9), value, '>u2' if mode == 'I;16B' else '<u2'))
    if mode == 'LAB':
        srgb, lab = ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB')
        return ImageCms.profileToProfile(Image.new('RGB', (9, 7), value), srgb, lab, outputMode='LAB')
    if mode in ('YCbCr', 'HSV', 'CMYK'):
        return Image.new('RGB', (9, 7), value).convert(mode)
    return Image.new(mode, (9, 7), value)


MODES = {  # an image of each Pillow mode and its RGB value; transparency is dropped, as in timm and torchvision
    '1': (solid('1', 1), (255, 255, 255)),
    'L': (solid('L', 90), (90, 90, 90)),
    'LA': (solid('LA', (90, 40)), (90, 90, 90)),
    'La': (solid('La', (20, 64)), (80, 80, 80)),  # 20 is 80 times the opacity
    'P': (with_palette(None), COLOUR),
    'P with transparency': (with_palette(128), COLOUR),
    'PA': (with_palette(None).convert('PA'), COLOUR),
    'RGB': (solid('RGB', COLOUR), COLOUR),
    'RGBX': (solid('RGBX', (*COLOUR, 0)), COLOUR),
    'RGBA': (solid('RGBA', (*COLOUR, 128)), COLOUR),
    'RGBa': (solid('RGBa', (100, 15, 45, 128)), (199, 30, 90)),
    'CMYK': (solid('CMYK', COLOUR), COLOUR),
    'YCbCr': (solid('YCbCr', COLOUR), COLOUR),
    'LAB': (solid('LAB', COLOUR), COLOUR),
    'HSV': (solid('HSV', COLOUR), COLOUR),
    'I;16': (solid('I;16', 20000), (78, 78, 78)),
    'I;16B': (solid('I;16B', 20000), (78, 78, 78)),
    'F': (solid('F', 0.25), (64, 64, 64)),
}
LOSSLESS = {'WEBP': {'lossless': True, 'exact': True}, 'JPEG': {'quality': 95, 'subsampling': 0}}
OWN_CONVERSION = {  # modes that Pillow changes when it saves a file in this format
    ('JPEG2000', 'I;16B'),
    *(('WEBP', mode) for mode in ('I;16', 'I;16B', 'F', 'La', 'RGBa')),
    *(('GIF', mode) for mode in ('I;16', 'I;16B', 'F', 'LA', 'RGBA', 'P with transparency')),
    *((form, mode) for form in ('JPEG', 'TIFF') for mode in ('RGBX',)),
}


@pytest.mark.parametrize('mode', MODES)
def test_every_kind_of_file_gives_its_colour(mode):
    """16-bit scans, palette or CMYK images would silently become white, black or inverted.

    Training, evaluation and prediction must get equal pixels.
    """
    image, rgb = MODES[mode]
    grey = round(np.dot(rgb, (0.299, 0.587, 0.114)))
    files = {}
    for form in ('PNG', 'TIFF', 'JPEG', 'WEBP', 'GIF', 'BMP', 'PPM', 'JPEG2000'):
        with contextlib.suppress(OSError, ValueError):  # a format without this mode
            if (form, mode) not in OWN_CONVERSION:
                files[form] = encoded(image, form, **LOSSLESS.get(form, {}))
    assert files or mode in ('La', 'RGBa', 'RGBX', 'HSV'), 'no format supports this mode'
    for form, data in files.items():
        for channels, expected in {3: rgb, 1: grey}.items():
            pixels = np.asarray(decode(data, channels, 'x'), np.int32)
            assert pixels.shape == ((7, 9, 3) if channels == 3 else (7, 9))
            assert np.abs(pixels - np.asarray(expected)).max() <= 3, (form, channels, pixels[0, 0])
            for exact in (False, True):
                crop = train_crop(data, 8, channels=channels, scale=(0.5, 1), seed=(0,), exact=exact).astype(np.int32)
                assert np.abs(crop - np.asarray(expected)).max() <= 3, (form, channels, crop[0, 0])
    for channels, expected in {3: rgb, 1: grey}.items():
        pixels = np.asarray(convert_mode(image, channels), np.int32)
        assert np.abs(pixels - np.asarray(expected)).max() <= 3, (channels, pixels[0, 0])


@pytest.mark.parametrize(('low', 'high'), [(0, 20000), (45000, 65535), (0, 65535)])
@pytest.mark.parametrize('form', ['PNG', 'TIFF', 'PPM', 'JPEG2000'])
def test_16_bit_images_are_scaled_to_8_bits(form, low, high):
    """Pillow's conversion clips at 255: X-rays and scans would become white."""
    values = np.random.default_rng(0).integers(low, high, (40, 40), dtype=np.uint16)
    data = encoded(Image.fromarray(values), form, **({'irreversible': False} if form == 'JPEG2000' else {}))
    np.testing.assert_array_equal(decode(data, 1, 'x'), np.round(values / 257).astype(np.uint8))
    np.testing.assert_array_equal(np.asarray(decode(data, 3, 'x'))[:, :, 1], decode(data, 1, 'x'))


def test_tiffs_with_12_bits_or_inverted_values():
    """Images from microscopes (12 bits) would be almost black, and images from some scanners inverted."""
    values = np.random.default_rng(0).integers(0, 65536, (6, 8), dtype=np.uint16)
    inverted = encoded(Image.fromarray(values), 'TIFF', tiffinfo={262: 0})
    np.testing.assert_array_equal(decode(inverted, 1, 'x'), 255 - np.round(values / 257).astype(np.uint8))
    twelve = Image.open(io.BytesIO(encoded(Image.fromarray(values // 16), 'TIFF')))
    twelve.load()
    twelve.tag_v2[258] = (12,)
    np.testing.assert_array_equal(convert_mode(twelve, 1), np.round(values // 16 * (255 / 4095)).astype(np.uint8))


def test_a_damaged_avif_is_one_line():
    """Pillow's AVIF reader raises RuntimeError: users would get a traceback without the file name."""
    data = encoded(photograph(40, 30), 'AVIF')
    start = data.index(b'mdat') + 4
    with pytest.raises(UserError, match='^photo.avif cannot be decoded as an image'):
        decode(data[:start] + bytes(len(data) - start), 3, 'photo.avif')


def test_deep_pixels_of_unknown_range_are_refused():
    """The maximum of 32-bit integers may be 255, 4095 or 65535: a guess would silently be wrong."""
    integers = encoded(Image.fromarray(np.arange(12, dtype=np.int32).reshape(3, 4)), 'TIFF')
    with pytest.raises(
        UserError, match='scan.tif cannot be decoded as an image: its pixel values are 32-bit integers of'
    ):
        decode(integers, 3, 'scan.tif')
    for wrong in (200.0, -0.1, np.nan):
        floats = encoded(Image.fromarray(np.full((3, 4), wrong, np.float32)), 'TIFF')
        with pytest.raises(UserError, match=r'its float pixel values are outside \[0, 1\]'):
            decode(floats, 3, 'scan.tif')


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'TIFF', 'WEBP'])
def test_photographs_are_upright(form, orientation):
    """Phones store rotated pixels with an EXIF orientation: without it, photographs would be used sideways."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    photo = photograph(300, 200)
    data = encoded(photo, form, exif=exif, **LOSSLESS.get(form, {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((200, 300) if orientation >= 5 else (300, 200))
    np.testing.assert_array_equal(decode(data, 3, 'x'), upright)
    np.testing.assert_array_equal(decode(data, 1, 'x'), upright.convert('L'))
    options = {'channels': 3, 'scale': (0.3, 1.0), 'seed': (7,)}
    expected = train_crop(encoded(upright, 'PNG'), 64, exact=True, **options)
    np.testing.assert_array_equal(train_crop(data, 64, exact=True, **options), expected)
    assert np.abs(train_crop(data, 64, **options).astype(int) - expected).mean() < (1 if form == 'JPEG' else 1e-9)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
@pytest.mark.parametrize('options', [{}, {'progressive': True}, {'subsampling': 0}, {'quality': 30}], ids=str)
def test_rgb_pixels_of_a_jpeg_are_equal_to_pillow(mode, options):
    """Crops for segmentation would differ from mmsegmentation's crops, or fail for some files."""
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        image = encoded(noise(37, 21).resize((61, 43)).convert(mode), 'JPEG', exif=exif, **options)
        np.testing.assert_array_equal(decode_rgb(image, 'name'), np.asarray(decode(image, 3, 'name')))
        assert upright_size(image, 'name') == decode(image, 3, 'name').size


def test_rgb_pixels_of_a_damaged_or_enormous_jpeg_are_an_error(monkeypatch):
    """The missing part would be trained as grey pixels."""
    image = encoded(noise(90, 70), 'JPEG')
    with pytest.raises(UserError, match=r'^photo\.jpg cannot be decoded'):
        decode_rgb(image[:-500], 'photo.jpg')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    for function in (decode_rgb, upright_size):
        with pytest.raises(UserError, match=r'^photo\.jpg cannot be decoded'):
            function(image, 'photo.jpg')


def test_damaged_exif_data_do_not_make_an_image_unreadable():
    """Wrong metadata from a camera would make valid photographs unreadable."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    whole = encoded(photograph(80, 60), 'JPEG', exif=exif)
    start = whole.index(b'Exif\0\0') + 6
    for position, value in (
        (0, b'XX'),
        (2, b'\xff\xff'),
        (4, b'\xff\xff\xff\x7f'),
        (10, b'\xff\xff'),
        (18, b'\x63\x00'),
    ):
        data = whole[: start + position] + value + whole[start + position + len(value) :]
        assert decode(data, 3, 'x').size in ((80, 60), (60, 80))
        assert train_crop(data, 32, channels=3, scale=(0.3, 1.0), seed=(0,)).shape == (32, 32, 3)


def test_the_content_determines_the_format_and_postscript_is_refused():
    """A file .jpg may have any content, and Pillow would start Ghostscript for PostScript."""
    frames = [Image.new('RGB', (9, 7), colour) for colour in (COLOUR, (0, 255, 0))]
    moving = encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:])
    assert np.abs(np.asarray(decode(moving, 3, 'x'), int) - COLOUR).max() <= 3
    with pytest.raises(
        UserError, match='poster.jpg cannot be decoded as an image: its format is none of JPEG, PNG, .*, AVIF'
    ):
        decode(encoded(frames[0], 'EPS'), 3, 'poster.jpg')


@pytest.mark.parametrize('form', ['PNG', 'JPEG', 'WEBP', 'BMP'])
def test_truncated_bytes_name_the_image(form):
    """An incomplete download would be used as a half-grey image, or give a traceback without its name."""
    data = encoded(noise(40, 30), form)
    for part in (data[:0], data[:10], data[: len(data) // 2], data[:-40]):
        with pytest.raises(UserError, match='^train/dog/7.jpg cannot be decoded as an image: .') as error:
            decode(part, 3, 'train/dog/7.jpg')
        assert '\n' not in str(error.value)


def test_a_file_that_is_not_an_image_is_named():
    """The user could not find the file without its name."""
    with pytest.raises(UserError, match='notes.jpg cannot be decoded as an image: its format is none of JPEG, '):
        decode(b'<html>Not found</html>' * 100, 3, 'notes.jpg')


def test_an_enormous_image_is_named(monkeypatch):
    """Pillow's error for images above its limit is neither an OSError nor a ValueError."""
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(UserError, match='poster.png cannot be decoded as an image'):
        decode(encoded(noise(40, 30), 'PNG'), 3, 'poster.png')


def eval_resize_by_pillow(image, size, crop_pct):
    """As torchvision, except that the smaller half of an odd margin is left or top, as in Hugging Face's processor."""
    if size >= 384:
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    (width, height), shorter = image.size, int(size / crop_pct)
    if width < height:
        width, height = shorter, int(shorter * height / width)
    else:
        width, height = int(shorter * width / height), shorter
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize(
    ('sides', 'size', 'crop_pct'),
    [
        ((500, 375), 224, 0.875),
        ((375, 500), 224, 0.875),
        ((333, 500), 224, 0.875),
        ((61, 47), 224, 0.875),  # enlarged
        ((300, 300), 192, 0.875),  # shorter side 219
        ((400, 401), 288, 0.95),
        ((28, 28), 28, 1.0),
        ((90, 31), 64, 1.0),
        ((450, 600), 383, 0.875),
        ((450, 600), 384, 0.875),
        ((450, 300), 448, 1.0),
        # 256 · 147 / 98 is 384, but 147 · (256 / 98) is slightly less
        ((147, 98), 224, 0.875),
        ((196, 343), 224, 0.875),
    ],
)
def test_eval_resize_equals_the_references(sides, size, crop_pct):
    """A shift by one pixel or another filter would cost tenths of a percent of the published accuracies."""
    image = noise(*sides)
    pixels = eval_resize(image, size, crop_pct)
    assert (pixels.shape, pixels.dtype) == ((size, size, 3), np.uint8)
    np.testing.assert_array_equal(pixels, eval_resize_by_pillow(image, size, crop_pct))


def test_eval_resize_does_not_change_an_image_of_the_final_size():
    """Small images, such as Fashion-MNIST's, would be blurred."""
    image = noise(28, 28)
    np.testing.assert_array_equal(eval_resize(image, 28, 1.0), image)


def test_greyscale_images_have_a_channel_axis():
    """Models with one input channel could not be trained."""
    image = noise(50, 40).convert('L')
    assert eval_resize(image, 32, 0.875).shape == (32, 32, 1)
    assert eval_resize(image, 400, 0.875).shape == (400, 400, 1)
    for form in ('PNG', 'JPEG'):
        data = encoded(image, form)
        assert train_crop(data, 32, channels=1, scale=(0.1, 1.0), seed=(0,)).shape == (32, 32, 1)


WIDTH, HEIGHT = 200, 120


def crops(width, height, scale, count):
    """Left, top, width and height of random crops, measured in an image whose colours are its coordinates."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    image, size = encoded(Image.fromarray(np.stack([x, y, 0 * x], -1)), 'BMP'), 32
    for number in range(count):
        pixels = train_crop(image, size, channels=3, scale=scale, seed=(0, number)).astype(float)
        assert pixels.shape == (size, size, 3)
        columns, rows = pixels[:, :, 0].mean(0), pixels[:, :, 1].mean(1)
        w, h = ((line[-6] - line[5]) * size / (size - 11) for line in (columns, rows))
        yield columns[15:17].mean() + 0.5 - w / 2, rows[15:17].mean() + 0.5 - h / 2, w, h


def test_train_crop_has_the_right_distribution_of_area_ratio_and_position():
    """With another distribution of crops, the published accuracies could not be reached."""
    count = 4000  # enough to distinguish a log-uniform ratio from a uniform one
    left, top, w, h = np.array(list(crops(WIDTH, HEIGHT, (0.1, 0.4), count))).T
    quarters = np.array([0.25, 0.5, 0.75])

    def check_uniform(values, low, high):
        tolerance = 5 * 0.5 / count**0.5
        np.testing.assert_allclose((np.quantile(values, quarters) - low) / (high - low), quarters, atol=tolerance)
        assert values.min() > low - 0.1 * (high - low)
        assert values.max() < high + 0.1 * (high - low)

    check_uniform(w * h / (WIDTH * HEIGHT), 0.1, 0.4)
    check_uniform(np.log(w / h), np.log(3 / 4), np.log(4 / 3))
    check_uniform(left / (WIDTH - w), 0, 1)
    check_uniform(top / (HEIGHT - h), 0, 1)
    assert abs(np.corrcoef(left / (WIDTH - w), top / (HEIGHT - h))[0, 1]) < 5 / count**0.5


@pytest.mark.parametrize(
    ('width', 'height', 'box'), [(240, 12, (112, 0, 128, 12)), (12, 240, (0, 112, 12, 128)), (1, 90, (0, 44, 1, 45))]
)
def test_train_crop_falls_back_to_the_centre(width, height, box):
    """A panorama, in which no crop of an allowed ratio fits, would give an error or a distorted image."""
    image = noise(width, height)
    pixels = train_crop(encoded(image, 'PNG'), 32, channels=3, scale=(1.0, 1.0), seed=(0,))
    np.testing.assert_array_equal(pixels, image.crop(box).resize((32, 32), Image.Resampling.BICUBIC))


def test_resize_ignores_the_aspect_ratio():
    """The demo trains on whole images; images of the final size must not be changed."""
    small, wide = noise(28, 28), noise(40, 20)
    np.testing.assert_array_equal(resize(small, 28), small)
    np.testing.assert_array_equal(resize(wide, 28), wide.resize((28, 28), Image.Resampling.BICUBIC))


def test_train_crop_depends_on_its_seed():
    """A resumed run would get other crops."""
    image = encoded(noise(50, 40), 'PNG')
    first, again, other = (train_crop(image, 16, channels=3, scale=(0.1, 1.0), seed=(seed,)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def photograph(width, height, seed=0):
    """Noise like a photograph: its power falls with the frequency, and the channels are correlated."""
    rng = np.random.default_rng(seed)
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    power = np.maximum(np.hypot(down, across), 1 / max(width, height)) ** -1.5
    spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) * power
    pixels = np.fft.irfft2(spectrum, (height, width)).transpose(1, 2, 0)
    pixels = 0.25 * pixels + pixels[:, :, :1]
    return Image.fromarray(np.uint8(np.clip(128 + 50 * pixels / pixels.std(), 0, 255)))


def difference(data, size, seed, channels=3):
    """Mean difference of the pixel values between the fast crop and Pillow's."""
    options = {'channels': channels, 'scale': (0.3, 1.0), 'seed': (seed,)}
    fast = train_crop(data, size, **options)
    return np.abs(fast.astype(int) - train_crop(data, size, exact=True, **options)).mean()


@pytest.mark.parametrize(
    ('sides', 'size', 'bound'),
    [
        ((500, 375), 224, 0.4),
        ((375, 500), 384, 0.4),  # enlarged
        ((901, 700), 96, 1.0),  # decoded at 1/2
        ((1801, 1500), 96, 1.0),  # decoded at 1/4
        ((3001, 2303), 64, 1.0),  # decoded at 1/8
    ],
)
def test_the_fast_crop_is_close_to_pillow(sides, size, bound, monkeypatch):
    """Blurred or shifted crops would cost accuracy."""
    data = encoded(photograph(*sides), 'JPEG', quality=92)
    assert np.mean([difference(data, size, seed) for seed in range(5)]) < bound
    monkeypatch.setattr(decode_module, 'decode', None)
    train_crop(data, size, channels=3, scale=(0.3, 1.0), seed=(0,))  # without Pillow's decoder


def test_fast_crop_without_pillows_limit(monkeypatch):
    """Programs that disable Pillow's limit of the image size could not read JPEG files."""
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    pixels = train_crop(encoded(photograph(60, 40), 'JPEG'), 16, channels=3, scale=(0.3, 1.0), seed=(0,))
    assert pixels.shape == (16, 16, 3)


def test_fast_crop_converts_between_greyscale_and_colour():
    """Greyscale images of ImageNet are used as RGB, and colour images may be used as greyscale."""
    photo = photograph(200, 150)
    assert difference(encoded(photo.convert('L'), 'JPEG'), 64, 0, channels=3) < 0.4
    assert difference(encoded(photo.convert('L'), 'JPEG'), 64, 0, channels=1) < 0.4
    assert difference(encoded(photo, 'JPEG', quality=95, subsampling=0), 64, 0, channels=1) < 1


def test_fast_crop_without_the_fast_filter(monkeypatch):
    """The filter is not available on Linux with ARM processors: pixels may differ there only by rounding."""
    data, options = encoded(photograph(500, 375), 'JPEG'), {'channels': 3, 'scale': (0.3, 1.0), 'seed': (0,)}
    fast = train_crop(data, 64, **options)
    monkeypatch.setattr(decode_module, 'fast', None)
    assert 0 < np.abs(fast.astype(int) - train_crop(data, 64, **options)).mean() < 0.4


def test_train_crop_of_other_files_uses_pillow():
    """CMYK JPEGs and other formats would not be decoded, or damaged JPEGs not be named."""
    options = {'scale': (0.3, 1.0), 'seed': (0,), 'channels': 3}
    for data in (encoded(photograph(80, 60).convert('CMYK'), 'JPEG'), encoded(photograph(80, 60), 'PNG')):
        np.testing.assert_array_equal(train_crop(data, 32, **options), train_crop(data, 32, exact=True, **options))
    whole = encoded(photograph(80, 60), 'JPEG')
    for part in (whole[:10], whole[: len(whole) // 2], whole[:-40]):
        with pytest.raises(UserError, match='7.jpg cannot be decoded as an image: .'):
            train_crop(part, 32, name='7.jpg', **options)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason=f'{SAMPLES} with photographs is missing')
def test_fast_crop_of_photographs():
    """The docstring of `train_crop` promises a mean difference of 0.2 at 224 pixels."""
    differences = [difference(path.read_bytes(), 224, seed) for seed, path in enumerate(sorted(SAMPLES.iterdir()))]
    assert np.mean(differences) < 0.2
    assert max(differences) < 1
