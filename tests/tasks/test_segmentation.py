"""Segmentation as a task: training on generated images, evaluation, initial weights, error messages."""

import csv
import dataclasses
import json
import shutil

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fingerprints, shrink_models
from PIL import Image
from safetensors.numpy import load_file

import eval as evaluation
from convnext_jax import __main__ as package_command
from convnext_jax.checkpoints.checkpoint import restore_parameters, saved_steps
from convnext_jax.config import check_values, default_config
from convnext_jax.errors import UserError
from convnext_jax.interop import read_upernet, save_pretrained
from convnext_jax.models import ConvNeXt, get_parameters, get_variant, get_weights, with_parameters
from convnext_jax.monitoring.records import read_records
from convnext_jax.tasks import LoadedWeights, Task, make_task
from convnext_jax.tasks.segmentation import Segmentation
from convnext_jax.training import sharding
from convnext_jax.training.loop import train
from convnext_jax.training.standalone_evaluation import EvaluationProtocol, evaluate_weights
from convnext_jax.training.weights import load_weights, read_weights

STEPS = 40
NAMES = ('ground', 'box', 'disc')
COLOURS = np.asarray([[90, 90, 90], [200, 60, 40], [40, 80, 200]])


def write_shapes(folder, train=24, evaluation=6):
    """Photographs of a box and a disc on the ground, with noise, of different sizes; some pixels have no class."""
    rng = np.random.default_rng(0)
    for split, count in (('training', train), ('validation', evaluation)):
        for kind in ('images', 'annotations'):
            (folder / kind / split).mkdir(parents=True)
        for number in range(count):
            height, width = rng.integers(34, 60, 2)
            y, x = np.mgrid[:height, :width]
            mask = np.zeros((height, width), np.uint8)
            top, left = rng.integers(2, (height - 18, width - 18))
            mask[top : top + 16, left : left + 14] = 1
            row, column = rng.integers(10, (height - 10, width - 10))
            mask[(y - row) ** 2 + (x - column) ** 2 < 70] = 2
            pixels = np.clip(COLOURS[mask] + rng.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)
            mask[:2] = 255
            Image.fromarray(pixels).save(folder / 'images' / split / f'{number}.png')
            Image.fromarray(mask).save(folder / 'annotations' / split / f'{number}.png')
    (folder / 'classes.txt').write_text('\n'.join(NAMES))
    return folder


@pytest.fixture(scope='module', autouse=True)
def small_models():
    """Four stages with one narrow block each."""
    with pytest.MonkeyPatch.context() as patch:
        shrink_models(patch, depths=(1, 1, 1, 1), widths=(8, 8, 8, 16))
        yield


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp('shapes'))


@pytest.fixture(scope='module')
def small_config(shapes):
    def build(**changes):
        config = default_config('segmentation')
        config.update_from_flattened_dict(
            {
                'model.name': 'convnext_atto',
                'model.patch_size': 2,
                'model.drop_path_rate': 0.1,
                'data.dir': str(shapes),
                'data.train_split': 'training',
                'data.eval_split': 'validation',
                'data.image_size': 32,
                'data.resize': (80, 40),
                'segmentation.channels': 16,
                'segmentation.auxiliary_channels': 8,
                'batch_size': 8,
                'steps': STEPS,
                'eval_every_steps': STEPS // 2,
                'optimizer.warmup_steps': 2,
                'optimizer.learning_rate': 0.16,
                'log_every_steps': 10,
                'ema.decay': 0.5,
            }
        )
        config.update_from_flattened_dict(changes)
        return config

    return build


@pytest.fixture(scope='module')
def run(tmp_path_factory, small_config):
    """The workdir of a run on one device that nothing interrupted."""
    workdir = tmp_path_factory.mktemp('segmentation')
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr(jax, 'devices', lambda *_: devices)
        train(small_config(), workdir)
    return workdir


def results(workdir):
    """(Step, metric) → value of the evaluations."""
    records = [record for record in read_records(workdir) if record['split'] == 'validation']
    return {(record['step'], name): value for record in records for name, value in record.items() if name != 'split'}


