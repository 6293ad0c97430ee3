"""Probes of frozen features: in a pre-training run, and by `eval.py --probe`."""

import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shrink_models, strict_json
from PIL import Image
from safetensors.numpy import save_file

import eval as evaluation
from convnext_jax import create_model
from convnext_jax.checkpoints.checkpoint import restore_parameters
from convnext_jax.config import default_config, read_config
from convnext_jax.data.augment import normalize
from convnext_jax.data.labelled_images import EvalImages
from convnext_jax.data.loading import ignore_wait
from convnext_jax.data.sources import open_source
from convnext_jax.errors import UserError
from convnext_jax.interop import ImageProcessor, save_pretrained
from convnext_jax.models import fcmae as models
from convnext_jax.models import get_parameters, with_parameters
from convnext_jax.monitoring.logging import RunLog
from convnext_jax.monitoring.records import read_records
from convnext_jax.probing import linear
from convnext_jax.probing.knn import knn_classes
from convnext_jax.probing.linear import linear_accuracies
from convnext_jax.runtime.stop import Stop
from convnext_jax.tasks import LabelledData, Measured, make_task, open_probe
from convnext_jax.training.durations import make_durations
from convnext_jax.training.loop import Run, train
from convnext_jax.training.sharding import make_mesh
from convnext_jax.training.standalone_evaluation import evaluate_split
from tests.tasks.test_fcmae import STEPS, small_config

TRAIN, EVAL = 'train[:61]', 'test[:37]'  # no multiple of a batch or of the number of devices
PROBE = {'probe.kind': 'knn', 'probe.neighbours': 30, 'probe.train_split': TRAIN, 'probe.eval_split': EVAL}
PROCESSOR = ImageProcessor(64, 0.875, mean=(0.286,), std=(0.353,))
WITH_WEIGHTS = (
    '--config=configs/fashion_mnist.py',
    f'--config.data.train_split={TRAIN}',
    f'--config.data.eval_split={EVAL}',
    '--config.batch_size=16',
)


@pytest.fixture(scope='module', autouse=True)
def small_models():
    """Four stages of one narrow block, and a narrow decoder."""
    with pytest.MonkeyPatch.context() as patch:
        shrink_models(patch, depths=(1, 1, 1, 1), widths=(8, 8, 8, 16))
        patch.setattr(models, 'DECODER_WIDTH', 32)
        patch.setattr(linear, 'EPOCHS', 3)
        yield


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The workdir of a pre-training run with a k-NN probe, on one device."""
    config = small_config(**PROBE, **{'model.patch_size': 0})
    workdir = tmp_path_factory.mktemp('probed')
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr(jax, 'devices', lambda *_: devices)
        train(config, workdir)
    return workdir


def examples():
    """Pixels and labels of the training images, then of the evaluation images."""
    sources = (open_source('fashion_mnist_mini', '', split) for split in (TRAIN, EVAL))
    splits = (EvalImages(source, 64, 1, crop_pct=0.875) for source in sources)
    loaded = [split.load(index) for split in splits for index in range(len(split))]
    return tuple(np.stack([example[name] for example in loaded]) for name in ('image', 'label'))


def features_of(model, pixels, *, norm):
    """The features of a network, computed without the package's pooling."""

    def compute(model):
        last = model.features(normalize(jnp.asarray(pixels), PROCESSOR.mean, PROCESSOR.std))['stage4'].mean((1, 2))
        return model.norm(last) if norm else last

    return np.asarray(jax.jit(compute)(model))


def knn_in_percent(features, labels, neighbours):
    hits = knn_classes(features[:61], labels[:61], features[61:], neighbours=neighbours) == labels[61:, None]
    return {'knn_top1': pytest.approx(100 * hits[:, 0].mean()), 'knn_top5': pytest.approx(100 * hits.any(1).mean())}


@pytest.fixture
def evaluate(capsys):
    """Runs eval.py in this process, and returns the result that it prints."""

    def evaluate(*arguments):
        capsys.readouterr()
        evaluation.main(['eval.py', *arguments])
        return strict_json(capsys.readouterr().out.splitlines()[-1])

    return evaluate


