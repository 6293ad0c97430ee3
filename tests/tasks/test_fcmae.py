"""FCMAE as a task: the real loop, evaluations with fixed masks, pictures, refusals."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fingerprints, shrink_models
from PIL import Image

import eval as evaluation
from configs import v2_finetune
from convnext_jax import __main__ as package_command
from convnext_jax.checkpoints.checkpoint import restore_parameters, saved_steps
from convnext_jax.config import check_values, default_config
from convnext_jax.data.augment import normalize
from convnext_jax.errors import UserError
from convnext_jax.interop import read_pretrained
from convnext_jax.models import fcmae as models
from convnext_jax.models import get_parameters, parameter_roles, with_parameters
from convnext_jax.models.fcmae import patch_errors
from convnext_jax.monitoring.records import read_records
from convnext_jax.runtime.stop import Stopped
from convnext_jax.tasks import make_task
from convnext_jax.tasks.fcmae import MaskedLoss
from convnext_jax.training.loop import train
from convnext_jax.training.sharding import batch_sharding, make_mesh, sum_over_mesh
from convnext_jax.training.weights import load_weights

STEPS = 8


def small_config(**changes):
    """Eight steps on garments of 64 pixels, four patches each, two epochs."""
    config = default_config('fcmae')
    config.update_from_flattened_dict(
        {
            'model.name': 'convnextv2_atto',
            'model.patch_size': 16,
            'data.name': 'fashion_mnist_mini',
            'data.train_split': 'train[:64]',
            'data.eval_split': 'test[:20]',
            'data.image_size': 64,
            'data.mean': (0.286,),
            'data.std': (0.353,),
            'batch_size': 16,
            'steps': STEPS,
            'optimizer.warmup_steps': 1,
            'optimizer.learning_rate': 0.3,
            'log_every_steps': 2,
            'ema.decay': 0.5,
        }
    )
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope='module', autouse=True)
def small_models():
    """Two stages with one narrow block each and a total stride of 32, and a decoder large enough for sharding."""
    with pytest.MonkeyPatch.context() as patch:
        shrink_models(patch)
        patch.setattr(models, 'DECODER_WIDTH', 32)
        yield


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The workdir of a run on one device that nothing interrupted."""
    workdir = tmp_path_factory.mktemp('fcmae')
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr(jax, 'devices', lambda *_: devices)
        train(small_config(), workdir)
    return workdir


def losses(workdir):
    return {
        (record['step'], split, name): record[name]
        for record in read_records(workdir)
        for split in [record['split']]
        for name in ('loss', 'ema_loss')
        if name in record
    }


