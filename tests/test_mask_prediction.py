"""Masks of photographs by a UPerNet: `python -m convnext_jax predict --output=DIR`."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from convnext_jax import ImageProcessor, save_pretrained
from convnext_jax.__main__ import main
from convnext_jax.data.opencv_resize import resize_bilinear
from convnext_jax.errors import UserError
from convnext_jax.interop import PretrainedUPerNet, read_upernet
from convnext_jax.interop.pretrained_upernet import WindowProtocol
from convnext_jax.mask_prediction import choose_windows, mask_files, predict_masks
from convnext_jax.models import UPerNet, get_weights, with_parameters
from convnext_jax.models.upernet import resize
from convnext_jax.tasks.palette import class_colours
from tests.reference import cases

NAMES = tuple(f'class {number}' for number in 'abcdefg')
PROCESSOR = ImageProcessor(size=48, resample=2, squash=True, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A folder as transformers writes it."""
    folder = tmp_path_factory.mktemp('weights') / 'upernet'
    save_pretrained(cases.random_upernet('v1'), folder, class_names=NAMES, processor=PROCESSOR)
    return folder


@pytest.fixture
def photos(tmp_path):
    """A folder with a wide photograph, one that is stored sideways, and one that cannot be read."""
    folder = tmp_path / 'photos'
    folder.mkdir()
    sideways = Image.Exif()
    sideways[0x0112] = 6
    cases.picture(60, 45).save(folder / 'a.png')
    cases.picture(56, 40).save(folder / 'b.jpg', exif=sideways)
    (folder / 'broken.jpg').write_bytes(b'no image')
    return folder


def assert_equal_where_clear(classes, logits):
    """Compares the classes of pixels whose two largest logits differ by more than rounding errors."""
    second, largest = np.sort(logits, -1)[..., -2:].transpose(2, 0, 1)
    clear = largest - second > 1e-4 * logits.std()
    assert clear.mean() > 0.99
    assert len(np.unique(classes)) > 1
    np.testing.assert_array_equal(classes[clear], logits.argmax(-1)[clear])


@functools.cache
def upernet_logits():
    """A function from pixels and a size to the logits of the network at this size."""
    network = cases.random_upernet('v1')
    return jax.jit(lambda pixels, size: resize(network(pixels), size)[0], static_argnums=1)


@pytest.mark.slow
def test_masks_have_the_size_of_the_upright_photographs(weights, photos):
    """Masks would be shifted or rotated, or would be predicted from other pixels."""
    logits = upernet_logits()
    found = list(predict_masks(read_upernet(weights), sorted(photos.iterdir())))
    for mask, size in zip(found[:2], ((45, 60), (56, 40)), strict=True):
        assert (mask.classes.shape, mask.classes.dtype) == (size, np.uint8)
        assert mask.photo.size == size[::-1]
        assert_equal_where_clear(mask.classes, np.asarray(logits(PROCESSOR(mask.path), size)))
        shares = [share for _, _, share in mask.areas]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1)
        assert [(NAMES[label], np.mean(mask.classes == label)) for label, _, _ in mask.areas] == [
            (name, share) for _, name, share in mask.areas
        ]
    assert found[2].classes is None
    assert 'broken.jpg cannot be decoded as an image' in found[2].error


@pytest.mark.slow
def test_windows_slide_over_photographs_that_keep_their_aspect_ratio(weights, tmp_path):
    """The published networks would give other masks than in mmsegmentation."""
    logits = upernet_logits()
    cases.picture(75, 36).save(tmp_path / 'wide.png')
    pixels = PROCESSOR.normalize(resize_bilinear(np.asarray(Image.open(tmp_path / 'wide.png')), (48, 100)))
    total, count = np.zeros((48, 100, 7), np.float32), np.zeros((100, 1), np.float32)
    for left in (0, 32, 52):
        total[:, left : left + 48] += logits(pixels[None, :, left : left + 48], (48, 48))
        count[left : left + 48] += 1
    expected = np.asarray(resize(jnp.asarray(total / count)[None], (36, 75)))[0]
    (mask,) = predict_masks(read_upernet(weights), [tmp_path / 'wide.png'], mode='slide', resolution=48)
    assert_equal_where_clear(mask.classes, expected)


def test_the_weights_determine_how_photographs_are_resized():
    """The masks of a run, a folder or a .pth file would be worse than their mIoU."""

    def chosen(mode=None, resolution=None, *, processor=None, windows=None):
        pretrained = PretrainedUPerNet(None, '', None, processor, (), [], windows=windows)
        return choose_windows(pretrained, mode, resolution)

    published, of_run = WindowProtocol((2048, 512), 512, 341), WindowProtocol((100, 50), 40, 30)
    assert chosen() == published
    assert chosen(processor=PROCESSOR) is None
    assert chosen(processor=PROCESSOR, windows=of_run) == of_run
    assert chosen('slide', processor=PROCESSOR) == published
    assert chosen('squash', windows=of_run) is None
    assert chosen('slide', 640, windows=of_run) == WindowProtocol((2560, 640), 640, 426)
    whole = of_run._replace(whole=True)
    assert chosen('whole', windows=of_run) == chosen(windows=whole) == whole
    assert chosen('slide', windows=whole) == of_run
    assert chosen(resolution=640, windows=whole) == WindowProtocol((2560, 640), 640, 426, whole=True)


