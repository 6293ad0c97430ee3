"""mIoU over sliding windows, whole images and several scales, compared with a plain loop as in mmsegmentation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from convnext_jax.data.segmentation import view_features
from convnext_jax.models.extent import Extent
from convnext_jax.tasks import Measured
from convnext_jax.tasks.mean_iou import MeanIoU
from convnext_jax.tasks.pixel_classes import PixelClasses
from convnext_jax.training.evaluation import compute_metrics, evaluate, make_eval_step
from tests.reference import draw, draw_bytes

MEAN, STD, CROP, STRIDE, CLASSES = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 16, 11, 5
NAMES = ('wall', 'sky', 'tree', 'road')
SIZES = (  # of the resized and of the original image: several windows, one window, smaller than a window, extreme
    ((37, 29), (61, 50)),
    ((16, 40), (13, 33)),
    ((16, 16), (16, 16)),
    ((11, 34), (23, 70)),
    ((30, 9), (70, 21)),
)
KERNEL = draw('kernel', (5, 5, 3, CLASSES))


@jax.tree_util.register_static
class Network:
    """A convolution with zero padding: its logits depend on the borders of a window."""

    num_classes = CLASSES

    def __call__(self, images, *, sizes=None):
        images = images if sizes is None else Extent(sizes).keep(images)
        dimensions = ('NHWC', 'HWIO', 'NHWC')
        return jax.lax.conv_general_dilated(images, KERNEL, (1, 1), 'SAME', dimension_numbers=dimensions)

    def logits_within(self, images, sizes):
        """At every second row and column."""
        return self(images, sizes=sizes)[:, ::2, ::2], Extent((sizes + 1) // 2)


def examples(views=1):
    """The images of `SIZES` on canvases, at the given number of scales, with labels of which a tenth is ignored."""
    rows = []
    for i, ((height, width), label_size) in enumerate(SIZES):
        known = draw_bytes(f'ignored {i}', label_size, 10) > 0
        label = np.where(known, draw_bytes(f'label {i}', label_size, 4), 255).astype(np.uint8)
        example = {'label': on_canvas(label, (70, 70), 255), 'label_size': np.asarray(label_size, np.int32)}
        for view in range(views):
            size = height + 5 * view, width + 3 * view
            names, image = view_features(view), draw_bytes(f'image {i}' + ' again' * view, (*size, 3), 256)
            example |= {names.image: on_canvas(image, (42, 43), 0), names.size: np.asarray(size, np.int32)}
        rows.append(example | {'weight': np.float32(1)})
    return rows


def on_canvas(array, size, value):
    canvas = np.full((*size, *array.shape[2:]), value, np.uint8)
    canvas[: array.shape[0], : array.shape[1]] = array
    return canvas


def batches(size, views=1):
    """The examples in batches, the last one with padding as the data pipeline adds it."""
    rows = examples(views)
    rows += [jax.tree.map(np.zeros_like, rows[0])] * (-len(rows) % size)
    for start in range(0, len(rows), size):
        yield jax.tree.map(lambda *x: np.stack(x), *rows[start : start + size])


def plain_logits(image, mode):
    """`slide_inference` or `whole_inference` of mmsegmentation for a normalised image, (H, W, classes)."""
    if mode == 'whole':
        logits = np.asarray(Network()(jnp.asarray(image[None], jnp.float32)))[0, ::2, ::2]
        return resized(logits, image.shape[:2])
    height, width = image.shape[:2]
    sums, counts = np.zeros((height, width, CLASSES)), np.zeros((height, width, 1))
    for i in range(max(height - CROP + STRIDE - 1, 0) // STRIDE + 1):
        for j in range(max(width - CROP + STRIDE - 1, 0) // STRIDE + 1):
            bottom, right = min(i * STRIDE + CROP, height), min(j * STRIDE + CROP, width)
            top, left = max(bottom - CROP, 0), max(right - CROP, 0)
            window = jnp.asarray(image[None, top:bottom, left:right], jnp.float32)
            sums[top:bottom, left:right] += np.asarray(Network()(window))[0]
            counts[top:bottom, left:right] += 1
    return sums / counts


def resized_axis(x, length):
    """Bilinear interpolation along the first axis, with half-pixel centres."""
    positions = np.clip((np.arange(length) + 0.5) * len(x) / length - 0.5, 0, len(x) - 1)
    low = np.floor(positions).astype(int)
    weight = (positions - low)[:, None, None]
    return (1 - weight) * x[low] + weight * x[np.minimum(low + 1, len(x) - 1)]


def resized(x, size):
    return resized_axis(resized_axis(x, size[0]).swapaxes(0, 1), size[1]).swapaxes(0, 1)


def plain_prediction(example, mode, flip, views):
    total = 0
    for image_name, size_name in map(view_features, range(views)):
        rows, columns = example[size_name]
        image = (example[image_name][:rows, :columns] / 255 - MEAN) / STD
        for mirror in (1, -1)[: 1 + flip]:
            logits = resized(plain_logits(image[:, ::mirror], mode), example['label_size'])[:, ::mirror]
            total += np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return total.argmax(-1)


def plain_confusion(mode='slide', flip=False, views=1):
    confusion = np.zeros((CLASSES, CLASSES))
    for example in examples(views):
        predicted = plain_prediction(example, mode, flip, views)
        label = example['label'][: predicted.shape[0], : predicted.shape[1]]
        np.add.at(confusion, (label[label != 255], predicted[label != 255]), 1)
    return confusion


def evaluator(mode='slide', flip=False, views=1):
    if mode == 'slide':
        return MeanIoU(PixelClasses(MEAN, STD, CROP, STRIDE, flip), NAMES, views)
    shapes = [[(16 + 5 * view, 40 + 3 * view), (37 + 5 * view, 29 + 3 * view)] for view in range(views)]
    return MeanIoU(PixelClasses(MEAN, STD, flip=flip, shapes=shapes), NAMES, views)


@pytest.mark.parametrize('mode', ['slide', 'whole'])
@pytest.mark.parametrize(('flip', 'views'), [(False, 1), (True, 1), (True, 2)])
def test_every_pixel_gets_the_class_that_mmsegmentation_gives_it(mode, flip, views):
    """The mIoU of published weights would differ from the published mIoU."""
    (batch,) = batches(len(SIZES), views)
    measured = jax.jit(lambda batch: evaluator(mode, flip, views).measure(Network(), batch))(batch)
    expected = plain_confusion(mode, flip, views)
    assert np.abs(measured.sums['confusion'] - expected).sum() <= 2, 'more than one pixel differs'
    assert expected.sum() == sum((example['label'] != 255).sum() for example in examples())


@pytest.mark.parametrize(('devices', 'size'), [(1, 1), (1, 3), (2, 2), (4, 4), (4, 8)])
def test_every_pixel_counts_once_on_any_number_of_devices(devices, size):
    """The mIoU would depend on the batch size and on the hardware."""
    mesh = Mesh(np.asarray(jax.devices()[:devices]).reshape(-1, 1), ('data', 'fsdp'))
    step = jax.jit(make_eval_step(evaluator(), Network(), mesh, {}))
    images, measured = evaluate(step, {'': {}}, batches(size))
    assert images == len(SIZES)
    np.testing.assert_array_equal(measured[''].sums['confusion'], plain_confusion())


def test_the_metrics_are_equal_to_a_direct_computation():
    """A class that occurs neither in the labels nor in the predictions would count as an IoU of 0."""
    confusion = np.zeros((CLASSES, CLASSES))
    confusion[:4, :4] = draw_bytes('confusion', (4, 4), 100)
    confusion[3] = 0  # class 3 is predicted, but has no label; class 4 does not occur
    ious = [confusion[c, c] / (confusion[c].sum() + confusion[:, c].sum() - confusion[c, c]) for c in range(4)]
    accuracies = [confusion[c, c] / confusion[c].sum() for c in range(3)]
    measured = Measured({'confusion': confusion, 'not_finite': np.float64(0)})
    metrics = compute_metrics(evaluator(), 7, {'': measured})
    assert metrics.keys() == {'images', 'miou', 'macc', 'aacc'}
    assert metrics['miou'] == pytest.approx(100 * np.mean(ious), rel=1e-12)
    assert metrics['macc'] == pytest.approx(100 * np.mean(accuracies), rel=1e-12)
    assert metrics['aacc'] == pytest.approx(100 * np.trace(confusion) / confusion.sum(), rel=1e-12)
    table = evaluator().table(measured)
    assert table[0] == {
        'label': 0,
        'class': 'wall',
        'iou': pytest.approx(100 * ious[0]),
        'accuracy': pytest.approx(100 * accuracies[0]),
        'pixels': confusion[0].sum(),
    }
    assert [row['accuracy'] for row in table[3:]] == [None, None]
    assert table[4] == {'label': 4, 'class': 'class 4', 'iou': None, 'accuracy': None, 'pixels': 0}


def test_the_metrics_of_a_split_without_labelled_pixels_are_nan():
    """0 % would look like a bad network, and a division by zero would end the run."""
    measured = Measured({'confusion': np.zeros((CLASSES, CLASSES)), 'not_finite': np.float64(0)})
    with pytest.warns(UserWarning, match='no pixel of the evaluated masks has a class, so there is no mIoU'):
        metrics = evaluator().summary(measured)
    assert np.isnan(list(metrics.values())).all()


def test_pixels_whose_logits_are_not_finite_have_no_class():
    """A network whose weights are NaN would look like a bad network: the argmax of NaN is class 0."""

    @jax.tree_util.register_static
    class Broken(Network):
        def __call__(self, images, *, sizes=None):
            return super().__call__(images, sizes=sizes).at[0, 3, 4, 2].set(jnp.nan)

    (batch,) = batches(len(SIZES))
    measured = jax.jit(lambda batch: evaluator().measure(Broken(), batch))(batch)
    assert measured.sums['not_finite'] > 0
    assert np.isnan(list(evaluator().summary(jax.device_get(measured)).values())).all()