@pytest.mark.slow
def test_a_run_that_is_stopped_resumes_to_the_bit(run, one_device, tmp_path, monkeypatch):
    """Pre-training takes weeks, over many preemptions."""
    summary, signals = MaskedLoss.summary, iter([signal.SIGTERM])

    def stopped(*arguments):
        for number in signals:
            signal.raise_signal(number)
        return summary(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(MaskedLoss, 'summary', stopped)
        with pytest.raises(Stopped):
            train(small_config(), tmp_path)
    assert saved_steps(tmp_path / 'checkpoints') == [STEPS // 2]
    train(small_config(), tmp_path)
    assert fingerprints(tmp_path, STEPS) == fingerprints(run, STEPS)
    assert losses(tmp_path) == losses(run)
    values = losses(run)
    assert values[STEPS, 'test[:20]', 'loss'] < values[STEPS // 2, 'test[:20]', 'loss'] < 1, 'it learns'


@pytest.mark.slow
def test_an_evaluation_masks_each_image_as_every_other_evaluation_does(run, one_device, capsys):
    """Else two checkpoints differ by their masks, and padding of the last batch would count."""
    evaluation.main(['eval.py', f'--workdir={run}', '--config.batch_size=7'])  # the run evaluated batches of 16
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    recorded = losses(run)[STEPS, 'test[:20]', 'loss']
    with pytest.raises(
        UserError, match=r'the task fcmae cannot be evaluated like this: it has no config field eval\.flip'
    ):
        evaluation.main(['eval.py', f'--workdir={run}', '--flip'])
    assert result['images'] == 20
    assert result['loss'] == pytest.approx(recorded, rel=1e-5)

    config = small_config()
    task, parameters = make_task(config), restore_parameters(run / 'checkpoints', STEPS, 'parameters')
    dataset = task.open()[1]
    pixels = np.stack([dataset.load(index)['image'] for index in range(20)])
    visible = task.evaluation_mask(jnp.arange(20))
    images = normalize(jnp.asarray(pixels), config.data.mean, config.data.std)
    model = with_parameters(jax.jit(task.build)(jax.random.key(0)), parameters)
    errors = np.asarray(jax.jit(lambda model: patch_errors(model(images, visible), images))(model))
    assert errors[~np.asarray(visible.patches)].mean() == pytest.approx(recorded, rel=1e-4)
    assert errors[~np.asarray(visible.patches)].size == 60

    average = with_parameters(model, restore_parameters(run / 'checkpoints', STEPS, 'ema'))
    expected = np.asarray(jax.jit(task.draw)(average, jnp.asarray(pixels[:16]), jnp.arange(16)))
    figure = np.asarray(Image.open(run / 'figures' / 'reconstructions.png'))
    assert figure.shape == (16 * 64, 3 * 64, 3)
    assert np.abs(figure.astype(int) - expected).max() <= 1
    np.testing.assert_array_equal(figure[:64, :64, 0], pixels[0, ..., 0])
    assert any(b'/reconstructions' in file.read_bytes() for file in (run / 'tensorboard').glob('events*'))


@pytest.mark.slow
def test_norms_over_the_batch_are_those_of_all_devices(monkeypatch):
    """With those of each device alone the result would depend on how many there are."""
    shrink_models(monkeypatch, depths=(1,), widths=(16,))
    config = small_config(**{'fcmae.grn': 'batch', 'model.patch_size': 32})
    task = make_task(config)
    model = jax.jit(task.build)(jax.random.key(0))
    parameters = {name: x + 0.5 if 'grn' in name else x for name, x in get_parameters(model).items()}
    images = jnp.asarray(np.random.default_rng(0).standard_normal((8, 64, 64, 1)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 8)

    def value_and_grad(parameters, statistics, images, keys):
        def loss(parameters):
            total, weight, _ = task.loss(with_parameters(model, parameters), {'image': images}, keys)
            return total, weight

        (total, weight), gradient = jax.value_and_grad(loss, has_aux=True)(parameters)
        return (total, weight, {}), gradient, statistics

    (total, _, _), gradient, _ = jax.jit(value_and_grad)(parameters, {}, images, keys)
    mesh = make_mesh(data=4, fsdp=2)
    over_mesh = jax.jit(sum_over_mesh(value_and_grad, mesh, parameter_roles(model)))
    sums, others, _ = over_mesh(parameters, {}, *jax.device_put((images, keys), batch_sharding(mesh)))
    assert float(sums[0]) == pytest.approx(float(total), rel=1e-5)
    for name, expected in gradient.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(others[name], expected, atol=1e-4 * scale, err_msg=name)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'fcmae.mask_patch': 64, 'data.image_size': 224},
            r'mask_patch=64 must be a multiple of 32 that divides .*=224',
        ),
        ({'fcmae.mask_patch': 16}, 'mask_patch=16 must be a multiple of 32'),
        ({'fcmae.mask_patch': 0}, 'mask_patch=0 must be a multiple of 32'),
        ({'fcmae.mask_ratio': 0.0}, 'mask_ratio must be between 0 and 1, not 0.0'),
        ({'fcmae.mask_ratio': 1.0}, 'mask_ratio must be between 0 and 1, not 1.0'),
        ({'data.image_size': 32}, 'mask_ratio=0.6 of 1 patches leaves 0 visible'),
        ({'model.name': 'convnext_isotropic_small'}, 'total stride of 32, but convnext_isotropic_small has 16'),
        ({'model.patch_size': 8}, 'total stride of 32, but convnextv2_atto has 16'),
        ({'fcmae.grn': 'batch', 'accumulation_steps': 2}, "fcmae.grn='batch' needs accumulation_steps=1"),
        ({'fcmae.grn': 'instance'}, "fcmae.grn must be one of image, batch, not 'instance'"),
    ],
)
def test_what_cannot_be_pretrained_is_refused(changes, message):
    """In one line, before any data is opened."""
    with pytest.raises(UserError, match=message) as refusal:
        check_values(small_config(**changes))
    assert '\n' not in str(refusal.value)


