"""The confusion matrix of UPerNet over sliding windows, against transformers and mmsegmentation's loop in PyTorch."""

import jax
import numpy as np
import torch
from torch.nn.functional import interpolate

from convnext_jax.tasks.mean_iou import MeanIoU
from convnext_jax.tasks.sliding_windows import SlidingWindows
from tests.judges import record
from tests.reference import cases, draw_bytes

MEAN, STD, CROP, STRIDE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 64, 42
SIZES = (((101, 75), (130, 97)), ((64, 64), (45, 51)), ((70, 150), (70, 150)))  # of the resized and original images


def slide(module, image, size):
    """The logits of `slide_inference` in mmsegmentation, (1, classes, *size), for (1, 3, H, W)."""
    height, width = image.shape[2:]
    sums = torch.zeros(1, 7, height, width)
    counts = torch.zeros(1, 1, height, width)
    for i in range(max(height - CROP + STRIDE - 1, 0) // STRIDE + 1):
        for j in range(max(width - CROP + STRIDE - 1, 0) // STRIDE + 1):
            bottom, right = min(i * STRIDE + CROP, height), min(j * STRIDE + CROP, width)
            top, left = max(bottom - CROP, 0), max(right - CROP, 0)
            sums[:, :, top:bottom, left:right] += module(image[:, :, top:bottom, left:right]).logits
            counts[:, :, top:bottom, left:right] += 1
    return interpolate(sums / counts, size=size, mode='bilinear', align_corners=False)


def test_the_confusion_matrix_is_equal_to_mmsegmentation():
    """The mIoU of published weights would differ from the published mIoU."""
    batch = {
        'image': np.zeros((3, 101, 150, 3), np.uint8),
        'label': np.full((3, 130, 150), 255, np.uint8),
        'image_size': np.asarray([size for size, _ in SIZES], np.int32),
        'label_size': np.asarray([size for _, size in SIZES], np.int32),
        'weight': np.ones(3, np.float32),
    }
    expected = np.zeros((7, 7))
    module = record.hugging_face_upernet('v1')
    for i, ((rows, columns), (height, width)) in enumerate(SIZES):
        pixels = draw_bytes(f'image {i}', (rows // 8 + 1, columns // 8 + 1, 3), 256).repeat(8, 0).repeat(8, 1)
        batch['image'][i, :rows, :columns] = pixels = pixels[:rows, :columns]
        batch['label'][i, :height, :width] = labels = draw_bytes(f'labels {i}', (height, width), 7)
        normalised = ((pixels / 255 - MEAN) / STD).astype(np.float32)
        with torch.no_grad():
            logits = slide(module, record.nchw(normalised[None]), (height, width))
        np.add.at(expected, (labels, logits[0].argmax(0).numpy()), 1)
    evaluator = MeanIoU(SlidingWindows(MEAN, STD, CROP, STRIDE))
    measured = jax.jit(evaluator.measure)(cases.random_upernet('v1'), batch)
    confusion = np.asarray(measured.sums['confusion'])
    assert np.count_nonzero(expected.sum(0)) > 1, 'all pixels have one class'
    assert np.abs(confusion - expected).sum() <= 4, 'more than two pixels differ'
