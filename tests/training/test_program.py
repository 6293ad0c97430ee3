"""The memory that the compiled training step needs."""

import re

import jax
import jax.numpy as jnp
import pytest
from conftest import shrink_models

from configs.fashion_mnist import get_config
from convnext_jax.training import program
from convnext_jax.training.durations import make_durations
from convnext_jax.training.sharding import make_mesh

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def demo():
    config = get_config()
    config.model.num_classes = 10
    mesh = make_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        shrink_models(patch, depths=(2, 2), widths=(64, 128))
        yield program.Program(config, make_durations(config, images=config.batch_size), mesh)


@pytest.fixture(scope='module')
def compiled(demo):
    """The compiled step, and one element per call of `release_memory`."""
    released = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, 'release_memory', lambda: released.append(True))
        return demo.compile(demo.abstract_state, demo.abstract_batch), released


def test_the_state_is_donated_and_the_memory_of_the_compiler_is_released(demo, compiled):
    """A second copy of the state, or half a gigabyte that the compiler used, would reduce the largest batch size."""
    step, released = compiled
    memory = step.memory_analysis()
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(demo.abstract_state))
    assert state > 4_000_000
    assert memory.alias_size_in_bytes >= state
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 10_000
    assert released


def test_no_array_of_the_state_is_copied(demo, compiled):
    """Every step would be slower: XLA copies a moment that is read after its new value was computed."""
    text = compiled[0].as_text()
    entry = text[text.index('\nENTRY ') :]
    arguments = dict(re.findall(r'%?([\w.]+) = f32\[([\d,]*)\]\S* parameter\(', entry))
    assert len(arguments) == sum(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(demo.abstract_state))
    copied = [name for name in re.findall(r' copy(?:-start)?\(%?([\w.]+)\)', entry) if name in arguments]
    assert not copied