@pytest.mark.parametrize(
    ('ratio', 'size', 'patch', 'count'), [(0.6, 224, 32, 19), (0.9, 320, 32, 10), (0.5, 256, 64, 8)]
)
def test_the_share_of_masked_patches_is_exact(ratio, size, patch, count):
    """At 224 pixels 19 of 49 patches are visible, as in the original; rounding down 10 · (1 − 0.9) gives 0."""
    config = small_config(**{'fcmae.mask_ratio': ratio, 'data.image_size': size, 'fcmae.mask_patch': patch})
    visible = make_task(config).visible(jax.random.split(jax.random.key(0), 5)).patches
    assert visible.shape == (5, size // patch, size // patch)
    assert (visible.sum((1, 2)) == count).all()


def test_the_first_kernels_have_the_deviation_of_the_config():
    """The paper and its code differ here, so a user chooses."""
    for std in (0.02, 1.0):
        parameters = get_parameters(make_task(small_config(**{'fcmae.init_std': std})).build(jax.random.key(0)))
        for name in ('decoder.predict.kernel', 'stages.1.blocks.pointwise1.kernel', 'stem.conv.kernel'):
            assert np.std(parameters[name]) == pytest.approx(std, rel=0.2)
        assert np.std(parameters['decoder.mask_token']) == pytest.approx(0.02, rel=0.5)
        assert not np.any(parameters['decoder.predict.bias'])


@pytest.mark.slow
def test_a_run_is_handed_over_to_fine_tuning_and_to_other_libraries(run, tmp_path, monkeypatch):
    """The encoder comes over whole, by name and shape, and the decoder stays behind with a word."""
    config = v2_finetune.get_config('atto')
    config.init.weights, config.model.num_classes, config.data.mean, config.data.std = str(run), 10, (0.5,), (0.5,)
    config.model.patch_size = 16
    task = make_task(config)
    initial = get_parameters(jax.jit(task.build)(jax.random.key(1)))
    loaded, notes, _ = load_weights(task, initial, {'class names': list('abcdefghij')})
    assert notes == [
        f'starts from the raw weights of {run}, step {STEPS}',
        'the decoder of the pre-training is dropped',
        'newly initialised: norm.scale, norm.bias, head.kernel, head.bias',
    ]
    theirs = restore_parameters(run / 'checkpoints', STEPS, 'parameters')
    for name, x in loaded.items():
        np.testing.assert_array_equal(x, theirs[name] if name in theirs else initial[name], err_msg=name)
    assert np.abs(loaded['head.kernel']).max() < 1e-3, 'the head has the scale of the recipe'

    package_command.main(['convnext_jax', 'convert', str(run), str(tmp_path / 'out'), '--params=ema'])
    back = read_pretrained(tmp_path / 'out', num_classes=10, key=jax.random.key(0))
    average = restore_parameters(run / 'checkpoints', STEPS, 'ema')
    for name, x in get_parameters(back.model).items():
        if name.startswith(('stem', 'stages')):
            np.testing.assert_array_equal(x, average[name], err_msg=name)
    with pytest.raises(UserError, match='has no classes: fine-tune it first'):
        package_command.main(['convnext_jax', 'predict', str(run / 'curves.png'), f'--weights={run}'])

    shrink_models(monkeypatch, widths=(8, 24))
    with pytest.raises(UserError, match=r'stages\.1\.downsample\.conv\.bias is \(16,\), not \(24,\)'):
        load_weights(task, get_parameters(jax.jit(task.build)(jax.random.key(1))), {'class names': list('abcdefghij')})