@pytest.mark.slow
def test_the_command_writes_masks_and_pictures(weights, photos, tmp_path, capsys):
    """Masks could not be read as class numbers, or nobody could see what was predicted."""
    arguments = ['convnext_jax', 'predict', str(photos), f'--weights={weights}', f'--output={tmp_path / "out"}']
    with pytest.raises(UserError, match='^1 of 3 files could not be read$'):
        main([*arguments, '--json', '--top=2'])
    out, err = capsys.readouterr()
    first, skipped = err.splitlines()
    assert first == f'predicting with the raw weights of {weights} (huggingface layout)'
    assert skipped.startswith(f'skipped: {photos / "broken.jpg"} cannot be decoded')
    rows = [json.loads(line) for line in out.splitlines()]
    for row, name, size in zip(rows, ('a.png', 'b.jpg'), ((60, 45), (40, 56)), strict=True):
        stem = name.partition('.')[0]
        assert row['file'] == str(photos / name)
        assert row['mask'] == str(tmp_path / 'out' / f'{stem}.png')
        with Image.open(row['mask']) as mask, Image.open(tmp_path / 'out' / f'{stem}.overlay.jpg') as picture:
            assert (mask.mode, mask.size) == ('P', size)
            assert np.array_equal(np.reshape(mask.getpalette(), (-1, 3)), class_colours())
            assert picture.width > mask.width
            classes = np.asarray(mask)
        best = row['classes'][0]
        assert best['name'] == NAMES[best['label']]
        assert best['share'] == pytest.approx(np.mean(classes == best['label']), abs=1e-6)
        assert len(row['classes']) <= 2
    with pytest.raises(UserError, match='could not be read'):
        main(arguments)
    table = capsys.readouterr().out.splitlines()
    assert table[0] == str(photos / 'a.png')
    assert table[1] == f'  {100 * rows[0]["classes"][0]["share"]:6.2f} %  {rows[0]["classes"][0]["name"]}'


@pytest.mark.parametrize(
    ('arguments', 'line'),
    [
        (('--weights={upernet}',), '--output is missing: a UPerNet predicts a mask for each photograph'),
        (('--weights={upernet}', '--output=out', '--resolution=16'), '--resolution=16 is below the total stride'),
        (('--weights={upernet}', '--output=out', '--batch=2'), '--batch cannot be used with the raw weights of'),
        (('--weights={classifier}', '--output=out'), '--output cannot be used with the raw weights of'),
        (('--weights={classifier}', '--mode=slide', '--resolution=48'), '--mode, --resolution cannot be used with'),
        (('--weights={upernet}', '--output={photos}'), 'a.png: choose another --output'),
        (('--weights={upernet}', '--output=out', '--mode=crop'), 'flag --mode=crop'),
    ],
)
def test_the_command_refuses_what_it_cannot_do(weights, photos, tmp_path, arguments, line):
    """A flag would be ignored, or a photograph would be overwritten."""
    cases.save_predictor(tmp_path / 'classifier', ('a', 'b'), None)
    given = {'upernet': weights, 'classifier': tmp_path / 'classifier', 'photos': photos}
    with pytest.raises(UserError, match=re.escape(line)):
        main(['convnext_jax', 'predict', str(photos), *(argument.format(**given) for argument in arguments)])


def test_files_are_not_overwritten(tmp_path):
    """The mask of a photograph would replace the mask of another, or a photograph."""
    photos = [tmp_path / name for name in ('one/a.jpg', 'one/a.overlay.jpg', 'two/a.png')]
    with pytest.raises(UserError, match=r'one/a.jpg and .*two/a.png would have the same mask, .*out/a.png'):
        mask_files(photos, tmp_path / 'out')
    with pytest.raises(UserError, match=r'one/a.jpg would replace the photograph .*one/a.overlay.jpg: choose'):
        mask_files(photos[:2], tmp_path / 'one')
    assert mask_files(photos[:1], tmp_path / 'out') == [(tmp_path / 'out/a.png', tmp_path / 'out/a.overlay.jpg')]


@pytest.mark.slow
def test_masks_that_would_be_wrong_are_not_written(weights, photos, tmp_path, capsys):
    """The pixels would have wrong or arbitrary classes."""
    many = jax.eval_shape(
        lambda key: UPerNet(cases.UPERNETS['v1'], key=key, num_classes=256, channels=8, auxiliary_channels=0),
        jax.random.key(0),
    )
    with pytest.raises(UserError, match='at most 255 classes, but the network has 256'):
        next(predict_masks(PretrainedUPerNet(many, 'huggingface', None, None, (), []), [photos / 'a.png']))
    pretrained = read_upernet(weights)
    broken = dict(get_weights(pretrained.model))
    broken['decode_head.classifier.bias'] = broken['decode_head.classifier.bias'].at[0].set(np.nan)
    save_pretrained(with_parameters(pretrained.model, broken), tmp_path / 'nan', processor=PROCESSOR)
    arguments = ['convnext_jax', 'predict', str(photos / 'a.png'), f'--weights={tmp_path / "nan"}']
    with pytest.raises(UserError, match=r'^the scores of 1 of 1 files are not finite \(.*a.png\): the weights contain'):
        main([*arguments, f'--output={tmp_path / "out"}'])
    assert capsys.readouterr().out == f'{photos / "a.png"}\n  the scores are not finite\n'
    with pytest.raises(UserError, match='are not finite'):
        main([*arguments, f'--output={tmp_path / "out"}', '--json'])
    assert json.loads(capsys.readouterr().out) == {'file': str(photos / 'a.png'), 'mask': None, 'classes': []}
    assert not (tmp_path / 'out').exists()
