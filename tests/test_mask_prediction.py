"""Masks of image files: predict with a UPerNet."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from convnext_jax import ImageProcessor, save_pretrained
from convnext_jax import __main__ as package_command
from convnext_jax.data.opencv_resize import resize_bilinear
from convnext_jax.errors import UserError
from convnext_jax.interop import read_upernet
from convnext_jax.mask_prediction import predict_masks
from convnext_jax.models import get_weights, with_parameters
from convnext_jax.tasks.sliding_windows import SlidingWindows
from tests.reference import cases, draw_bytes

NAMES = tuple(f'kind {label}' for label in range(7))
PROCESSOR = ImageProcessor(64, squash=True, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A folder of Hugging Face with a small UPerNet."""
    folder = tmp_path_factory.mktemp('weights') / 'upernet'
    save_pretrained(cases.random_upernet('v1'), folder, class_names=NAMES, processor=PROCESSOR)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Two photographs, and a file that is none."""
    paths = [tmp_path / name for name in ('wide.png', 'tall.png', 'text.png')]
    for path, (height, width) in zip(paths[:2], ((51, 90), (70, 61)), strict=True):
        blocks = draw_bytes(path.name, (height // 10 + 1, width // 10 + 1, 3), 256).repeat(10, 0).repeat(10, 1)
        Image.fromarray(blocks[:height, :width]).save(path)
    paths[2].write_text('no image')
    return paths


@pytest.mark.slow
def test_predict_writes_the_masks_of_photographs(weights, photos, tmp_path, capsys):
    """A trained network could not be used on photographs."""
    command = ['', 'predict', *map(str, photos), f'--weights={weights}', '--json', '--top=9']
    with pytest.raises(UserError, match='1 of 3 files could not be read'):
        package_command.main([*command, f'--output={tmp_path / "masks"}'])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    stems = ('0000_wide', '0001_tall')
    files = {path.name for path in (tmp_path / 'masks').iterdir()}
    assert files == {f'{stem}{end}.png' for stem in stems for end in ('', '_overlay')}
    network = read_upernet(weights).model
    windows = SlidingWindows(PROCESSOR.mean, PROCESSOR.std, 64, 42)
    for line, photo, stem, size in zip(lines, photos[:2], stems, ((64, 113), (73, 64)), strict=True):
        mask, picture = (Image.open(tmp_path / 'masks' / f'{stem}{end}.png') for end in ('', '_overlay'))
        pixels = np.asarray(Image.open(photo))
        assert (mask.mode, picture.mode) == ('P', 'RGB')
        assert mask.size == picture.size == Image.open(photo).size
        classes, shape = np.asarray(mask), pixels.shape[:2]
        expected = jax.jit(windows.classes, static_argnames='shape')(
            network, resize_bilinear(pixels, size), np.asarray(size), np.asarray(shape), shape=shape
        )
        np.testing.assert_array_equal(classes, expected)
        assert len(np.unique(classes)) > 1
        assert line['file'] == str(photo)
        assert [best['label'] for best in line['best']] == sorted(
            np.unique(classes), key=lambda label, classes=classes: -(classes == label).sum()
        )
        for best in line['best']:
            assert best['name'] == NAMES[best['label']]
            assert best['area'] == pytest.approx((classes == best['label']).mean(), abs=1e-5)


@pytest.mark.slow
def test_scores_that_are_not_finite_give_no_mask(weights, photos):
    """A network whose weights are NaN would give masks of its first class."""
    read = read_upernet(weights)
    broken = {
        name: x * np.nan if name.endswith('classifier.bias') else x for name, x in get_weights(read.model).items()
    }
    (prediction,) = predict_masks(read._replace(model=with_parameters(read.model, broken)), photos[:1])
    assert prediction.best == ()