@pytest.mark.slow
def test_a_pretraining_run_records_the_probe(run):
    """The loss on masked patches does not show whether the features tell classes apart."""
    pixels, labels = examples()
    records = [record for record in read_records(run) if record['split'] == 'test[:20]']
    assert [record['step'] for record in records] == [STEPS // 2, STEPS]
    assert all(record['images'] == 20 for record in records), 'the images of the probe are not counted'
    model = make_task(read_config(run / 'config.json')).build(jax.random.key(0))
    for prefix, field in (('', 'parameters'), ('ema_', 'ema')):
        weights = restore_parameters(run / 'checkpoints', STEPS, field)
        features = features_of(with_parameters(model, weights), pixels, norm=False)
        expected = knn_in_percent(features, labels, neighbours=30)
        assert {name: records[-1][f'{prefix}{name}'] for name in expected} == expected
        assert 0 < records[-1][f'{prefix}knn_top1'] < records[-1][f'{prefix}knn_top5']
    events = b''.join(file.read_bytes() for file in (run / 'tensorboard').glob('events*'))
    assert b'/ema_knn_top5' in events
    assert Image.open(run / 'curves.png').size == (1000, 1050), 'the curves have a further row'


def test_a_signal_while_features_are_computed_stops_the_run(tmp_path):
    """A preempted run would end with an error, because the probe got fewer training images than neighbours."""
    config = small_config(**PROBE, **{'model.patch_size': 0})
    task, stop, batches = make_task(config), Stop(), []
    sets, durations = task.open(), make_durations(config, 64)
    run = Run(config, durations, make_mesh(), *sets, checkpoints=None, more_evaluations=task.open_evaluations())

    def features(weights, batch):
        batches.append(batch)
        stop.received = signal.SIGTERM
        return Measured(examples={'features': np.ones((16, 2)), 'label': batch['label']}), batch['weight']

    masked_loss = Measured({'loss': np.ones(()), 'patches': np.ones(())})
    run.eval_steps = [lambda weights, batch: (masked_loss, batch['weight']), features]
    state = jax.eval_shape(run.newly_initialised_state)
    state.ema = {}
    with RunLog(tmp_path, 0, 8, *(each.headline for each in run.evaluations)) as log:
        assert run._evaluate(log, 1, state, stop, ignore_wait) is None
    assert len(batches) == 1
    assert read_records(tmp_path) == []


@pytest.mark.slow
def test_eval_probes_a_run_on_any_number_of_devices(run, evaluate, monkeypatch):
    """eval.py would contradict the log of the run, or count the padding of the last batch."""
    recorded = read_records(run)[-1]
    on_eight = evaluate(f'--workdir={run}', '--probe=knn', '--neighbours=30', '--config.batch_size=24')
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, 'devices', lambda *_: devices)
    on_one = evaluate(f'--workdir={run}', '--probe=knn', '--neighbours=30', '--params=raw')
    assert on_eight == on_one
    assert on_one == {
        'model': 'convnextv2_atto',
        'params': 'raw',
        'step': STEPS,
        'probe': 'knn',
        'data': 'fashion_mnist_mini',
        'train_split': TRAIN,
        'train_images': 61,
        'split': EVAL,
        'images': 37,
        **{name: pytest.approx(recorded[name]) for name in ('knn_top1', 'knn_top5')},
    }
    changed = evaluate(f'--workdir={run}', '--probe=knn', '--config.probe.train_split=train[:50]', '--params=ema')
    assert (changed['train_images'], changed['step']) == (50, STEPS)

    found = evaluate(f'--workdir={run}', '--probe=linear')
    pixels, labels = examples()
    weights = restore_parameters(run / 'checkpoints', STEPS, 'parameters')
    model = make_task(read_config(run / 'config.json')).build(jax.random.key(0))
    features = features_of(with_parameters(model, weights), pixels, norm=False)
    best = max(linear_accuracies(features[:61], labels[:61], features[61:], labels[61:]), key=lambda each: each.top1)
    assert found['linear_learning_rate'] == best.learning_rate
    assert found['linear_top1'] == pytest.approx(100 * best.top1)
    assert found['linear_top5'] == pytest.approx(100 * best.top5)


