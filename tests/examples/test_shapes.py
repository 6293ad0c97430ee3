"""The drawings of the segmentation demo."""

import sys

import numpy as np
from conftest import ROOT

from convnext_jax.data.masks import open_masks
from convnext_jax.data.segmentation import EvalMasks

sys.path.insert(0, str(ROOT / 'examples'))
import shapes


def test_the_drawings_are_read_as_images_with_masks(tmp_path):
    """The demo would end with an error, or its masks would not match its images."""
    shapes.write_shapes(tmp_path, {'training': 1, 'validation': 6})
    data = EvalMasks(open_masks('masks', str(tmp_path), 'validation'))
    assert data.classes.names == tuple(shapes.CLASSES)
    means = {label: [] for label in range(4)}
    for index in range(len(data)):
        image, labels = data.decode(index)
        for label in means:
            means[label].append(image[labels == label])
    for label, colour in enumerate(shapes.CLASSES.values()):
        pixels = np.concatenate(means[label]).mean(0)
        assert colour is None or pixels.argmax() == np.argmax(colour)
