"""Comparison with OpenCV: resized photographs and random images."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from convnext_jax.data.opencv_resize import resize_bilinear, resize_nearest

PHOTOS = [
    Path(__file__).parents[1] / 'data' / 'ade20k_sample' / 'images' / 'validation' / 'ADE_val_00000003.jpg',
    *sorted((Path(__file__).parents[3] / 'shared' / 'data' / 'coco_mini' / 'val2017').glob('*.jpg')),
]


def assert_resized_as_by_opencv(image: np.ndarray, height: int, width: int) -> None:
    theirs = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(resize_bilinear(image, (height, width)), theirs, err_msg=f'{image.shape}, {height}')
    mask = np.ascontiguousarray(image[:, :, 0])
    theirs = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
    np.testing.assert_array_equal(resize_nearest(mask, (height, width)), theirs, err_msg=f'{image.shape}, {height}')


def test_random_images():
    """The stored results cover a few sizes only."""
    rng = np.random.default_rng(0)
    for number in range(300):
        image = rng.integers(0, 256, (*rng.integers(1, 200, 2), 3), np.uint8)
        if number % 3:  # one factor for both sides, from a quarter to four times
            height, width = np.maximum(np.array(image.shape[:2]) * 4 ** rng.uniform(-1, 1) + 0.5, 1).astype(int)
        else:
            height, width = rng.integers(1, 200, 2)
        assert_resized_as_by_opencv(image, int(height), int(width))


@pytest.mark.parametrize('path', PHOTOS, ids=lambda path: path.stem)
def test_photographs(path):
    """Rounding errors that random pixels hide would show in smooth areas."""
    image = np.asarray(Image.open(path))
    for factor in (0.3, 0.5, 0.77, 1.28, 2):
        height, width = (int(side * factor + 0.5) for side in image.shape[:2])
        assert_resized_as_by_opencv(image, height, width)
