"""The interface of tasks: sums, weights and terms in the step, the headline, and the training loop on a small task."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import eval as evaluation
from convnext_jax import tasks
from convnext_jax.checkpoints.checkpoint import restore_parameters, saved_steps
from convnext_jax.checkpoints.state import initial_state
from convnext_jax.config import as_dict, check_values, default_config, from_dict
from convnext_jax.errors import UserError
from convnext_jax.models import ConvNeXt, Variant, get_parameters, parameter_roles, with_parameters
from convnext_jax.monitoring.records import read_records
from convnext_jax.runtime.stop import Stopped
from convnext_jax.tasks import Headline
from convnext_jax.training.loop import train
from convnext_jax.training.optimizer import adamw
from convnext_jax.training.sharding import batch_sharding, make_mesh, state_sharding
from convnext_jax.training.step import make_train_step
from tests.tasks.mean_colour import Colours, Errors, MeanColour


class WithoutStatistic(MeanColour):
    """The task without statistics, so that gradients can be accumulated; some of its kernels can be sharded."""

    def build(self, key):
        variant = Variant((1,), (128,), patch_size=4, grn=True, layer_scale_init=0)
        return ConvNeXt(variant, key=key, num_classes=3, drop_path_rate=0.2)


def build(batch_size, accumulation_steps=1, axes=(1, 1)):
    """The training step of the task on a mesh, as a function of the batch alone."""
    config = default_config()
    task = WithoutStatistic(config)
    config.batch_size, config.accumulation_steps, config.ema.decay = batch_size, accumulation_steps, 0.5
    model = jax.jit(task.build)(jax.random.key(0))
    roles, mesh = parameter_roles(model), make_mesh(*axes, jax.devices()[: axes[0] * axes[1]])
    optimizer = adamw(
        dict.fromkeys(roles, 1.0),
        roles,
        weight_decay=0.05,
    )
    state = jax.jit(lambda parameters: initial_state(parameters, optimizer, ema=True))(get_parameters(model))
    state = jax.device_put(state, state_sharding(mesh, roles, state))
    step = jax.jit(make_train_step(task, model, optimizer, lambda _: 1e-3, config, 10, mesh))
    return lambda batch: step(state, jax.device_put(batch, batch_sharding(mesh)))


def first_moment(state):
    """Adam's first moment after one step, which is a tenth of the gradient."""
    return jax.device_get(next(part.mu for part in state.optimizer if isinstance(part, optax.ScaleByAdamState)))


def make_batch(weights):
    rng = np.random.default_rng(0)
    return {
        'image': rng.normal(size=(len(weights), 16, 16, 3)).astype(np.float32),
        'weight': np.asarray(weights, np.float32),
    }


WEIGHTS = [3, 0, 0, 0.5, 0, 0, 0, 7]  # uneven over devices and parts, so that a mean of means is another loss


@pytest.fixture(scope='module')
def step_alone():
    """The training step on one device."""
    return build(8)


@pytest.fixture(scope='module')
def alone(step_alone):
    state, metrics = step_alone(make_batch(WEIGHTS))
    return first_moment(state), jax.device_get(metrics)


@pytest.mark.slow
@pytest.mark.parametrize(('parts', 'axes'), [(4, (1, 1)), (1, (4, 2)), (2, (2, 2))])
def test_uneven_weights_combine_exactly_over_parts_and_devices(alone, parts, axes):
    """The loss depends on the number of devices, if a device with mostly unlabelled pixels counts like the others."""
    moments, metrics = alone
    state, others = build(8, parts, axes)(make_batch(WEIGHTS))
    assert others['loss'] == pytest.approx(metrics['loss'], rel=1e-5)
    assert others['grad_norm'] == pytest.approx(metrics['grad_norm'], rel=1e-4)
    for name, moment in first_moment(state).items():
        np.testing.assert_allclose(moment, moments[name], atol=1e-5 * metrics['grad_norm'], err_msg=name)


@pytest.mark.slow
def test_terms_are_logged_over_the_same_weight(alone):
    """The logged terms of a loss do not add up to the loss."""
    _, metrics = alone
    assert 0 < metrics['first'] <= metrics['loss']


def test_a_batch_without_weight_changes_nothing_but_decay(step_alone):
    """A batch with only unlabelled pixels gives 0 / 0, which is skipped as not finite, and ten of them stop the run."""
    state, metrics = step_alone(make_batch([0] * 8))
    assert (metrics['loss'], metrics['grad_norm'], metrics['skipped']) == (0, 0, 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.parameters))


def test_the_headline_describes_a_record():
    """A run whose metric is NaN fails while it prints its last line."""
    headline = Headline('top1', 'top-1', ' %')
    assert headline.describe({'top1': 50.0, 'loss': 1.0}) == 'top-1 50.00 %'
    assert headline.describe({'top1': 50.0, 'ema_top1': None}) == 'top-1 50.00 %, EMA not finite'


