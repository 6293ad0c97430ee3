"""The training step: accumulation, losses that are not finite, moving average."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from conftest import shrink_models

from convnext_jax.checkpoints.state import init_key, initial_state
from convnext_jax.config import default_config
from convnext_jax.models import get_parameters, parameter_roles
from convnext_jax.tasks import abstract_model, make_task
from convnext_jax.training.optimizer import adamw, cosine_schedule
from convnext_jax.training.sharding import make_mesh
from convnext_jax.training.step import MAX_SKIPS_IN_A_ROW, make_train_step

pytestmark = pytest.mark.slow


def small_config():
    """A small ConvNeXt V2 on 16-pixel images, with all randomness except RandAugment, which is slow to compile."""
    config = default_config()
    config.augment.policy = ''
    config.model.name = 'convnextv2_atto'
    config.model.num_classes = 10
    config.model.patch_size = 2
    config.model.drop_path_rate = 0.3
    config.data.image_size = 16
    config.augment.crop_padding = 2
    config.augment.erasing = 0.5
    config.mix.mixup = 0.8
    config.mix.cutmix = 1.0
    config.ema.decay = 0.9
    return config


def build(config):
    model = abstract_model(config)
    optimizer = adamw(
        dict.fromkeys(get_parameters(model), 1.0),
        parameter_roles(model),
        weight_decay=0.05,
    )
    schedule = cosine_schedule(1e-3, 1e-6, 0, 100)
    state = jax.jit(
        lambda: initial_state(
            get_parameters(make_task(config).build(init_key(config.seed))), optimizer, ema=config.ema.decay > 0
        )
    )()
    mesh = make_mesh(devices=jax.devices()[:1])
    return jax.jit(make_train_step(make_task(config), model, optimizer, schedule, config, 10, mesh)), state


def make_batch(images=16):
    rng = np.random.default_rng(0)
    return {
        'image': rng.integers(0, 256, (images, 16, 16, 3), dtype=np.uint8),
        'label': rng.integers(0, 10, images, dtype=np.int32),
    }


@pytest.fixture(scope='module')
def plain():
    with pytest.MonkeyPatch.context() as patch:
        shrink_models(patch)
        yield build(small_config())


def largest_difference(a, b):
    return max(
        float(np.abs(np.asarray(x) - np.asarray(y)).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def first_moment(state):
    return next(part.mu for part in state.optimizer if isinstance(part, optax.ScaleByAdamState))


def test_accumulation_equals_the_large_batch_with_drop_path_and_augmentation(plain):
    """Users with fewer devices could not reproduce a published run, with its random draws."""
    train_step, state = plain
    config = small_config()
    config.accumulation_steps = 4
    accumulated_step, _ = build(config)
    whole, whole_metrics = train_step(state, make_batch())
    parts, part_metrics = accumulated_step(state, make_batch())
    np.testing.assert_allclose(part_metrics['loss'], whole_metrics['loss'], rtol=1e-6)
    # Compares the first moment, a tenth of the gradient, because Adam's division would magnify rounding errors.
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(first_moment(whole)))
    assert largest_difference(first_moment(whole), first_moment(parts)) < 1e-5 * scale


def test_forty_steps_learn_a_batch(plain):
    """Training would not reduce the loss."""
    train_step, state = plain
    losses = []
    for _ in range(40):
        state, metrics = train_step(state, make_batch())
        losses.append(float(metrics['loss']))
    assert np.mean(losses[-5:]) < losses[0] - 0.2, 'the mean of five losses, because each step mixes other images'
    assert int(state.step) == 40
    assert int(state.skipped) == 0


def test_random_draws_depend_only_on_seed_and_step(plain):
    """A resumed run would draw other random numbers, or each step would repeat the draws of the first."""
    train_step, state = plain
    once, again = train_step(state, make_batch())[1], train_step(state, make_batch())[1]
    assert float(once['loss']) == float(again['loss'])
    other_step = train_step(jax.tree.map(lambda x: x, state_at(state, 1)), make_batch())[1]
    assert float(once['loss']) != float(other_step['loss'])


def state_at(state, step):
    return dataclasses.replace(state, step=np.int32(step), last_good=np.int32(step))


def test_the_moving_average_follows_the_updated_parameters(plain):
    """The average would be one step behind the parameters."""
    train_step, state = plain
    new, _ = train_step(state, make_batch())
    name = 'head.kernel'
    expected = 0.9 * np.asarray(state.ema[name]) + 0.1 * np.asarray(new.parameters[name])
    np.testing.assert_allclose(new.ema[name], expected, rtol=1e-5, atol=1e-8)


def test_a_loss_that_is_not_finite_changes_only_the_counters(plain):
    """One bad batch would turn weights, moments and moving average into NaN."""
    train_step, state = plain
    state, _ = train_step(state, make_batch())
    broken = {name: value * np.float32(np.nan) for name, value in state.parameters.items()}
    poisoned = dataclasses.replace(state, parameters=broken)
    new, metrics = train_step(poisoned, make_batch())
    assert not np.isfinite(metrics['loss'])
    assert int(new.skipped) == 1
    assert int(new.step) == int(state.step) + 1
    assert int(metrics['skips_in_a_row']) == 1
    assert largest_difference(new.optimizer, state.optimizer) == 0
    assert largest_difference(new.ema, state.ema) == 0
    healed = dataclasses.replace(new, parameters=state.parameters)
    _, metrics = train_step(healed, make_batch())
    assert int(metrics['skips_in_a_row']) == 0
    assert int(metrics['skipped']) == 1


def test_after_ten_skipped_steps_the_state_stays_unchanged(plain):
    """The loop checks for skips only when it logs, and the state of the tenth skip would be lost until then."""
    train_step, state = plain
    stuck = dataclasses.replace(state, step=np.int32(MAX_SKIPS_IN_A_ROW), last_good=np.int32(0))
    new, metrics = train_step(stuck, make_batch())
    assert np.isfinite(metrics['loss'])
    assert int(metrics['skips_in_a_row']) == MAX_SKIPS_IN_A_ROW + 1
    assert largest_difference(new.parameters, state.parameters) == 0
