"""Comparison with OpenCV: resized and distorted images, and mmsegmentation's crops of images and masks."""

from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from PIL import Image

from convnext_jax.data.decode import decode
from convnext_jax.data.distortion import apply_distortion, draw_distortion, hsv_to_rgb, rgb_to_hsv
from convnext_jax.data.masks import open_masks
from convnext_jax.data.opencv_resize import resize_bilinear, resize_nearest
from convnext_jax.data.segmentation import EvalMasks, TrainMasks
from tests.judges import record
from tests.reference.cases import SAMPLE

PHOTOS = [
    *SAMPLE.glob('images/validation/*.jpg'),
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
    """Smooth areas, which random pixels do not have, would be rounded differently."""
    image = np.asarray(Image.open(path))
    for factor in (0.3, 0.5, 0.77, 1.28, 2):
        height, width = (int(side * factor + 0.5) for side in image.shape[:2])
        assert_resized_as_by_opencv(image, height, width)


def test_conversion_of_every_colour_to_hsv():
    """A stored image has only some of the colours."""
    levels = np.arange(256, dtype=np.uint8)
    for red in range(256):
        colors = np.stack(np.meshgrid([red], levels, levels, indexing='ij'), -1).astype(np.uint8)[0]
        ours = np.stack(convert_to_hsv(colors), -1)
        np.testing.assert_array_equal(ours, cv2.cvtColor(colors, cv2.COLOR_RGB2HSV))


def test_conversion_of_every_colour_from_hsv():
    """A stored image has only some of the colours."""
    levels = np.arange(256, dtype=np.uint8)
    wrong = 0
    for hue in range(180):
        hsv = np.stack(np.meshgrid([hue], levels, levels, indexing='ij'), -1).astype(np.uint8)[0]
        difference = convert_to_rgb(*np.moveaxis(hsv.astype(np.int32), 2, 0)) - cv2.cvtColor(
            hsv, cv2.COLOR_HSV2RGB
        ).astype(int)
        assert np.abs(difference).max() <= 1
        wrong += np.count_nonzero(difference)
    assert wrong <= 180 * 256 * 256 * 3 * 1e-4


convert_to_hsv, convert_to_rgb = jax.jit(rgb_to_hsv), jax.jit(hsv_to_rgb)


@pytest.mark.parametrize('path', PHOTOS[:3], ids=lambda path: path.stem)
def test_distorted_photographs(path):
    """The stored results cover a few changes only."""
    image = np.asarray(Image.open(path))
    image = np.ascontiguousarray(image[:, : image.shape[1] // 32 * 32])  # OpenCV rounds the other columns differently
    keys = jax.random.split(jax.random.key(0), 16)
    drawn = jax.device_get(jax.vmap(draw_distortion)(keys))
    ours = jax.jit(apply_distortion)(np.stack([image] * len(keys)), drawn)
    for number in range(len(keys)):
        theirs = record.distorted(image, tuple(x[number] for x in drawn))
        difference = ours[number].astype(int) - theirs
        assert np.abs(difference).max() <= 3  # the later steps enlarge a difference of 1
        assert np.mean(difference != 0) < 1e-3


def test_training_crops():
    """Only a few crops are stored."""
    source = open_masks('masks', str(SAMPLE), 'validation', reduce_zero_label=True)
    paths = source[0][2:]
    for draw in range(60):
        crop = (64, 200, 350)[draw % 3]
        ours = TrainMasks(source, crop).load(0, (draw,))
        for name, theirs in record.mmsegmentation_crop(*paths, crop, draw).items():
            np.testing.assert_array_equal(ours[name], theirs, err_msg=f'{name} of draw {draw}')


def test_evaluation_image():
    """The published mIoU would be measured on other pixels."""
    source = open_masks('masks', str(SAMPLE), 'validation', reduce_zero_label=True)
    theirs = record.opencv_scaled(cv2.imread(source.name(0)), (2048, 512), cv2.INTER_LINEAR)[:, :, ::-1]
    np.testing.assert_array_equal(EvalMasks(source).load(0)['image'], theirs)


def test_opencv_rotates_images_as_their_exif_orientation_says(tmp_path):
    """Images would be rotated against masks that were made for mmsegmentation."""
    path = tmp_path / 'rotated.jpg'
    with Image.open(PHOTOS[0]) as image:
        for orientation in range(1, 9):
            exif = image.getexif()
            exif[0x0112] = orientation
            image.save(path, exif=exif)
            ours = np.asarray(decode(path.read_bytes(), 3, 'rotated.jpg'))
            np.testing.assert_array_equal(ours, cv2.imread(str(path))[:, :, ::-1])
