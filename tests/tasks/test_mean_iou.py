"""mIoU over sliding windows, against a plain loop in NumPy that follows mmsegmentation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from convnext_jax.tasks import Measured
from convnext_jax.tasks.mean_iou import MeanIoU
from convnext_jax.tasks.sliding_windows import SlidingWindows
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

    def __call__(self, images):
        dimensions = ('NHWC', 'HWIO', 'NHWC')
        return jax.lax.conv_general_dilated(images, KERNEL, (1, 1), 'SAME', dimension_numbers=dimensions)


def examples():
    """The images of `SIZES` on canvases, with labels of which a tenth is ignored."""
    images = np.zeros((len(SIZES), 37, 40, 3), np.uint8)
    labels = np.full((len(SIZES), 70, 70), 255, np.uint8)
    for i, ((rows, columns), (height, width)) in enumerate(SIZES):
        images[i, :rows, :columns] = draw_bytes(f'image {i}', (rows, columns, 3), 256)
        known = draw_bytes(f'ignored {i}', (height, width), 10) > 0
        labels[i, :height, :width] = np.where(known, draw_bytes(f'label {i}', (height, width), 4), 255)
    sizes = np.asarray(SIZES, np.int32)
    return [
        {'image': image, 'label': label, 'image_size': size[0], 'label_size': size[1], 'weight': np.float32(1)}
        for image, label, size in zip(images, labels, sizes, strict=True)
    ]


def batches(size):
    """The examples in batches, the last one with padding as the data pipeline adds it."""
    rows = examples()
    rows += [jax.tree.map(np.zeros_like, rows[0])] * (-len(rows) % size)
    for start in range(0, len(rows), size):
        yield jax.tree.map(lambda *x: np.stack(x), *rows[start : start + size])


def plain_logits(image):
    """`EncoderDecoder.slide_inference` for a normalised image, (H, W, classes)."""
    height, width = image.shape[:2]
    sums, counts = np.zeros((height, width, CLASSES)), np.zeros((height, width, 1))
    for i in range(max(height - CROP + STRIDE - 1, 0) // STRIDE + 1):
        for j in range(max(width - CROP + STRIDE - 1, 0) // STRIDE + 1):
            bottom, right = min(i * STRIDE + CROP, height), min(j * STRIDE + CROP, width)
            top, left = max(bottom - CROP, 0), max(right - CROP, 0)
            window = image[top:bottom, left:right]
            missing = [(0, CROP - side) for side in window.shape[:2]]  # windows are padded here, not in mmsegmentation
            logits = np.asarray(Network()(jnp.asarray(np.pad(window, [*missing, (0, 0)])[None], jnp.float32)))[0]
            sums[top:bottom, left:right] += logits[: window.shape[0], : window.shape[1]]
            counts[top:bottom, left:right] += 1
    return sums / counts


def resized_axis(x, length):
    """Bilinear interpolation along the first axis, with half-pixel centres."""
    positions = np.clip((np.arange(length) + 0.5) * len(x) / length - 0.5, 0, len(x) - 1)
    low = np.floor(positions).astype(int)
    weight = (positions - low)[:, None, None]
    return (1 - weight) * x[low] + weight * x[np.minimum(low + 1, len(x) - 1)]


def plain_prediction(example, flip):
    rows, columns = example['image_size']
    height, width = example['label_size']
    image = (example['image'][:rows, :columns] / 255 - MEAN) / STD

    def probabilities(image):
        logits = resized_axis(resized_axis(plain_logits(image), height).swapaxes(0, 1), width).swapaxes(0, 1)
        return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    result = probabilities(image)
    return (result + probabilities(image[:, ::-1])[:, ::-1] if flip else result).argmax(-1)


def plain_confusion(flip):
    confusion = np.zeros((CLASSES, CLASSES))
    for example in examples():
        predicted = plain_prediction(example, flip)
        label = example['label'][: predicted.shape[0], : predicted.shape[1]]
        np.add.at(confusion, (label[label != 255], predicted[label != 255]), 1)
    return confusion


def evaluator(flip=False):
    return MeanIoU(SlidingWindows(MEAN, STD, CROP, STRIDE, flip), NAMES)


@pytest.mark.parametrize('flip', [False, True])
def test_every_pixel_gets_the_class_that_mmsegmentation_gives_it(flip):
    """The mIoU of published weights would differ from the published mIoU."""
    (batch,) = batches(len(SIZES))
    measured = jax.jit(lambda batch: evaluator(flip).measure(Network(), batch))(batch)
    expected = plain_confusion(flip)
    np.testing.assert_array_equal(measured.sums['confusion'], expected)
    assert expected.sum() == sum((example['label'] != 255).sum() for example in examples())
    assert measured.sums['padded_images'] == 2


@pytest.mark.parametrize(('devices', 'size'), [(1, 1), (1, 3), (2, 2), (4, 4), (4, 8)])
def test_every_pixel_counts_once_on_any_number_of_devices(devices, size):
    """The mIoU would depend on the batch size and on the hardware."""
    mesh = Mesh(np.asarray(jax.devices()[:devices]).reshape(-1, 1), ('data', 'fsdp'))
    step = jax.jit(make_eval_step(evaluator(), Network(), mesh, {}))
    images, measured = evaluate(step, {'': {}}, batches(size))
    assert images == len(SIZES)
    np.testing.assert_array_equal(measured[''].sums['confusion'], plain_confusion(False))


def test_the_metrics_are_equal_to_a_direct_computation():
    """A class that occurs neither in the labels nor in the predictions would count as an IoU of 0."""
    confusion = np.zeros((CLASSES, CLASSES))
    confusion[:4, :4] = draw_bytes('confusion', (4, 4), 100)
    confusion[3] = 0  # class 3 is predicted, but has no label; class 4 does not occur
    ious = [confusion[c, c] / (confusion[c].sum() + confusion[:, c].sum() - confusion[c, c]) for c in range(4)]
    accuracies = [confusion[c, c] / confusion[c].sum() for c in range(3)]
    measured = Measured({'confusion': confusion, 'padded_images': np.float64(0), 'not_finite': np.float64(0)})
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
    sums = {'confusion': np.zeros((CLASSES, CLASSES)), 'padded_images': np.float64(2), 'not_finite': np.float64(0)}
    measured = Measured(sums)
    metrics = evaluator().summary(measured)
    assert np.isnan([metrics['miou'], metrics['macc'], metrics['aacc']]).all()
    assert metrics['padded_images'] == 2


def test_pixels_whose_logits_are_not_finite_have_no_class():
    """A network whose weights are NaN would look like a bad network: the argmax of NaN is class 0."""

    @jax.tree_util.register_static
    class Broken(Network):
        def __call__(self, images):
            return super().__call__(images).at[0, 3, 4, 2].set(jnp.nan)

    (batch,) = batches(len(SIZES))
    measured = jax.jit(lambda batch: evaluator().measure(Broken(), batch))(batch)
    assert measured.sums['not_finite'] > 0
    assert np.isnan(list(evaluator().summary(jax.device_get(measured)).values())[:3]).all()