def killed_in_first_evaluation(run, folder):
    """A copy of the run in the state after a SIGKILL in its first evaluation, without `metrics.jsonl`."""
    copy = shutil.copytree(run, folder / 'run')
    first, *later = saved_steps(copy / 'checkpoints')
    assert first == STEPS // 2
    for step in later:
        shutil.rmtree(copy / 'checkpoints' / str(step))
    (copy / 'metrics.jsonl').unlink()
    return copy


@pytest.mark.slow
def test_it_learns_and_a_run_that_is_killed_resumes_to_the_bit(run, shapes, one_device, tmp_path, small_config):
    """All pixels would get the most frequent class, or a preempted run would end with other weights."""
    resumed = killed_in_first_evaluation(run, tmp_path)
    train(small_config(), resumed)
    assert fingerprints(resumed, STEPS) == fingerprints(run, STEPS)
    assert results(resumed) == results(run)
    ground = ground_share(shapes)
    assert results(run)[STEPS, 'miou'] > 1.5 * 100 * ground / 3, 'not better than a network that predicts only ground'
    assert results(run)[STEPS, 'aacc'] > 100 * ground + 5
    assert 'auxiliary_loss' in next(record for record in read_records(run) if record['split'] == 'train')
    figure = np.asarray(Image.open(run / 'figures' / 'masks.png'))
    assert figure.shape == (4 * 256, 3 * 256, 3)
    colours = {tuple(colour) for colour in figure[:, 256:].reshape(-1, 3)}
    assert {(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)} == colours, 'no class, ground, box, disc'


def ground_share(shapes):
    """The share of the most frequent class in the labelled pixels of the evaluation split."""
    masks = [np.asarray(Image.open(path)) for path in (shapes / 'annotations' / 'validation').iterdir()]
    pixels = np.concatenate([mask[mask != 255] for mask in masks])
    return (pixels == 0).mean()


@pytest.mark.slow
def test_eval_gives_the_metrics_of_the_run_and_of_each_class(run, one_device, capsys, tmp_path):
    """A finished run could not be evaluated again, or padding of the last batch would count."""
    table = tmp_path / 'classes.csv'
    evaluation.main(['eval.py', f'--workdir={run}', '--config.batch_size=4', f'--per_class={table}'])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result['images'] == 6
    for name in ('miou', 'macc', 'aacc'):
        assert result[name] == pytest.approx(results(run)[STEPS, name], abs=0.1), name
    rows = list(csv.DictReader(table.open()))
    assert [row['class'] for row in rows] == list(NAMES)
    assert np.mean([float(row['iou']) for row in rows]) == pytest.approx(result['miou'])
    for other in (['--config.eval.mode=squash'], ['--config.eval.mode=whole', '--config.eval.scales=(0.5,)']):
        evaluation.main(['eval.py', f'--workdir={run}', '--flip', '--params=ema', *other])
        assert json.loads(capsys.readouterr().out.splitlines()[-1])['images'] == 6
    with pytest.warns(
        UserWarning, match='trained with data.reduce_zero_label=False: with True, the labels of the same'
    ):
        evaluation.main(['eval.py', f'--workdir={run}', '--config.data.reduce_zero_label=True'])
    with pytest.raises(UserError, match=r'it has no config field data\.crop_pct'):
        evaluation.main(['eval.py', f'--workdir={run}', '--crop_pct=0.9'])
    with pytest.raises(UserError, match='this is a UPerNet for semantic segmentation, but a classifier is needed'):
        evaluation.main(['eval.py', f'--workdir={run}', '--probe=knn'])


