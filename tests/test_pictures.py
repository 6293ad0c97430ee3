"""Pictures of masks."""

import numpy as np
import pytest
from PIL import Image

from convnext_jax.errors import UserError
from convnext_jax.pictures import indexed_mask, overlay, save_picture
from convnext_jax.tasks.palette import class_colours


@pytest.mark.parametrize('classes', [2, 256])
def test_a_mask_keeps_its_classes_in_a_file(tmp_path, classes):
    """With few classes, Pillow stores less than 8 bits for each pixel, which other programs may read differently."""
    pixels = np.arange(12 * 30).reshape(12, 30).astype(np.uint8) % np.uint8(classes - 1)
    save_picture(indexed_mask(pixels), tmp_path / 'new' / 'mask.png')
    content = (tmp_path / 'new' / 'mask.png').read_bytes()
    assert (content[24], content[25]) == (8, 3)  # bits, and the colour type of a palette
    with Image.open(tmp_path / 'new' / 'mask.png') as mask:
        np.testing.assert_array_equal(mask, pixels)
        np.testing.assert_array_equal(mask.convert('RGB'), class_colours()[pixels])


def test_an_overlay_shows_each_class_in_its_colour_and_names_it():
    """The colours could not be understood."""
    photo = Image.new('L', (40, 30), 100)
    classes = np.zeros((30, 40), np.uint8)
    classes[:, 30:] = 7
    picture = overlay(photo, classes, ((0, 'wall', 0.75), (7, 'sky', 0.25)))
    pixels = np.asarray(picture).astype(int)
    expected = (100 + class_colours()[classes].astype(int)) / 2
    assert np.abs(pixels[:30, :40] - expected).max() <= 0.5
    legend = pixels[:, 40:]
    for label in (0, 7):
        assert (legend == class_colours()[label]).all(-1).any()
    assert pixels.shape[0] > 30, 'two rows of text are higher than the photograph'
    above, below = ((legend == class_colours()[label]).all(-1).any(1).argmax() for label in (0, 7))
    assert above < below


def test_a_picture_that_cannot_be_written_is_reported(tmp_path):
    """The command would end with a traceback."""
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'file/a.png cannot be written: (Not a directory|File exists)'):
        save_picture(Image.new('L', (4, 4)), tmp_path / 'file' / 'a.png')
