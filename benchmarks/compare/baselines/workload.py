"""What every implementation computes, and what its module returns."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MATMUL_SIDE = 2048
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.05  # of AdamW, the same everywhere


@dataclasses.dataclass(frozen=True)
class Workload:
    """What every implementation computes, with random weights and a batch that stays on the device.

    Attributes:
        implementation: its name.
        model: its name in convnext_jax.
        variant: the fields of the model's architecture.
        training: forward, backward and AdamW with weight decay on arrays of two and more axes; if False, the forward
            pass. No augmentation, drop path, label smoothing or moving average.
        batch: images.
        size: height and width of the images in pixels.
        classes: outputs of the head.
        dtype: 'float32' or 'bfloat16', of matrix products and convolutions; parameters are float32.
    """

    implementation: str
    model: str
    variant: dict
    training: bool
    batch: int
    size: int
    classes: int
    dtype: str


class Baseline(NamedTuple):
    """An implementation, a baseline or ours, that is set up.

    Attributes:
        step: does one step and returns when its result is ready.
        matmul: multiplies two square matrices of side MATMUL_SIDE and of the workload's dtype; returns likewise.
        parameters: the number of the model's parameters.
        device: 'cpu', or the accelerator's name.
    """

    step: Callable[[], None]
    matmul: Callable[[], None]
    parameters: int
    device: str


def example_batch(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, 3) float32, labels (N,) int64."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((workload.batch, workload.size, workload.size, 3), np.float32)
    return images, rng.integers(workload.classes, size=workload.batch)
