"""Operations on the selected images of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.data.selection import apply_to_selected


@pytest.mark.parametrize('n', [1, 7, 16, 21])
@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
def test_exactly_the_selected_images_change(n, share):
    """An image would keep its old values, be changed twice, or be augmented with the value of another image."""
    rng = np.random.default_rng(n)
    images = jnp.asarray(rng.integers(0, 100, (n, 3, 2, 1)), jnp.uint8)
    amount = jnp.asarray(rng.integers(1, 100, n), jnp.uint8)
    selected = rng.random(n) < share
    added = apply_to_selected(lambda x, y: x + y[:, None, None, None], jnp.asarray(selected), images, amount)
    expected = np.asarray(images) + np.where(selected, amount, 0)[:, None, None, None]
    np.testing.assert_array_equal(added, expected)


def test_only_chunks_with_selected_images_are_computed():
    """RandAugment would take several times as long: each of its operations is drawn for few images."""
    sizes = []

    def note_and_add(images):
        jax.debug.callback(lambda: sizes.append(len(images)))
        return images + 1

    for count in (0, 3, 16):
        sizes.clear()
        apply_to_selected(note_and_add, jnp.arange(16) >= 16 - count, jnp.zeros((16, 2, 2, 1), jnp.uint8))
        jax.effects_barrier()
        assert sizes == [2] * -(-count // 2)