@pytest.fixture
def mean_colour(monkeypatch):
    """A config for a short run of the small task, which is registered."""
    monkeypatch.setitem(tasks.TASKS, 'mean_colour', 'tests.tasks.mean_colour:MeanColour')
    config = default_config('mean_colour')
    config.update_from_flattened_dict(
        {
            'data.train_split': '64',
            'data.eval_split': '20',
            'batch_size': 16,
            'steps': 12,
            'optimizer.warmup_steps': 1,
            'ema.decay': 0.5,
            'log_every_steps': 1,
        }
    )
    return config


def losses(run):
    return [(record['split'], record['step'], pytest.approx(record['loss'], rel=1e-4)) for record in read_records(run)]


@pytest.mark.slow
def test_the_loop_runs_any_task(mean_colour, tmp_path, monkeypatch, capsys):
    """A new task needs changes in the training loop, or a copy of it.

    The run is stopped during an evaluation, resumed on another mesh and evaluated. Its results equal the results of an
    uninterrupted run, and each example counts once.
    """
    unbroken, run = tmp_path / 'unbroken', tmp_path / 'run'
    train(mean_colour.copy_and_resolve_references(), unbroken)
    summary, signals = Errors.summary, iter([signal.SIGTERM])

    def stopped(*arguments):
        for number in signals:
            signal.raise_signal(number)
        return summary(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Errors, 'summary', stopped)
        with pytest.raises(Stopped):
            train(mean_colour.copy_and_resolve_references(), run)
    assert saved_steps(run / 'checkpoints') == [4]
    mean_colour.mesh.data, mean_colour.mesh.fsdp = 4, 2
    capsys.readouterr()
    train(mean_colour, run)
    assert 'resumes at step 4 of 12' in capsys.readouterr().out
    assert losses(run) == [(split, step, loss.expected) for split, step, loss in losses(unbroken)]
    ours, expected = (
        restore_parameters(workdir / 'checkpoints', 12, 'parameters')['seen'] for workdir in (run, unbroken)
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(expected).min() > 0, 'the running statistic was not updated'
    assert all('first' in record for record in read_records(run) if record['split'] == 'train'), (
        'a term is not recorded'
    )
    assert json.loads((run / 'config.json').read_text())['task'] == 'mean_colour'

    images = [Colours(20).load(index) for index in range(20)]
    pixels, weights = np.stack([x['image'] for x in images]), np.stack([x['weight'] for x in images])
    model = jax.jit(MeanColour(mean_colour).build)(jax.random.key(0))
    model = with_parameters(model, restore_parameters(run / 'checkpoints', 12, 'ema'))
    colours = jax.jit(lambda model: model(jnp.asarray(pixels)))(model)
    errors = np.square(colours - pixels.mean((1, 2))).sum(-1)
    evaluation.main(['eval.py', f'--workdir={run}', '--splits=any@20', '--params=ema'])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result['images'] == 16, 'every fifth image has weight 0'
    assert result['loss'] == pytest.approx((errors * weights).sum() / weights.sum(), rel=1e-5)
    assert result['close'] == 50, 'the results of padding are among the examples'

    figure = np.asarray(Image.open(run / 'figures' / 'colours.png')).astype(int)
    expected = np.clip(128 + 50 * np.asarray(colours[:16]), 0, 255).astype(int)
    assert np.abs(figure - expected[:, None]).max() <= 1
    assert any(b'20/colours' in file.read_bytes() for file in (run / 'tensorboard').glob('events*'))


@pytest.mark.slow
def test_other_data_are_refused_when_a_run_of_any_task_resumes(mean_colour, tmp_path, monkeypatch):
    """A run silently continues with other data."""
    mean_colour.steps = 2
    train(mean_colour, tmp_path)
    mean_colour.steps = 4
    monkeypatch.setattr(Colours, 'facts', {'noise': 'uniform'})
    with pytest.raises(UserError, match="the run began on another data set: noise: 'normal' became 'uniform'"):
        train(mean_colour, tmp_path)


def test_a_config_belongs_to_its_task(mean_colour):
    """A run trains with fields that nobody has set, or ignores a misspelt field and cannot resume."""
    assert 'mix' not in mean_colour
    assert from_dict(as_dict(mean_colour)) == mean_colour
    mean_colour.data.worker = 2
    with pytest.raises(UserError, match=r'the task mean_colour has no config field data\.worker: correct its name'):
        check_values(mean_colour)
    del mean_colour.data.worker
    mean_colour.task = 'classification'
    with pytest.raises(UserError, match='the config has no augment.color_jitter, .*choose a config file for this task'):
        check_values(mean_colour)
    mean_colour.task = 'clasification'
    with pytest.raises(UserError, match="there is no task 'clasification': config.task must be one of classification"):
        check_values(mean_colour)
