"""Workload, the input of every implementation's `build`, and Baseline, its result."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.05  # of AdamW, in all implementations


@dataclasses.dataclass(frozen=True)
class Workload:
    """The computation to measure, with random weights and a batch that stays on the device.

    Attributes:
        implementation: name of the implementation.
        model: name of the model in convnext_jax, or in timm if the variant is None.
        variant: the fields of the model's architecture in convnext_jax; None for a model that only timm has.
        training: forward, backward and AdamW with weight decay on arrays of two and more axes; if False, the forward
            pass. No augmentation, drop path, label smoothing or moving average.
        latency: whether to wait for the result of each step before the next step starts, also on an accelerator.
        batch: number of images.
        size: height and width of the images in pixels.
        classes: number of outputs of the head.
        dtype: 'float32' or 'bfloat16', of matrix products and convolutions; parameters are float32.
    """

    implementation: str
    model: str
    variant: dict | None
    training: bool
    latency: bool
    batch: int
    size: int
    classes: int
    dtype: str


class Device(NamedTuple):
    """The device of a process, as used by its library.

    Attributes:
        name: 'cpu', or the accelerator's name.
        seconds: calls a function, waits until its result is ready, and returns the total time.
        make_matmul: side, dtype → a function that multiplies two square matrices of random numbers. (Constants need
            less power, and an accelerator multiplies them at a higher clock.)
        make_copy: bytes → a function that copies an array of that size into another one.
        peak_memory: peak of the bytes in use on an accelerator so far; None on CPU, or if it is unknown.
    """

    name: str
    seconds: Callable[[Callable[[], object]], float]
    make_matmul: Callable[[int, str], Callable[[], object]]
    make_copy: Callable[[int], Callable[[], object]]
    peak_memory: Callable[[], int | None]


class Baseline(NamedTuple):
    """An implementation (a baseline or ours) after set-up.

    Attributes:
        step: dispatches one step and returns its result, which an accelerator may still be computing.
        parameters: number of parameters of the model.
        device: the device that it uses.
    """

    step: Callable[[], object]
    parameters: int
    device: Device


def example_batch(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, 3) float32, labels (N,) int64."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((workload.batch, workload.size, workload.size, 3), np.float32)
    return images, rng.integers(workload.classes, size=workload.batch)
