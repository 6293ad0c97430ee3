"""Durations in steps override durations in epochs."""

from convnext_jax.config import default_config
from convnext_jax.training.durations import Durations, make_durations


def test_a_recipe_in_steps_keeps_its_steps_for_any_size_of_the_data():
    """A recipe of 160,000 iterations would be longer or shorter on a part of the data."""
    config = default_config()
    config.update(batch_size=16, steps=160_000, eval_every_steps=16_000)
    config.optimizer.warmup_steps = 1500
    assert make_durations(config, 20_210) == Durations(1263, 160_000, 1500, 16_000)
    config.update(epochs=10.0, steps=0, eval_every_epochs=2.0, eval_every_steps=0)
    config.optimizer.update(warmup_epochs=1.0, warmup_steps=0)
    assert make_durations(config, 20_210) == Durations(1263, 12_630, 1263, 2526)