@pytest.mark.slow
@pytest.mark.parametrize('head', [True, False])
def test_eval_probes_weights_with_and_without_a_head(head, evaluate, tmp_path):
    """The features of a published encoder could not be judged, or would be those before its last norm."""
    pixels, labels = examples()
    model = create_model('convnext_atto', num_classes=3, in_channels=1, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    noise = {name: x + 0.5 * rng.normal(size=x.shape).astype(np.float32) for name, x in get_parameters(model).items()}
    model = with_parameters(model, noise)
    save_pretrained(model, tmp_path / 'out', layout='timm', processor=PROCESSOR, head=head)
    result = evaluate(*WITH_WEIGHTS, f'--weights={tmp_path / "out"}', '--probe=knn')
    expected = knn_in_percent(features_of(model, pixels, norm=True), labels, neighbours=20)
    assert {name: result[name] for name in expected} == expected
    assert (result['layout'], result['images'], result['train_images']) == ('timm', 37, 61)
    dataset, probe = open_probe('knn', LabelledData('fashion_mnist_mini', '', TRAIN, EVAL), PROCESSOR, norm=True)
    config = default_config()
    config.batch_size = 16
    images, measured = evaluate_split(config, model, get_parameters(model), make_mesh(), dataset, probe, 'images')
    assert images == 98
    np.testing.assert_array_equal(measured[''].examples['label'], labels)
    np.testing.assert_allclose(
        measured[''].examples['features'], features_of(model, pixels, norm=True), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_features_that_are_not_finite_are_reported(evaluate, tmp_path, capsys):
    """Features that are NaN would give an accuracy that means nothing."""
    model = create_model('convnext_atto', num_classes=3, in_channels=1, key=jax.random.key(0))
    weights = get_parameters(model)
    model = with_parameters(model, weights | {'norm.bias': weights['norm.bias'] + np.nan})
    save_pretrained(model, tmp_path / 'out', processor=PROCESSOR)
    with pytest.raises(UserError, match='not finite: knn_top1'):
        evaluate(*WITH_WEIGHTS, f'--weights={tmp_path / "out"}', '--probe=knn')
    assert strict_json(capsys.readouterr().out.splitlines()[-1])['knn_top1'] is None


def write_folder(folder, classes, images):
    """A data set of grey images, `images` for each class, in the splits train and val."""
    for split in ('train', 'val'):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for number in range(images):
                Image.new('RGB', (8, 8), (number, number, number)).save(folder / split / name / f'{number}.png')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'probe.neighbours': 50}, '50 neighbours cannot be chosen among the 4 images of train: choose 1 to 4'),
        ({'probe.neighbours': 0}, 'probe.neighbours must be above 0, not 0'),
        ({'probe.kind': 'svm'}, "probe.kind must be one of '', knn, linear, not 'svm'"),
        ({'probe.dir': '{one}'}, "a probe needs images with labels: split train has one class, 'cat'"),
        ({'probe.dir': '{flat}'}, 'a probe needs images with labels: {flat}/train contains no folders'),
        ({'probe.dir': '{flat}', 'probe.train_split': 'images'}, 'a probe needs images with labels: {flat}/images is'),
        ({'probe.name': ''}, 'a probe needs images with labels: {flat}/images is not a folder'),
    ],
)
def test_a_pretraining_run_refuses_a_probe_without_data(changes, message, tmp_path):
    """The run would fail at its first evaluation, hours after its start."""
    folders = {name: str(tmp_path / name) for name in ('two', 'one', 'flat')}
    write_folder(tmp_path / 'two', ('cat', 'dog'), 2)
    write_folder(tmp_path / 'one', ('cat',), 2)
    for split in ('train', 'val'):
        (tmp_path / 'flat' / split).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'flat' / split / '1.png')
    config = default_config('fcmae')
    config.update_from_flattened_dict(
        {
            'model.name': 'convnextv2_atto',
            'data.name': 'folder',
            'data.dir': folders['flat'],
            'batch_size': 8,
            'data.train_split': 'images',
            'data.eval_split': 'images',
            'probe.kind': 'knn',
            'probe.name': 'folder',
            'probe.dir': folders['two'],
            'probe.train_split': 'train',
            'probe.eval_split': 'val',
        }
    )
    if changes == {'probe.name': ''}:
        changes = {**changes, 'probe.train_split': '', 'probe.eval_split': ''}
    values = {field: value.format(**folders) if isinstance(value, str) else value for field, value in changes.items()}
    config.update_from_flattened_dict(values)
    with pytest.raises(UserError, match=re.escape(message.format(**folders))) as refusal:
        train(config, tmp_path / 'run')
    assert '\n' not in str(refusal.value)
    assert not (tmp_path / 'run' / 'config.json').exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('arguments', 'line'),
    [
        (('--probe=svm',), 'flag --probe=svm: value should be one of <knn|linear>'),
        (('--probe=knn', '--neighbours=62'), 'choose 1 to 61 neighbours'),
        (('--probe=linear', '--neighbours=3'), '--probe=linear does not use --neighbours: drop the flag'),
        (('--probe=knn', '--splits=a@b', '--flip'), '--probe=knn does not use --splits, --flip: drop the flag'),
        (('--neighbours=3',), '--neighbours belongs to --probe=knn'),
        (
            ('--probe=knn', '--config.probe.name=folder', '--config.probe.dir=no'),
            'a probe needs images with labels: no',
        ),
        (
            ('--probe=knn', '--config.data.train_split=train', '--config.data.eval_split=test'),
            '--config.data.train_split, --config.data.eval_split has no effect, because the run has other data for its '
            'probe: give --config.probe.train_split, --config.probe.eval_split',
        ),
        (('--config.data.train_split=train',), '--config.data.train_split cannot be changed for an evaluation'),
    ],
)
def test_eval_refuses_a_probe_that_it_cannot_do(run, arguments, line):
    """A mistake would end in a traceback, or in a probe of something else."""
    with pytest.raises(UserError, match=re.escape(line)):
        evaluation.main(['eval.py', f'--workdir={run}', *arguments])


def test_weights_without_a_backbone_are_refused(evaluate, tmp_path):
    """A file with a head alone has no features."""
    save_file({'head.fc.weight': np.zeros((3, 16), np.float32)}, tmp_path / 'head.safetensors')
    with pytest.raises(UserError, match='this is not a ConvNeXt in a known layout'):
        evaluate(*WITH_WEIGHTS, f'--weights={tmp_path / "head.safetensors"}', '--probe=knn')