@pytest.mark.slow
def test_the_loss_and_the_metrics_do_not_depend_on_the_devices(run, monkeypatch, tmp_path, small_config):
    """Another number of devices would train another network, or count some pixels twice."""
    devices = jax.devices()[:4]
    monkeypatch.setattr(jax, 'devices', lambda *_: devices)
    monkeypatch.setattr(sharding, 'MIN_SHARDED_SIZE', 1024)
    monkeypatch.setattr(Segmentation, 'figures', Task.figures)  # none: on a mesh, they have a test of their own
    resumed = killed_in_first_evaluation(run, tmp_path)
    config = small_config()
    config.mesh.update(data=2, fsdp=2)
    train(config, resumed)
    ours, theirs = (restore_parameters(folder / 'checkpoints', STEPS, 'parameters') for folder in (resumed, run))
    assert ours.keys() == theirs.keys()
    losses = [
        [record['loss'] for record in read_records(folder) if record['split'] == 'train'][-2:]
        for folder in (resumed, run)
    ]
    np.testing.assert_allclose(*losses, rtol=0.02)
    assert results(resumed)[STEPS, 'aacc'] == pytest.approx(results(run)[STEPS, 'aacc'], abs=1.5)


def make_classifier(variant):
    """A classifier with random parameters, which needs no compilation."""
    model = jax.eval_shape(lambda key: ConvNeXt(variant, key=key, num_classes=5), jax.random.key(0))
    rng = np.random.default_rng(1)
    shapes = {name: x.shape for name, x in get_parameters(model).items()}
    return with_parameters(
        model, {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    )


def initial(config):
    """The task of a run, weights that are all 0.5 instead of newly initialised, and the facts of its data."""
    task = make_task(config)
    facts = task.open()[0].facts
    shapes = get_weights(jax.eval_shape(task.build, jax.random.key(0)))
    new = jax.jit(lambda: {name: jnp.full(x.shape, 0.5) for name, x in shapes.items()})()
    return task, new, facts


def test_a_run_starts_from_any_classifier(small_config, tmp_path):
    """Users could not fine-tune their classifiers, or published ones."""
    classifier = make_classifier(get_variant('convnext_atto'))
    for layout in ('huggingface', 'timm'):
        save_pretrained(classifier, tmp_path / layout, layout=layout)
        task, new, facts = initial(small_config(**{'init.weights': str(tmp_path / layout), 'model.patch_size': 0}))
        weights, notes, _ = load_weights(task, new, facts)
        assert 'newly initialised: the heads, and the norms of the feature maps' in notes
        for name, x in get_parameters(classifier).items():
            if name.startswith(('stem.', 'stages.')):
                np.testing.assert_array_equal(weights[f'backbone.{name}'], x, err_msg=name)
        np.testing.assert_array_equal(weights['decode_head.classifier.kernel'], new['decode_head.classifier.kernel'])


def test_a_run_starts_from_a_classifier_with_a_hidden_layer_before_the_head(small_config):
    """timm's convnext_large_mlp would be refused because of unexpected parameters."""
    variant = dataclasses.replace(get_variant('convnext_atto'), patch_size=2, head_hidden=4)
    classifier = make_classifier(variant)
    task, new, facts = initial(small_config())
    weights, _ = task.initial_weights(new, LoadedWeights(get_weights(classifier), {}, 'convnext_large_mlp'), facts)
    assert weights.keys() == new.keys()


def test_a_run_starts_from_an_fcmae_encoder(small_config, tmp_path):
    """Pre-training without labels would be of no use for segmentation."""
    config = small_config(**{'model.name': 'convnextv2_atto', 'init.weights': 'pre-training'})
    task, new, facts = initial(config)
    encoder = {
        name.removeprefix('backbone.'): x + 1
        for name, x in new.items()
        if name.startswith(('backbone.stem.', 'backbone.stages.'))
    }
    trained = LoadedWeights(encoder | {'decoder.mask_token': np.zeros(4)}, {}, 'pre-training')
    weights, notes = task.initial_weights(new, trained, facts)
    assert weights.keys() == new.keys()
    assert notes == ['newly initialised: the heads, and the norms of the feature maps']
    np.testing.assert_array_equal(weights['backbone.stem.conv.bias'], new['backbone.stem.conv.bias'] + 1)


@pytest.mark.slow
def test_a_run_starts_from_a_upernet_and_keeps_the_outputs_of_known_classes(
    run, small_config, shapes, tmp_path, capsys
):
    """Outputs would belong to other classes than before, or all outputs would be lost."""
    names = ('disc', 'ring', 'ground', 'box')
    more = shutil.copytree(shapes, tmp_path / 'more')
    (more / 'classes.txt').write_text('\n'.join(names))
    task, new, facts = initial(small_config(**{'init.weights': str(run), 'data.dir': str(more)}))
    weights, notes, _ = load_weights(task, new, facts)
    assert 'the head keeps the outputs of 3 of 4 classes; newly initialised: ring' in notes
    old = restore_parameters(run / 'checkpoints', STEPS, 'parameters')
    np.testing.assert_array_equal(
        weights['backbone.stages.0.blocks.norm.scale'], old['backbone.stages.0.blocks.norm.scale']
    )
    for head in ('decode_head', 'auxiliary_head'):
        bias, kernel = f'{head}.classifier.bias', f'{head}.classifier.kernel'
        np.testing.assert_array_equal(weights[bias][jnp.asarray([0, 2, 3])], old[bias][jnp.asarray([2, 0, 1])])
        np.testing.assert_array_equal(weights[kernel][:, 1], new[kernel][:, 1])

    package_command.main(['', 'convert', str(run), str(tmp_path / 'theirs')])
    loaded = read_upernet(tmp_path / 'theirs')
    assert loaded.class_names == NAMES
    assert loaded.processor == task.processor
    same, new, facts = initial(small_config(**{'init.weights': str(tmp_path / 'theirs')}))
    weights, notes, _ = load_weights(same, new, facts)
    np.testing.assert_array_equal(weights['decode_head.bottleneck.norm.mean'], old['decode_head.bottleneck.norm.mean'])
    assert len(notes) == 1, notes
    path = tmp_path / 'theirs' / 'config.json'
    config = json.loads(path.read_text())
    del config['id2label'], config['label2id']
    path.write_text(json.dumps(config | {'num_labels': 3}))
    unnamed, new, facts = initial(small_config(**{'init.weights': str(tmp_path / 'theirs'), 'data.dir': str(more)}))
    _, notes, _ = load_weights(unnamed, new, facts)
    assert 'the head is newly initialised: 4 classes here, 3 in the weights' in notes


@pytest.mark.slow
def test_weights_of_other_libraries_are_evaluated(run, one_device, small_config, tmp_path):
    """The published mIoU of published weights could not be checked."""
    package_command.main(['', 'convert', str(run), str(tmp_path / 'theirs')])
    result = next(evaluate_weights(small_config(), str(tmp_path / 'theirs'), 'raw', EvaluationProtocol()))
    assert result['miou'] == pytest.approx(results(run)[STEPS, 'miou'], abs=0.1)
    classifier = make_classifier(get_variant('convnext_atto'))
    save_pretrained(classifier, tmp_path / 'classifier')
    with pytest.raises(UserError, match='is a classifier, but segmentation needs a UPerNet'):
        next(evaluate_weights(small_config(), str(tmp_path / 'classifier'), 'raw', EvaluationProtocol()))
    with pytest.raises(UserError, match='this is a UPerNet for semantic segmentation'):
        next(evaluate_weights(default_config(), str(tmp_path / 'theirs'), 'raw', EvaluationProtocol()))


@pytest.mark.slow
def test_masks_of_photographs_are_those_that_were_evaluated(run, shapes, tmp_path, capsys):
    """The mIoU of a run would not be the mIoU of the masks that it predicts."""
    photos, labels = (shapes / kind / 'validation' for kind in ('images', 'annotations'))
    arguments = ['', 'predict', str(photos), f'--weights={run}', '--json']
    package_command.main([*arguments, f'--output={tmp_path / "slide"}'])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {'ground', 'box'} <= {area['name'] for row in rows for area in row['classes']} <= set(NAMES)
    predicted, label = (
        np.concatenate([np.asarray(Image.open(folder / f'{number}.png')).ravel() for number in range(len(rows))])
        for folder in (tmp_path / 'slide', labels)
    )
    accuracy = 100 * np.mean(predicted[label != 255] == label[label != 255])
    assert accuracy == pytest.approx(results(run)[STEPS, 'aacc'], abs=1e-3)
    for mode in ('squash', 'whole'):
        package_command.main([*arguments, f'--output={tmp_path / mode}', f'--mode={mode}'])
    assert len({(tmp_path / mode / '0.png').read_bytes() for mode in ('slide', 'squash', 'whole')}) == 3


@pytest.mark.slow
def test_a_run_is_exported(run, tmp_path):
    """The network that a user trained could not be deployed."""
    package_command.main(['', 'export', str(run), str(tmp_path / 'out')])
    program = jax.export.deserialize(bytearray((tmp_path / 'out' / 'model.stablehlo').read_bytes()))
    about = json.loads((tmp_path / 'out' / 'model.json').read_text())
    size = about['preprocessing']['size']
    assert (size, about['class_names']) == (32, list(NAMES))
    pixels = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)
    logits = jax.jit(program.call)(load_file(tmp_path / 'out' / 'model.safetensors'), pixels)
    pretrained = read_weights(str(run), 'raw', None)
    expected = jax.jit(lambda model, images: model(images))(pretrained.model, pretrained.processor.normalize(pixels))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.slow
