"""Models with random weights, and their tensors, for the tests of files."""

import functools
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from convnext_jax.errors import UserError
from convnext_jax.interop.layouts import LAYOUTS, entries, to_layout
from convnext_jax.models import ConvNeXt, Variant, create_model, get_parameters, get_variant, with_parameters
from tests.reference import draw_parameters


@functools.cache
def abstract_model(variant: Variant, **arguments) -> ConvNeXt:
    """A model with shapes instead of arrays, which is traced once for all tests."""
    return jax.eval_shape(lambda key: create_model(variant, key=key, **arguments), jax.random.key(0))


def random_model(name: str | Variant = 'convnextv2_atto', num_classes: int = 3, **arguments) -> ConvNeXt:
    variant = get_variant(name) if isinstance(name, str) else name
    model = abstract_model(variant, num_classes=num_classes, **arguments)
    drawn = draw_parameters({name: x.shape for name, x in get_parameters(model).items()})
    return with_parameters(model, jax.tree.map(jax.numpy.asarray, drawn))


def assert_equal(a: ConvNeXt, b: ConvNeXt, but: tuple[str, ...] = ()) -> None:
    ours, theirs = get_parameters(a), get_parameters(b)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if name not in but:
            np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def layouts_of(variant: Variant) -> list[str]:
    """The layouts that can hold the architecture."""
    return [layout for layout in LAYOUTS if _can_hold(layout, variant)]


def _can_hold(layout: str, variant: Variant) -> bool:
    try:
        entries({}, variant, layout)
    except UserError:
        return False
    return True


def state_dict(model: ConvNeXt, layout: str = 'original') -> dict[str, np.ndarray]:
    """The tensors of a model in a layout."""
    tensors = to_layout(jax.device_get(get_parameters(model)), model.variant, layout)
    return {name: np.array(x) for name, x in tensors.items()}


def fcmae_state_dict(model: ConvNeXt) -> dict[str, np.ndarray]:
    """The encoder as in the original pre-training: sparse kernels have their positions in column-major order."""
    sparse = {}
    for name, x in state_dict(model).items():
        if name.startswith(('norm.', 'head.')):
            continue
        module, parameter = name.rsplit('.', 1)
        name = f'encoder.{name}'
        if module.endswith('dwconv') and parameter == 'weight':
            sparse[f'encoder.{module}.kernel'] = x[:, 0].transpose(2, 1, 0).reshape(49, -1)
        elif module.startswith('downsample_layers.') and module[18] != '0' and x.ndim == 4:
            sparse[f'encoder.{module}.kernel'] = x.transpose(3, 2, 1, 0).reshape(4, x.shape[1], x.shape[0])
        elif 'pwconv' in module:
            sparse[f'encoder.{module}.linear.{parameter}'] = x
        elif module.startswith('stages') and module.endswith('norm'):
            sparse[f'encoder.{module}.ln.{parameter}'] = x
        elif 'grn' in module:
            sparse[name] = x.reshape(1, -1)
        else:
            sparse[name] = x
    sparse['mask_token'] = np.zeros((1, 2, 1, 1), np.float32)
    return {name: np.ascontiguousarray(x) for name, x in sparse.items()}


def save(tensors: dict[str, np.ndarray], file: Path) -> None:
    save_file(tensors, file, metadata={'format': 'pt'})
