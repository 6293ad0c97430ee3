"""The compiled training step: what it leaves in memory."""

import jax
import jax.numpy as jnp
import pytest

from configs.fashion_mnist import get_config
from convnext_jax.training import program
from convnext_jax.training.setup import abstract_model, make_plan
from convnext_jax.training.sharding import make_mesh


@pytest.fixture
def demo():
    config = get_config()
    config.model.num_classes = 10
    mesh = make_mesh(devices=jax.devices()[:1])
    return program.Program(config, make_plan(config, images=config.batch_size), mesh, abstract_model(config))


def test_the_next_state_takes_the_place_of_the_last_and_compiling_leaves_nothing(demo, monkeypatch):
    """A state held twice, or the compiler's half gigabyte beside it: the largest batch that fits is smaller."""
    released = []
    monkeypatch.setattr(program, 'release_memory', lambda: released.append(True))
    rows, size = demo.config.batch_size, demo.config.data.image_size
    batch = {
        'image': jax.ShapeDtypeStruct((rows, size, size, 1), jnp.uint8, sharding=demo.batch_sharding),
        'label': jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=demo.batch_sharding),
    }
    memory = demo.compile(demo.abstract_state, batch).memory_analysis()
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(demo.abstract_state))
    assert state > 40_000_000
    assert memory.alias_size_in_bytes >= state
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 10_000
    assert released