def test_other_tasks_and_commands_refuse_a_upernet_in_one_line(run, shapes, tmp_path):
    """The user sees a list of a hundred parameters, or a traceback."""
    config = default_config()
    config.init.weights = str(run)
    trained = LoadedWeights(restore_parameters(run / 'checkpoints', STEPS, 'parameters'), {}, str(run))
    for name in ('classification', 'fcmae'):
        with pytest.raises(UserError, match='has the weights of a UPerNet: only the task segmentation can start'):
            make_task(default_config(name)).initial_weights({}, trained, {})
    photo = str(next((shapes / 'images' / 'validation').iterdir()))
    for command in (
        ['embed', photo, f'--weights={run}', f'--output={tmp_path / "x.npz"}'],
        ['convert', str(run), str(tmp_path / 'out'), '--layout=timm'],
    ):
        with pytest.raises(UserError, match='UPerNet') as refusal:
            package_command.main(['', *command])
        assert '\n' not in str(refusal.value)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'accumulation_steps': 2}, 'accumulation_steps=2, but UPerNet normalises over the whole batch'),
        ({'eval.stride': 33}, 'eval.stride=33 must be at most data.image_size=32'),
        ({'data.mean': (0.5,), 'data.std': (0.5,)}, 'segmentation needs RGB images'),
        ({'model.num_classes': 256}, 'model.num_classes must be at most 255'),
        ({'segmentation.average': 'some'}, "segmentation.average must be one of all, labelled, not 'some'"),
        ({'eval.mode': 'some'}, "eval.mode must be one of slide, whole, squash, not 'some'"),
        ({'eval.mode': 'squash', 'eval.scales': (0.5, 1.0)}, 'eval.mode=squash has one scale: drop eval.scales'),
    ],
)
def test_invalid_values_are_refused(small_config, changes, message):
    """The run would fail after its data is opened, or with a traceback."""
    with pytest.raises(UserError, match=message) as refusal:
        check_values(small_config(**changes))
    assert '\n' not in str(refusal.value)


def test_padding_is_zero_after_the_normalisation(small_config):
    """Padding would be the darkest colour, which no image of the published training had."""
    batch = {
        'image': jnp.full((2, 32, 32, 3), 200, jnp.uint8),
        'label': jnp.zeros((2, 32, 32), jnp.uint8),
        'size': jnp.asarray([[32, 32], [20, 9]]),
    }
    keys = jax.random.split(jax.random.key(0), 2)
    plain, distorted = (
        np.asarray(jax.jit(make_task(small_config(**{'augment.photometric': on})).augment)(batch, keys)['image'])
        for on in (False, True)
    )
    assert (plain[0] > 1).all()
    for images in (plain, distorted):
        assert np.count_nonzero(images[1]) == 20 * 9 * 3
        assert (images[1, :20, :9] != 0).all()
    assert np.abs(distorted - plain).max() > 0.05


def test_crops_below_the_stride_are_refused(small_config):
    """A map without pixels gives a loss of NaN."""
    config = small_config(**{'data.image_size': 15, 'model.num_classes': 3})
    with pytest.raises(UserError, match='data.image_size=15 is below the total stride 16 of convnext_atto'):
        make_task(config).build(jax.random.key(0))
