"""Models with random weights, and their tensors, for the tests of files."""

import jax
import numpy as np
import pytest

from convnext_jax.interop.layouts import to_layout
from convnext_jax.models import ConvNeXt, create_model, get_parameters, with_parameters

torch = pytest.importorskip('torch', reason='torch is a development requirement')


def random_model(name: str = 'convnextv2_atto', **arguments) -> ConvNeXt:
    model = create_model(name, key=jax.random.key(0), num_classes=3, **arguments)
    rng = np.random.default_rng(1)
    values = {
        name: rng.normal(name.endswith('norm.scale'), 0.3, x.shape).astype(np.float32) * (0.1 if x.ndim > 2 else 1)
        for name, x in get_parameters(model).items()
    }
    return with_parameters(model, jax.tree.map(jax.numpy.asarray, values))


def assert_equal(a: ConvNeXt, b: ConvNeXt, but: tuple[str, ...] = ()) -> None:
    ours, theirs = get_parameters(a), get_parameters(b)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if name not in but:
            np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def state_dict(model: ConvNeXt, layout: str = 'original') -> dict:
    tensors = to_layout(jax.device_get(get_parameters(model)), model.variant, layout)
    return {name: torch.from_numpy(x.copy()) for name, x in tensors.items()}
