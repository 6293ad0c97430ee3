"""The compiled training step: what it leaves in memory."""

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
    """The step, and whether compiling gave its memory back."""
    released = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, 'release_memory', lambda: released.append(True))
        return demo.compile(demo.abstract_state, demo.abstract_batch), released


def test_the_next_state_takes_the_place_of_the_last_and_compiling_leaves_nothing(demo, compiled):
    """A state held twice, or the compiler's half gigabyte beside it: the largest batch that fits is smaller."""
    step, released = compiled
    memory = step.memory_analysis()
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(demo.abstract_state))
    assert state > 4_000_000
    assert memory.alias_size_in_bytes >= state
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 10_000
    assert released


def test_no_array_of_the_state_is_copied(demo, compiled):
    """A moment that is still read when its successor is there is copied first: two passes more over all parameters."""
    text = compiled[0].as_text()
    entry = text[text.index('\nENTRY ') :]
    arguments = dict(re.findall(r'%?([\w.]+) = f32\[([\d,]*)\]\S* parameter\(', entry))
    assert len(arguments) == sum(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(demo.abstract_state))
    copied = [name for name in re.findall(r' copy(?:-start)?\(%?([\w.]+)\)', entry) if name in arguments]
    assert not copied
