"""BatchNorm statistics cover the global batch, and are skipped, averaged, saved and read like parameters."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from configs.fashion_mnist import get_config
from convnext_jax.checkpoints.checkpoint import restore, restore_parameters
from convnext_jax.checkpoints.manager import Checkpoints
from convnext_jax.checkpoints.state import initial_state
from convnext_jax.config import default_config, read_config
from convnext_jax.errors import UserError
from convnext_jax.export import export_stablehlo
from convnext_jax.models import (
    ConvNeXt,
    get_parameters,
    get_statistics,
    get_weights,
    parameter_roles,
    with_parameters,
)
from convnext_jax.models.batch_norm import BatchNorm
from convnext_jax.models.layers import Linear, PatchConv
from convnext_jax.monitoring.records import read_records
from convnext_jax.tasks import Loss, classification, make_task
from convnext_jax.training.durations import make_durations
from convnext_jax.training.loop import Run, train
from convnext_jax.training.optimizer import adamw
from convnext_jax.training.sharding import batch_sharding, make_mesh, replicated, state_sharding, sum_over_mesh
from convnext_jax.training.standalone_evaluation import EvaluationProtocol, evaluate_run, evaluate_weights
from convnext_jax.training.step import make_train_step
from convnext_jax.training.weights import read_weights
from tests.tasks.mean_colour import MeanColour

BATCH_SIZE = 16
ONE_DEVICE, DATA_PARALLEL, SHARDED = (1, 1), (8, 1), (4, 2)


class Segmenter(nnx.Module):
    """Predicts a class for each patch of an image, with a BatchNorm before and after a kernel that FSDP shards."""

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.stem = PatchConv(3, 256, 4, key=keys[0])
        self.first = BatchNorm(256)
        self.linear = Linear(256, 256, key=keys[1])
        self.second = BatchNorm(256)
        self.head = Linear(256, 5, key=keys[2])

    def __call__(self, images, *, key=None):
        x = jax.nn.gelu(self.first(self.stem(images), training=key is not None))
        return self.head(jax.nn.gelu(self.second(self.linear(x), training=key is not None)))


class Segmentation(MeanColour):
    """A task with only the methods that the training step calls."""

    def augment(self, batch, keys):
        return batch

    def loss(self, model, batch, keys):
        logits = model(batch['image'], key=keys)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
        return Loss(losses.sum(), jnp.float32(losses.size))


class Training:
    """The jitted training step of a `Segmenter` on a mesh, and its first state."""

    def __init__(self, axes, **options):
        self.mesh = make_mesh(*axes, jax.devices()[: axes[0] * axes[1]])
        config = default_config()
        config.update(batch_size=BATCH_SIZE, ema={'decay': 0.75}, **options)
        model = Segmenter(jax.random.key(0))
        roles = parameter_roles(model)
        optimizer = adamw(dict.fromkeys(roles, 1.0), roles, weight_decay=0.05)
        state = initial_state(get_parameters(model), optimizer, ema=True, statistics=get_statistics(model))
        self.sharding = state_sharding(self.mesh, roles, state)
        self.first = jax.device_put(state, self.sharding)
        train_step = make_train_step(Segmentation(config), model, optimizer, lambda _: 1e-3, config, 10, self.mesh)
        self._train_step = jax.jit(train_step, out_shardings=(self.sharding, None))

    def step(self, state, batch):
        return self._train_step(state, jax.device_put(batch, batch_sharding(self.mesh)))

    @property
    def abstract_state(self):
        shape = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        return jax.tree.map(shape, self.first, self.sharding)


def make_batch(step=0, scale=1.0):
    """Images with different means, so that the mean of a few images is far from the mean of the batch."""
    rng = np.random.default_rng(step)
    images = rng.normal(size=(BATCH_SIZE, 8, 8, 3)) + rng.normal(size=(BATCH_SIZE, 1, 1, 3))
    return {
        'image': np.asarray(scale * images, np.float32),
        'label': rng.integers(0, 5, (BATCH_SIZE, 2, 2), dtype=np.int32),
    }


@pytest.fixture(scope='module')
def trainings():
    return {axes: Training(axes) for axes in (ONE_DEVICE, DATA_PARALLEL, SHARDED)}


@pytest.fixture(scope='module')
def stepped(trainings):
    """The state after one step on each mesh, and the step's metrics."""
    return {axes: training.step(training.first, make_batch()) for axes, training in trainings.items()}


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def first_moment(state):
    """Adam's first moment: after one step, a tenth of the gradient."""
    return jax.device_get(next(part.mu for part in state.optimizer if isinstance(part, optax.ScaleByAdamState)))


