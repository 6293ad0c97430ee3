"""The confusion matrix of UPerNet, against transformers and mmsegmentation's inference in PyTorch."""

import jax
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from convnext_jax.data.segmentation import view_features
from convnext_jax.tasks.mean_iou import MeanIoU
from convnext_jax.tasks.pixel_classes import PixelClasses
from tests.judges import record
from tests.reference import cases, draw_bytes

MEAN, STD, CROP, STRIDE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 64, 42
SIZES = (((101, 75), (130, 97)), ((64, 64), (45, 51)), ((47, 150), (70, 150)))  # of the resized and original images
SCALES = (1.0, 0.75, 1.4)


def bilinear(x, size):
    return interpolate(x, size=size, mode='bilinear', align_corners=False)


def slide(module, image):
    """The logits of `slide_inference` in mmsegmentation, (1, classes, H, W), for (1, 3, H, W)."""
    height, width = image.shape[2:]
    sums = torch.zeros(1, 7, height, width)
    counts = torch.zeros(1, 1, height, width)
    for i in range(max(height - CROP + STRIDE - 1, 0) // STRIDE + 1):
        for j in range(max(width - CROP + STRIDE - 1, 0) // STRIDE + 1):
            bottom, right = min(i * STRIDE + CROP, height), min(j * STRIDE + CROP, width)
            top, left = max(bottom - CROP, 0), max(right - CROP, 0)
            sums[:, :, top:bottom, left:right] += module(image[:, :, top:bottom, left:right]).logits
            counts[:, :, top:bottom, left:right] += 1
    return sums / counts


def whole(module, image):
    """The logits of `whole_inference`."""
    return module(image).logits


@pytest.mark.parametrize(
    ('kind', 'infer', 'flip', 'scales'),
    [('v2', slide, False, 1), ('v1', slide, True, 3), ('v2', whole, True, 3)],
)
def test_the_confusion_matrix_is_equal_to_mmsegmentation(kind, infer, flip, scales):
    """The mIoU of published weights would differ from the published mIoU, at one scale or at several."""
    batch = {
        'label': np.full((3, 130, 150), 255, np.uint8),
        'label_size': np.asarray([size for _, size in SIZES], np.int32),
        'weight': np.ones(3, np.float32),
    }
    for view, scale in enumerate(SCALES[:scales]):
        names = view_features(view)
        batch[names.size] = np.asarray([np.multiply(size, scale) for size, _ in SIZES]).astype(np.int32)
        batch[names.image] = np.zeros((3, *batch[names.size].max(0), 3), np.uint8)
    expected = np.zeros((7, 7))
    module = record.hugging_face_upernet(kind)
    for i, (_, (height, width)) in enumerate(SIZES):
        batch['label'][i, :height, :width] = labels = draw_bytes(f'labels {i}', (height, width), 7)
        total = torch.zeros(1, 7, height, width)
        for names in map(view_features, range(scales)):
            rows, columns = batch[names.size][i]
            pixels = draw_bytes(f'image {i}', (rows // 8 + 1, columns // 8 + 1, 3), 256).repeat(8, 0).repeat(8, 1)
            batch[names.image][i, :rows, :columns] = pixels = pixels[:rows, :columns]
            image = record.nchw(((pixels / 255 - MEAN) / STD).astype(np.float32)[None])
            with torch.no_grad():
                total += bilinear(infer(module, image), (height, width)).softmax(1)
                if flip:
                    total += bilinear(infer(module, image.flip(3)), (height, width)).softmax(1).flip(3)
        np.add.at(expected, (labels, total[0].argmax(0).numpy()), 1)
    windows = (CROP, STRIDE) if infer is slide else (0, 0)
    evaluator = MeanIoU(PixelClasses(MEAN, STD, *windows, flip), views=scales)
    measured = jax.jit(evaluator.measure)(cases.random_upernet(kind), batch)
    confusion = np.asarray(measured.sums['confusion'])
    assert np.count_nonzero(expected.sum(0)) > 1, 'all pixels have one class'
    print(kind, infer.__name__, flip, scales, f'{np.abs(confusion - expected).sum() / 2:.0f} pixels differ')
    assert np.abs(confusion - expected).sum() <= 4, 'more than two pixels differ'
