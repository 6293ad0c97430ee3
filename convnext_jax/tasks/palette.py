"""The colours of classes in pictures of masks."""

import numpy as np


def class_colours() -> np.ndarray:
    """The colour of each class, (256, 3) uint8; the last one, of pixels without a class (255), is black.

    These are the colours of the Pascal VOC masks, without the black of their first class.
    """
    numbers = np.arange(1, 257)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    colours[255] = 0
    return colours