@pytest.mark.parametrize('axes', [DATA_PARALLEL, SHARDED])
def test_statistics_and_gradients_cover_the_global_batch(stepped, axes):
    """With two images per device, as in segmentation, norms per device would train another network on each mesh."""
    (expected_state, metrics), (state, new_metrics) = stepped[ONE_DEVICE], stepped[axes]
    assert float(new_metrics['loss']) == pytest.approx(float(metrics['loss']), rel=1e-5)
    for name, expected in expected_state.statistics.items():
        np.testing.assert_allclose(state.statistics[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)
    moments = first_moment(expected_state)
    scale = max(np.abs(moment).max() for moment in moments.values())
    for name, moment in first_moment(state).items():
        np.testing.assert_allclose(moment, moments[name], rtol=1e-5, atol=1e-5 * scale, err_msg=name)


def test_statistics_are_replicated(stepped):
    """Devices with different running means would evaluate different networks, and only one of them would be saved."""
    state = stepped[SHARDED][0]
    assert 'fsdp' in state.parameters['linear.kernel'].sharding.spec
    for name, statistic in state.statistics.items():
        for array in (statistic, state.ema[name]):
            assert array.sharding.is_fully_replicated
            for shard in array.addressable_shards[1:]:
                assert_same_bits(shard.data, array.addressable_shards[0].data)


def test_statistics_that_differ_between_devices_are_averaged():
    """A task that does not average over devices would leave each device with a different state."""
    mesh = make_mesh(4, 2)
    function = sum_over_mesh(lambda parameters, statistics, x: (x.sum(), {}, {'seen': x.mean()}), mesh, {})
    _, _, statistics = jax.jit(function)({}, {'seen': jnp.zeros(())}, jnp.arange(16.0))
    for shard in statistics['seen'].addressable_shards:
        assert shard.data == 7.5


def test_the_first_statistics_equal_the_formula_of_batch_norm(trainings, stepped):
    """A BatchNorm would evaluate differently from a BatchNorm of other libraries."""
    parameters = jax.device_get(trainings[ONE_DEVICE].first.parameters)
    patches = make_batch()['image'].reshape(BATCH_SIZE, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(-1, 48).astype(np.float64)
    x = patches @ parameters['stem.kernel'].reshape(48, 256) + parameters['stem.bias']
    statistics = stepped[SHARDED][0].statistics
    np.testing.assert_allclose(statistics['first.mean'], 0.1 * x.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(statistics['first.variance'], 0.9 + 0.1 * x.var(0, ddof=1), rtol=1e-5)


def test_the_moving_average_includes_statistics(trainings, stepped):
    """Evaluation would combine averaged weights with statistics of the newest weights, and lose accuracy."""
    first, (state, _) = trainings[SHARDED].first, stepped[SHARDED]
    assert state.ema.keys() == state.parameters.keys() | state.statistics.keys()
    for name, statistic in state.statistics.items():
        assert np.abs(statistic - first.statistics[name]).max() > 1e-4
        expected = 0.75 * first.statistics[name] + 0.25 * statistic
        np.testing.assert_allclose(state.ema[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('scale', [np.nan, 1e25], ids=['loss', 'variance'])
def test_a_broken_batch_leaves_statistics_unchanged(trainings, stepped, scale):
    """One broken image would spoil the running statistics. Pixels of 1e25 give a finite loss, infinite variance."""
    state, _ = stepped[SHARDED]
    new, metrics = trainings[SHARDED].step(state, make_batch(scale=scale))
    assert np.isfinite(metrics['loss']) == (scale == 1e25)
    assert int(metrics['skipped']) == 1
    for part in ('parameters', 'statistics', 'optimizer', 'ema'):
        assert_same_bits(getattr(new, part), getattr(state, part))


@pytest.mark.parametrize('here', [ONE_DEVICE, DATA_PARALLEL])
def test_saved_statistics_are_restored_on_another_mesh(trainings, stepped, tmp_path, here):
    """A run with BatchNorm could not resume on another number of devices."""
    state, resumed = stepped[SHARDED][0], trainings[here]
    with Checkpoints(tmp_path / 'c', keep=1, best_metric='accuracy') as checkpoints:
        checkpoints.save(state, {}, None)
    again = restore(tmp_path / 'c', 1, resumed.abstract_state)
    assert_same_bits(again, state)
    assert jax.tree.map(lambda x: x.sharding, again) == resumed.sharding
    losses = [
        float(training.step(state, make_batch(1))[1]['loss'])
        for training, state in ((trainings[SHARDED], state), (resumed, again))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(('params', 'field'), [('raw', 'parameters'), ('ema', 'ema')])
def test_weights_read_from_a_checkpoint_include_statistics(stepped, tmp_path, params, field):
    """`eval.py`, `convert` and `predict` would use initial statistics."""
    state, _ = stepped[SHARDED]
    with Checkpoints(tmp_path / 'c', keep=1, best_metric='accuracy') as checkpoints:
        checkpoints.save(state, {}, None)
    model = jax.eval_shape(Segmenter, jax.random.key(0))
    like = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(make_mesh()))
        for name, x in get_weights(model).items()
    }
    evaluated = state.weights if params == 'raw' else state.ema
    for weights in (restore_parameters(tmp_path / 'c', 1, field), restore_parameters(tmp_path / 'c', 1, field, like)):
        assert_same_bits(weights, evaluated)
        assert with_parameters(model, weights)(jnp.asarray(make_batch()['image'])).shape == (BATCH_SIZE, 2, 2, 5)


def test_missing_or_unexpected_statistics_in_a_checkpoint_are_refused_by_name(trainings, stepped, tmp_path):
    """Accuracy would drop to chance with newly initialised statistics, and no message would explain it."""
    state, like = stepped[SHARDED][0], trainings[SHARDED].abstract_state
    bare = {'statistics': {}, 'ema': dict(state.parameters)}
    bare_like = {'statistics': {}, 'ema': dict(like.parameters)}
    for name, saved, wanted, line in (
        ('without', dataclasses.replace(state, **bare), like, 'first.mean is missing'),
        ('with', state, dataclasses.replace(like, **bare_like), 'first.mean is unexpected'),
    ):
        with Checkpoints(tmp_path / name, keep=1, best_metric='accuracy') as checkpoints:
            checkpoints.save(saved, {}, None)
        with pytest.raises(UserError, match=line):
            restore(tmp_path / name, 1, wanted)


def test_accumulation_with_batch_statistics_is_refused():
    """The run would train another network, whose norms cover a quarter of the batch."""
    with pytest.raises(UserError, match='accumulation_steps=4, but the model normalises over the batch'):
        Training(ONE_DEVICE, accumulation_steps=4)


class NormedConvNeXt(ConvNeXt):
    """A narrow classifier that normalises its images over the batch."""

    def __init__(self, variant, *, in_channels, **options):
        super().__init__(variant.replace(depths=(1, 1), widths=(8, 16)), in_channels=in_channels, **options)
        self.images_norm = BatchNorm(in_channels)

    def __call__(self, images, *, key=None):
        return super().__call__(self.images_norm(jnp.asarray(images), training=key is not None), key=key)


def small_run(steps, fsdp):
    config = get_config()
    config.data.train_split, config.data.eval_split = 'train[:160]', 'test[:40]'
    config.update(batch_size=16, steps=steps, eval_every_epochs=10.0, log_every_steps=2)
    config.optimizer.update(warmup_steps=1, learning_rate=1e-3)
    config.ema.decay = 0.5
    config.mesh.fsdp = fsdp
    return config


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The workdir of a run of four steps that was resumed on another mesh for two more steps."""
    workdir = tmp_path_factory.mktemp('normed') / 'run'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classification, 'ConvNeXt', NormedConvNeXt)
        for steps, fsdp in ((4, 1), (6, 2)):
            train(small_run(steps, fsdp), workdir)
        yield workdir


@pytest.mark.slow
def test_a_run_updates_statistics_before_and_after_it_resumes(finished):
    """Evaluation would use initial statistics, or statistics from before the run resumed."""
    first, last = (restore_parameters(finished / 'checkpoints', step, 'parameters') for step in (4, 6))
    for name, initial in (('images_norm.mean', 0), ('images_norm.variance', 1)):
        assert first[name] != initial
        assert last[name] != first[name]


@pytest.mark.slow
@pytest.mark.parametrize(('params', 'prefix'), [('raw', ''), ('ema', 'ema_')])
def test_evaluation_and_export_use_statistics(finished, tmp_path, params, prefix):
    """With the initial mean and variance, eval.py and the exported program would predict other classes."""
    record = read_records(finished)[-1]
    config = read_config(finished / 'config.json')
    (run_result,) = evaluate_run(finished, config, params, None, EvaluationProtocol())
    (weights_result,) = evaluate_weights(config, str(finished), params, EvaluationProtocol())
    for result in (run_result, weights_result):
        assert result['loss'] == pytest.approx(record[f'{prefix}loss'], rel=1e-5)
    pretrained = read_weights(str(finished), params)
    export_stablehlo(pretrained, tmp_path / 'out')
    weights = load_file(tmp_path / 'out' / 'model.safetensors')
    field = {'raw': 'parameters', 'ema': 'ema'}[params]
    assert_same_bits(weights, dict(restore_parameters(finished / 'checkpoints', 6, field)))
    program = jax.export.deserialize(bytearray((tmp_path / 'out' / 'model.stablehlo').read_bytes()))
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1), dtype=np.uint8)
    expected = pretrained.model(pretrained.processor.normalize(images))
    np.testing.assert_allclose(program.call(weights, images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_fine_tuning_starts_from_the_statistics_of_a_run(finished):
    """Fine-tuning would start with the right weights and the wrong statistics."""
    config = small_run(steps=2, fsdp=2)
    config.init.weights = str(finished)
    sources = make_task(config).open()
    run = Run(config, make_durations(config, len(sources[0])), make_mesh(fsdp=2), *sources, checkpoints=None)
    state = run.first_state()
    assert_same_bits(state.weights, restore_parameters(finished / 'checkpoints', 6, 'parameters'))
    assert_same_bits(state.ema, state.weights)
    assert state.statistics.keys() == {'images_norm.mean', 'images_norm.variance'}
