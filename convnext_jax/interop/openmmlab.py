"""Files of mmpretrain, mmdetection and mmsegmentation: renames tensors as in the original repository."""

import collections
import re

import numpy as np

from convnext_jax.interop.files import Tensors, printable

BLOCK = {'depthwise_conv': 'dwconv', 'pointwise_conv1': 'pwconv1', 'pointwise_conv2': 'pwconv2'}
"""Name of a layer of a block in OpenMMLab's libraries → its name in the original repository."""
DETECTOR = re.compile(r'(neck|(?!decode_|auxiliary_)\w+_head)\.')
"""The start of the names of a detector's neck and heads, but not of a UPerNet's heads."""


def has_openmmlab_names(tensors: Tensors) -> bool:
    """Whether the layers of the blocks have the names of OpenMMLab's libraries."""
    return any(re.match(r'stages\.\d+\.\d+\.depthwise_conv\.', name) for name in tensors)


def with_original_names(tensors: Tensors) -> Tensors:
    """The tensors with the names of the original repository; unchanged if they do not have OpenMMLab's names.

    A classifier of mmpretrain has the last norm `norm3.*` and the head `head.fc.*`. The backbone of another network has
    norms of several stages, and its `norm3.*` keeps this name.

    Args:
        tensors: name → tensor, without the prefix `backbone.`.
    """
    if not has_openmmlab_names(tensors):
        return tensors
    is_classifier = not any(re.match(r'(norm[0-2]|decode_head)\.', name) or DETECTOR.match(name) for name in tensors)
    renamed = {}
    for name, x in tensors.items():
        name = '.'.join(BLOCK.get(part, part) for part in name.split('.'))
        if is_classifier:
            name = re.sub(r'^norm3\.', 'norm.', re.sub(r'^head\.fc\.', 'head.', name))
        renamed[name] = np.asarray(x).reshape(1, 1, 1, -1) if '.grn.' in name else x
    return renamed


def without_detector(tensors: Tensors) -> tuple[Tensors, list[str]]:
    """The tensors without the neck and the heads of a detector, and a message that names the dropped parts.

    For other files, all tensors and no message.

    Args:
        tensors: name → tensor; the names of the backbone's tensors have no prefix.
    """
    parts = collections.Counter(match[1] for name in tensors if (match := DETECTOR.match(name)))
    if not parts:
        return tensors, []
    listed = ', '.join(f'{printable(part)} ({count} tensors)' for part, count in sorted(parts.items()))
    kept = {name: x for name, x in tensors.items() if not DETECTOR.match(name)}
    return kept, [f'all parts except the backbone are dropped: {listed}']
