"""What a contender is told, and what it brings."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MATMUL_SIDE = 2048
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.05  # of AdamW, everywhere the same


@dataclasses.dataclass(frozen=True)
class Task:
    """What every contender does the same way, with random weights and a batch that stays on the device.

    Attributes:
        contender: its name.
        model: by our names.
        variant: the fields of the model's architecture.
        training: forward, backward and AdamW, weight decay on the weights of two and more axes; or else the forward
            pass alone. No augmentation, drop path, label smoothing or moving average.
        batch: images.
        size: side of the images in pixels.
        classes: outputs of the head.
        dtype: 'float32' or 'bfloat16', of matrix products and convolutions; parameters are float32.
    """

    contender: str
    model: str
    variant: dict
    training: bool
    batch: int
    size: int
    classes: int
    dtype: str


class Contender(NamedTuple):
    """A contender that is set up.

    Attributes:
        step: does one step and returns when its result is there.
        matmul: multiplies two square matrices of side MATMUL_SIDE and of the task's dtype, the same way.
        parameters: how many the model has.
        device: 'cpu', or the accelerator's name.
    """

    step: Callable[[], None]
    matmul: Callable[[], None]
    parameters: int
    device: str


def example_batch(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, 3) float32, labels (N,) int64."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((task.batch, task.size, task.size, 3), np.float32)
    return images, rng.integers(task.classes, size=task.batch)
