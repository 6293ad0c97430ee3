"""The contract of tasks: what the training step makes of sums, weights and terms, and the headline of an evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convnext_jax import create_model
from convnext_jax.config import default_config
from convnext_jax.models import get_parameters, parameter_roles
from convnext_jax.tasks import Headline, Loss, Task
from convnext_jax.training.optimizer import adamw
from convnext_jax.training.sharding import batch_sharding, make_mesh, state_sharding
from convnext_jax.training.state import initial_state
from convnext_jax.training.step import make_train_step


class MeanColour(Task):
    """Learns the mean colour of an image; an image may weigh more than another, or nothing."""

    headline = Headline('accuracy', 'accuracy')
    features = open = open_split = build = multiply_adds = evaluator = None

    def augment(self, batch, keys, batch_key, epoch):
        noise = jax.vmap(lambda key: jax.random.normal(key, (16, 16, 3)))(keys)
        return batch | {'image': batch['image'] + 0.1 * noise}

    def loss(self, model, batch, keys):
        errors = jnp.square(model(batch['image'], key=keys) - batch['image'].mean((1, 2))).sum(-1)
        weight = batch['weight']
        return Loss((errors * weight).sum(), weight.sum(), {'first': (errors * weight)[:1].sum()})


def build(batch_size, accumulation_steps=1, axes=(1, 1)):
    """A step of the task on a mesh, and its first state."""
    config = default_config()
    config.batch_size, config.accumulation_steps, config.ema.decay = batch_size, accumulation_steps, 0.5
    model = create_model('convnextv2_atto', key=jax.random.key(0), num_classes=3, patch_size=2, drop_path_rate=0.2)
    roles, mesh = parameter_roles(model), make_mesh(*axes, jax.devices()[: axes[0] * axes[1]])
    optimizer = adamw(
        dict.fromkeys(roles, 1.0),
        roles,
        weight_decay=0.05,
    )
    state = initial_state(get_parameters(model), optimizer, ema=True)
    state = jax.device_put(state, state_sharding(mesh, roles, state))
    step = jax.jit(make_train_step(MeanColour(config), model, optimizer, lambda _: 1e-3, config, 10, mesh))
    return lambda batch: step(state, jax.device_put(batch, batch_sharding(mesh)))


def first_moment(state):
    """A tenth of the gradient, after one step."""
    return jax.device_get(next(part.mu for part in state.optimizer if isinstance(part, optax.ScaleByAdamState)))


def make_batch(weights):
    rng = np.random.default_rng(0)
    return {
        'image': rng.normal(size=(len(weights), 16, 16, 3)).astype(np.float32),
        'weight': np.asarray(weights, np.float32),
    }


WEIGHTS = [3, 0, 0, 0.5, 0, 0, 0, 7]  # uneven over devices and parts: a mean of means would be another loss


@pytest.fixture(scope='module')
def alone():
    state, metrics = build(8)(make_batch(WEIGHTS))
    return first_moment(state), jax.device_get(metrics)


@pytest.mark.parametrize(('parts', 'axes'), [(4, (1, 1)), (1, (4, 2)), (2, (2, 2))])
def test_uneven_weights_combine_exactly_over_parts_and_devices(alone, parts, axes):
    """A device whose pixels are mostly unlabelled must not count as much as the others."""
    moments, metrics = alone
    state, others = build(8, parts, axes)(make_batch(WEIGHTS))
    assert others['loss'] == pytest.approx(metrics['loss'], rel=1e-5)
    assert others['grad_norm'] == pytest.approx(metrics['grad_norm'], rel=1e-4)
    for name, moment in first_moment(state).items():
        np.testing.assert_allclose(moment, moments[name], atol=1e-5 * metrics['grad_norm'], err_msg=name)


def test_terms_are_logged_over_the_same_weight(alone):
    """A task's parts of the loss must add up to it in the log."""
    _, metrics = alone
    assert 0 < metrics['first'] <= metrics['loss']


def test_a_batch_without_weight_changes_nothing_but_decay():
    """A batch of unlabelled pixels alone: 0 / 0 would count as a broken step, and ten of them stop the run."""
    state, metrics = build(8)(make_batch([0] * 8))
    assert (metrics['loss'], metrics['grad_norm'], metrics['skipped']) == (0, 0, 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.parameters))


def test_the_headline_shows_what_the_records_hold():
    headline = Headline('top1', 'top-1', ' %')
    assert headline.describe({'top1': 50.0, 'loss': 1.0}) == 'top-1 50.00 %'
    assert headline.describe({'top1': 50.0, 'ema_top1': None}) == 'top-1 50.00 %, EMA not finite'
