"""OpenCV's resize against stored results of OpenCV; `tests/judges/test_opencv.py` compares more sizes."""

import numpy as np
import pytest

from convnext_jax.data.opencv_resize import resize_bilinear, resize_nearest
from tests import reference
from tests.reference import cases


@pytest.mark.parametrize(('old', 'new'), cases.RESIZED)
def test_resized_pixels_are_equal_to_opencv(old, new):
    """Published segmentation networks would see other pixels than in their training."""
    stored = reference.arrays('opencv')
    image = cases.resizable(old)
    nearest = np.stack([resize_nearest(channel, new) for channel in np.moveaxis(image, 2, 0)], 2)
    for name, resized in {'linear': resize_bilinear(image, new), 'nearest': nearest}.items():
        np.testing.assert_array_equal(reference.sketch(resized), stored[f'{name} {old} {new}'])


def test_a_part_of_the_result_equals_this_part_of_the_whole():
    """Training crops would differ from crops of the resized image."""
    image = cases.resizable((37, 53))
    for new in ((101, 144), (20, 30)):
        part = (slice(5, 17), slice(new[1] - 9, new[1] + 4))
        rows, columns = part
        whole = resize_bilinear(image, new)
        np.testing.assert_array_equal(resize_bilinear(image, new, rows=rows, columns=columns), whole[part])
        whole = resize_nearest(image[:, :, 0], new)
        np.testing.assert_array_equal(resize_nearest(image[:, :, 0], new, rows=rows, columns=columns), whole[part])
