"""Adaptation of RGB weights to images with another number of channels, as timm's `adapt_input_conv`."""

import numpy as np

from convnext_jax.errors import UserError
from convnext_jax.interop.recognition import STEMS, OpenedWeights


def with_channels(opened: OpenedWeights, in_channels: int | None) -> tuple[OpenedWeights, list[str]]:
    """The weights for images with `in_channels` channels, and messages for the user.

    Args:
        opened: the weights.
        in_channels: number of channels; None for as many as the weights have.

    Raises:
        UserError: the weights are not for RGB images, or `in_channels` is below 1.
    """
    if in_channels in (None, opened.in_channels):
        return opened, []
    if in_channels < 1:
        raise UserError(f'in_channels must be at least 1, not {in_channels}')
    if opened.in_channels != 3:
        raise UserError(
            f'in_channels={in_channels}, but the weights are for images with {opened.in_channels} channel(s): only '
            'weights for RGB can be adapted'
        )
    name = next(name for name in opened.tensors if name.endswith(STEMS[opened.layout]))
    kernel = adapted_kernel(np.asarray(opened.tensors[name], np.float32), in_channels)
    opened = opened._replace(tensors={**opened.tensors, name: kernel}, in_channels=in_channels)
    how = 'summed' if in_channels == 1 else f'repeated and multiplied by 3 / {in_channels}'
    return opened, [f'the stem is adapted from RGB to {in_channels} channel(s): its kernels are {how}']


def adapted_kernel(kernel: np.ndarray, channels: int) -> np.ndarray:
    """An RGB kernel, (out, 3, height, width), for another number of channels.

    Args:
        kernel: the kernel.
        channels: number of channels. For 1 the kernel is summed over RGB. For more, its channels are repeated in turn
            and rescaled, so that the outputs keep their size.
    """
    if channels == 1:
        return kernel.sum(1, keepdims=True)
    return kernel[:, np.arange(channels) % 3] * np.float32(3 / channels)
