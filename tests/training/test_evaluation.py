"""The metrics of a whole split, compared with numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convnext_jax.data.augment import normalize
from convnext_jax.models import ConvNeXt, Variant, get_parameters, with_parameters
from convnext_jax.tasks import Evaluator, Measured
from convnext_jax.tasks.accuracy import Accuracy
from convnext_jax.training.evaluation import compute_metrics, evaluate, make_eval_step

COUNT = 23
MEAN, STD = (0.4, 0.5), (0.2, 0.3)
ACCURACY = Accuracy(MEAN, STD)


def build(num_classes):
    """A one-block model and two sets of parameters for it."""
    variant = Variant((1,), (4,), layer_scale_init=0)
    model = jax.eval_shape(
        lambda key: ConvNeXt(variant, key=key, num_classes=num_classes, drop_path_rate=0.9, in_channels=2),
        jax.random.key(0),
    )
    rng = np.random.default_rng(0)
    raw, ema = (
        {name: rng.standard_normal(leaf.shape).astype(np.float32) for name, leaf in get_parameters(model).items()}
        for _ in range(2)
    )
    return model, raw, ema


def examples(num_classes):
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (COUNT, 8, 8, 2), dtype=np.uint8), rng.integers(0, num_classes, COUNT, dtype=np.int32)


def batches(images, labels, batch_size):
    """Batches of float images; the padding of the last batch has NaN pixels and impossible labels."""
    padding = -(-len(images) // batch_size) * batch_size - len(images)
    nan = np.full((padding, *images.shape[1:]), np.nan, np.float32)
    images = np.concatenate([images.astype(np.float32) / 255, nan])
    labels = np.concatenate([labels, np.full(padding, 10**6, np.int32)])
    weights = np.concatenate([np.ones(len(images) - padding, np.float32), np.zeros(padding, np.float32)])
    for first in range(0, len(images), batch_size):
        part = slice(first, first + batch_size)
        yield {'image': images[part], 'label': labels[part], 'weight': weights[part]}


def metrics_in_numpy(model, parameters, images, labels):
    logits = np.asarray(with_parameters(model, parameters)(normalize(jnp.asarray(images), MEAN, STD)), np.float64)
    log_sums = np.log(np.exp(logits).sum(-1))
    order = np.argsort(-logits, axis=-1)
    confidence = np.exp(logits.max(-1) - log_sums)
    gaps = 0
    for low, high in itertools.pairwise(np.linspace(0, 1, 16)):  # arXiv:1706.04599, equation 3
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gaps += inside.sum() * abs((order[inside, 0] == labels[inside]).mean() - confidence[inside].mean())
    return {
        'loss': np.mean(log_sums - logits[np.arange(len(labels)), labels]),
        'ece': 100 * gaps / len(labels),
        'top1': 100 * np.mean(order[:, 0] == labels),
        'top5': 100 * np.mean((order[:, :5] == labels[:, None]).any(-1)),
    }


@pytest.fixture(scope='module')
def ten_classes():
    model, raw, ema = build(10)
    images, labels = examples(10)
    for first, parameters in enumerate((raw, ema)):  # makes some predictions of each correct
        logits = with_parameters(model, parameters)(normalize(jnp.asarray(images), MEAN, STD))
        labels[first::5] = np.asarray(logits).argmax(-1)[first::5]
    expected = {prefix: metrics_in_numpy(model, p, images, labels) for prefix, p in {'': raw, 'ema_': ema}.items()}
    step = jax.jit(make_eval_step(ACCURACY, model))
    return step, {'': raw, 'ema_': ema}, images, labels, expected


@pytest.mark.parametrize('batch_size', [1, 4, 7, COUNT, 64])
def test_metrics_equal_numpy_for_any_batch_size(ten_classes, batch_size):
    """The accuracy would be wrong if padding counted, even as NaN, or if an example counted twice or not at all."""
    step, weights, images, labels, expected = ten_classes
    metrics = compute_metrics(ACCURACY, *evaluate(step, weights, batches(images, labels, batch_size)))
    assert metrics.pop('images') == COUNT
    assert metrics.keys() == {f'{prefix}{name}' for prefix in weights for name in ('loss', 'top1', 'top5', 'ece')}
    for prefix, values in expected.items():
        assert 0 < values['top1'] < values['top5'] < 100, 'the test data must give each metric another value'
        for name, value in values.items():
            assert metrics[f'{prefix}{name}'] == pytest.approx(value, rel=1e-5), f'{prefix}{name}'
    assert all(isinstance(value, float) for value in metrics.values())


def test_all_weights_are_evaluated_in_one_pass(ten_classes):
    """Reading and decoding the split twice would double the time of every evaluation."""
    step, weights, images, labels, expected = ten_classes
    read = []
    once = (read.append(number) or batch for number, batch in enumerate(batches(images, labels, 7)))
    metrics = compute_metrics(ACCURACY, *evaluate(step, weights, once))
    assert read == [0, 1, 2, 3]
    assert metrics['loss'] == pytest.approx(expected['']['loss'], rel=1e-5)
    assert metrics['ema_loss'] == pytest.approx(expected['ema_']['loss'], rel=1e-5)
    assert abs(metrics['loss'] - metrics['ema_loss']) > 0.01


@pytest.mark.parametrize('num_classes', [1, 3])
def test_top5_is_100_with_fewer_than_five_classes(num_classes):
    """A data set of three classes could not be evaluated."""
    model, raw, _ = build(num_classes)
    images, labels = examples(num_classes)
    step = jax.jit(make_eval_step(ACCURACY, model))
    metrics = compute_metrics(ACCURACY, *evaluate(step, {'': raw}, batches(images, labels, 64)))
    assert metrics['top5'] == 100
    assert metrics['top1'] == pytest.approx(metrics_in_numpy(model, raw, images, labels)['top1'])


def test_sharded_batches_give_the_same_metrics(ten_classes):
    """The accuracy would depend on the number of devices."""
    step, weights, images, labels, expected = ten_classes
    assert jax.device_count() >= 8, 'tests/conftest.py simulates eight devices'
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:8]), ('data',))
    by_example, replicated = shardings(mesh)
    sharded = (jax.device_put(batch, by_example) for batch in batches(images, labels, 16))
    metrics = compute_metrics(ACCURACY, *evaluate(step, jax.device_put(weights, replicated), sharded))
    assert metrics['images'] == COUNT
    for prefix, values in expected.items():
        for name, value in values.items():
            assert metrics[f'{prefix}{name}'] == pytest.approx(value, rel=1e-5), f'{prefix}{name}'


def shardings(mesh):
    """The sharding of batches, and the sharding of weights and results."""
    return (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (['data'], []))


def sums_of(model, parameters, images, labels, **options):
    """The sums that `Accuracy` with these options returns for one batch."""
    weights = np.ones(len(images), np.float32)
    batch = {'image': images, 'label': labels, 'weight': weights}
    return jax.device_get(jax.jit(make_eval_step(Accuracy(MEAN, STD, **options), model))(parameters, batch))[0].sums


def logits_of(model, parameters, images):
    return np.asarray(with_parameters(model, parameters)(normalize(jnp.asarray(images), MEAN, STD)))


def test_any_label_of_an_image_with_several_labels_is_correct():
    """ReaL accuracy (arXiv:2006.07159) would be too low: an image of a laptop on a desk has both labels."""
    model, raw, _ = build(10)
    images, _ = examples(10)
    order = np.argsort(-logits_of(model, raw, images), axis=-1)
    labels = np.full((COUNT, 4), -1, np.int32)
    labels[:, 0] = order[:, 9]
    labels[:8, 1] = order[:8, 0]
    labels[8:12, 2] = order[8:12, 3]
    sums = sums_of(model, raw, images, labels)
    assert (sums['top1'], sums['top5'], sums['count']) == (8, 12, COUNT)


def test_predictions_are_restricted_to_the_eval_classes():
    """ImageNet-A and -R have 200 classes: choosing among all 1,000 would not give the published accuracies."""
    model, raw, _ = build(10)
    images, _ = examples(10)
    eval_classes = (1, 4, 7)
    among = logits_of(model, raw, images)[:, eval_classes].astype(np.float64)
    labels = np.asarray(eval_classes, np.int32)[among.argmax(-1)]
    labels[:5] = np.asarray(eval_classes)[among[:5].argmin(-1)]
    sums = sums_of(model, raw, images, labels, eval_classes=eval_classes)
    assert sums['top1'] == COUNT - 5
    chosen = np.log(np.exp(among).sum(-1)) - among[np.arange(COUNT), [eval_classes.index(label) for label in labels]]
    assert sums['loss'] == pytest.approx(chosen.sum(), rel=1e-5)


def test_flip_averages_the_logits_of_the_image_and_its_mirror_image():
    """`eval.py --flip` would report the accuracy of another method."""
    model, raw, _ = build(10)
    images, labels = examples(10)
    both = (logits_of(model, raw, images) + logits_of(model, raw, images[:, :, ::-1])) / 2
    sums = sums_of(model, raw, images, labels, flip=True)
    assert sums['top1'] == (both.argmax(-1) == labels).sum()
    expected = np.log(np.exp(both.astype(np.float64)).sum(-1)) - both[np.arange(COUNT), labels]
    assert sums['loss'] == pytest.approx(expected.sum(), rel=1e-5)
    assert sums['loss'] != pytest.approx(sums_of(model, raw, images, labels)['loss'], rel=1e-4)


def test_the_table_has_the_accuracy_of_each_class():
    """`eval.py --per_class` would report wrong accuracies, or NaN for a class without images."""
    model, raw, _ = build(10)
    images, labels = examples(10)
    labels = np.where(labels == 3, 2, labels).astype(np.int32)
    labels[:4] = logits_of(model, raw, images[:4]).argmax(-1)
    hits = logits_of(model, raw, images).argmax(-1) == labels
    evaluator = Accuracy(MEAN, STD, class_names=list('abcdefghij'))
    _, measured = evaluate(jax.jit(make_eval_step(evaluator, model)), {'': raw}, batches(images, labels, 7))
    table = evaluator.table(measured[''])
    assert ''.join(row['class'] for row in table) == 'abcdefghij'
    accuracies = [row['top1'] for row in table]
    for label in range(10):
        of_class = labels == label
        assert accuracies[label] == (pytest.approx(100 * hits[of_class].mean()) if of_class.any() else None)


class Numbers(Evaluator):
    """Sums numbers that float32 cannot represent, and returns one number for each example."""

    def measure(self, model, batch):
        number = batch['number']
        return Measured({'large': jnp.where(batch['weight'] > 0, 2**24 + 1, 0).max()}, {'number': number + model.one})

    def summary(self, measured):
        return {'large': float(measured.sums['large'])}


@pytest.mark.parametrize('devices', [1, 8])
def test_results_of_examples_are_in_order_without_padding_and_sums_are_exact(devices):
    """Detections in padding would be false positives, and float32 cannot count the pixels of a large split."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:devices]), ('data',))
    by_example, replicated = shardings(mesh)
    model = nnx.Module()
    model.one = nnx.Param(jnp.ones((), jnp.int32))
    step = jax.jit(make_eval_step(Numbers(), model), out_shardings=replicated)
    numbers = np.arange(24, dtype=np.int32).reshape(3, 8)
    batches = ({'number': number, 'weight': np.float32(number < COUNT)} for number in numbers)
    sharded = (jax.device_put(batch, by_example) for batch in batches)
    images, measured = evaluate(step, {'': {'one': np.int32(1)}}, sharded)
    assert images == COUNT
    np.testing.assert_array_equal(measured[''].examples['number'], np.arange(COUNT) + 1)
    assert compute_metrics(Numbers(), images, measured) == {'images': COUNT, 'large': 3 * (2**24 + 1)}
