"""What every implementation computes, and what its module returns."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.05  # of AdamW, the same everywhere


@dataclasses.dataclass(frozen=True)
class Workload:
    """What every implementation computes, with random weights and a batch that stays on the device.

    Attributes:
        implementation: its name.
        model: its name in convnext_jax, or in timm if the variant is None.
        variant: the fields of the model's architecture in convnext_jax; None for a model that only timm has.
        training: forward, backward and AdamW with weight decay on arrays of two and more axes; if False, the forward
            pass. No augmentation, drop path, label smoothing or moving average.
        latency: the result of each step is waited for before the next step starts, also on an accelerator.
        batch: images.
        size: height and width of the images in pixels.
        classes: outputs of the head.
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
    """The device of a process, as the process's library uses it.

    Attributes:
        name: 'cpu', or the accelerator's name.
        seconds: calls a function that returns a result, waits until the result is ready, and returns the time of both.
        make_matmul: side, dtype → a function that multiplies two square matrices of random numbers (products of
            constants need less power, and an accelerator runs them at a higher clock).
        make_copy: bytes → a function that copies an array of that size into another one.
        peak_memory: the maximum of bytes in use on an accelerator so far; None on CPU, or if it is not known.
    """

    name: str
    seconds: Callable[[Callable[[], object]], float]
    make_matmul: Callable[[int, str], Callable[[], object]]
    make_copy: Callable[[int], Callable[[], object]]
    peak_memory: Callable[[], int | None]


class Baseline(NamedTuple):
    """An implementation, a baseline or ours, that is set up.

    Attributes:
        step: starts one step and returns its result, which an accelerator may still be computing.
        parameters: the number of the model's parameters.
        device: where it computes.
    """

    step: Callable[[], object]
    parameters: int
    device: Device


def example_batch(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, 3) float32, labels (N,) int64."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((workload.batch, workload.size, workload.size, 3), np.float32)
    return images, rng.integers(workload.classes, size=workload.batch)
