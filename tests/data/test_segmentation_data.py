"""Training crops and evaluation images with masks: sizes, padding, the choice of crops, and error messages."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from convnext_jax.data.mask_classes import IGNORED, MaskClasses
from convnext_jax.data.masks import MaskedImage, open_masks
from convnext_jax.data.opencv_resize import resize_bilinear
from convnext_jax.data.pipeline import Share, eval_batches, train_batches
from convnext_jax.data.segmentation import EvalMasks, TrainMasks, fit_size
from convnext_jax.errors import UserError
from tests import reference
from tests.reference import cases


class Pictures:
    """A source of images in memory whose red channel is the mask times ten, with two classes."""

    classes = MaskClasses(('left', 'right'), (1, 2), reduce_zero_label=True)

    def __init__(self, *masks, **options):
        self.masks, self.options = [np.array(mask, np.uint8) for mask in masks], options

    def __len__(self):
        return len(self.masks)

    def name(self, index):
        return f'{index}.png'

    def __getitem__(self, index):
        mask = self.masks[index]
        image = np.stack([10 * mask, 0 * mask, 0 * mask], 2)
        return MaskedImage(encode(image, **self.options), encode(mask), self.name(index), f'mask {index}.png')


def encode(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG', **options)
    return file.getvalue()


def halves(height, width):
    """A mask whose left and right halves have different classes."""
    return np.where(np.arange(width) < width // 2, 1, 2) * np.ones((height, 1), int)


@pytest.fixture
def sample():
    return open_masks('masks', str(cases.SAMPLE), 'validation', reduce_zero_label=True)


def test_image_and_mask_are_cropped_at_the_same_pixels():
    """The network would learn shifted masks."""
    data = TrainMasks(Pictures(halves(32, 32)), 16, resize=(32, 32), scale=(1, 1))
    for seed in range(20):
        example = data.load(0, (seed,))
        np.testing.assert_array_equal(example['image'][:, :, 0], 10 * (example['label'] + 1))
        assert set(np.unique(example['label'])) == {0, 1}
        assert {name: (x.shape, x.dtype) for name, x in example.items()} == {
            name: (x.shape, x.dtype) for name, x in data.features.items()
        }


def test_half_of_the_crops_are_mirrored():
    """Recipes with flips would train without them."""
    crops = [TrainMasks(Pictures(halves(8, 8)), 8, resize=(8, 8), scale=(1, 1), flip=flip) for flip in (True, False)]
    first = np.array([[data.load(0, (seed,))['label'][0, 0] for seed in range(100)] for data in crops])
    assert 30 < first[0].sum() < 70
    assert not first[1].any()


def test_scales_are_uniform_and_keep_the_aspect_ratio():
    """The network would see objects of other sizes than in the recipe."""
    data = TrainMasks(Pictures(halves(20, 40)), 200, resize=(2048, 100), flip=False)
    sizes = np.array([data.load(0, (seed,))['size'] for seed in range(200)])
    assert sizes[:, 0].min() < 60
    assert sizes[:, 0].max() > 190
    assert 115 < sizes[:, 0].mean() < 135
    np.testing.assert_array_equal(np.minimum(2 * sizes[:, 0], 200), sizes[:, 1])


def test_padding_is_right_and_below_and_ignored():
    """The loss would count pixels that do not exist."""
    example = TrainMasks(Pictures(halves(4, 6)), 9, resize=(6, 4), scale=(1, 1), flip=True).load(0, (0,))
    np.testing.assert_array_equal(example['size'], [4, 6])
    inside = np.zeros((9, 9), bool)
    inside[:4, :6] = True
    np.testing.assert_array_equal(example['label'] != IGNORED, inside)
    np.testing.assert_array_equal(example['image'].any(-1), inside)


def test_crops_with_one_large_class_are_drawn_again():
    """Large crops of sky or wall would make up most of the training."""
    mask = np.where(np.arange(64) < 54, 1, 2) * np.ones((16, 1), int)  # 12 % of the crops have over 25 % of class 2

    def accepted(max_class_share):
        options = {'resize': (64, 16), 'scale': (1, 1), 'max_class_share': max_class_share}
        data = TrainMasks(Pictures(mask), 16, **options)
        return np.mean([np.mean(data.load(0, (seed,))['label'] == 0) < 0.75 for seed in range(60)])

    assert accepted(1.0) < 0.3
    assert accepted(0.75) > 0.6  # 1 − 0.88¹¹ = 0.76


def test_the_eleventh_crop_is_final():
    """An image of one class would be cropped without end, or the recipe would choose other crops."""
    mask = np.where(np.arange(64) % 4 < 3, 1, 2) * np.ones((16, 1), int)  # class 1 has exactly 75 % of each crop
    data = TrainMasks(Pictures(mask), 16, resize=(64, 16), scale=(1, 1), flip=False)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        rng.uniform(1, 1)
        left = [rng.integers(size - 15) for _ in range(11) for size in (16, 64)][-1]
        np.testing.assert_array_equal(data.load(0, (seed,))['label'], mask[:, left : left + 16] - 1)


def test_an_image_without_labels_works():
    """One photograph without labels would end the training."""
    source = Pictures(np.zeros((8, 8)))
    assert (TrainMasks(source, 4, resize=(8, 8)).load(0, (0,))['label'] == IGNORED).all()
    assert (EvalMasks(source).load(0)['label'] == IGNORED).all()


def test_the_draw_determines_the_example(sample):
    """A resumed run would get other crops."""
    data = pickle.loads(pickle.dumps(TrainMasks(sample, 64)))
    first, again, other = (data.load(0, draw) for draw in ((3, 0, 0, 0), (3, 0, 0, 0), (3, 1, 0, 0)))
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    assert (first['image'] != other['image']).any()


def test_evaluation_pads_all_images_to_the_largest():
    """Images of different sizes could not form batches, or would be cut."""
    source = Pictures(halves(10, 20), halves(20, 10), halves(5, 30))
    data = EvalMasks(source, resize=(60, 20))
    assert data.features['image'].shape == (40, 60, 3)
    assert data.features['label'].shape == (20, 30)
    (batch,) = eval_batches(data, Share(3))
    np.testing.assert_array_equal(batch['image_size'], [[20, 40], [40, 20], [10, 60]])
    np.testing.assert_array_equal(batch['label_size'], [[10, 20], [20, 10], [5, 30]])
    for index, mask in enumerate(source.masks):
        height, width = batch['label_size'][index]
        np.testing.assert_array_equal(batch['label'][index, :height, :width], mask - 1)
        assert (batch['label'][index] != IGNORED).sum() == mask.size
        height, width = batch['image_size'][index]
        image = np.stack([10 * mask, 0 * mask, 0 * mask], 2).astype(np.uint8)
        np.testing.assert_array_equal(batch['image'][index, :height, :width], resize_bilinear(image, (height, width)))
        assert not batch['image'][index, height:].any()
        assert not batch['image'][index, :, width:].any()


def test_an_image_is_resized_once_for_each_scale():
    """mmsegmentation's results with several scales could not be reproduced."""
    source = Pictures(halves(10, 20), halves(20, 10))
    data = EvalMasks(source, resize=(45, 15), scales=(1.0, 0.5))
    assert data.smallest_side == 7
    assert data.shapes == [[(15, 30), (30, 15)], [(7, 14), (14, 7)]]
    assert data.image_canvases == [(30, 30), (14, 14)]
    example = data.load(0)
    assert example.keys() == data.features.keys()
    assert {name: (x.shape, x.dtype) for name, x in example.items()} == {
        name: (x.shape, x.dtype) for name, x in data.features.items()
    }
    image = np.stack([10 * source.masks[0], 0 * source.masks[0], 0 * source.masks[0]], 2).astype(np.uint8)
    for name, size_name, size in (('image', 'image_size', (15, 30)), ('image_1', 'image_size_1', (7, 14))):
        np.testing.assert_array_equal(example[size_name], size)
        np.testing.assert_array_equal(example[name][: size[0], : size[1]], resize_bilinear(image, size))


def test_squash_resizes_as_hugging_face(sample):
    """Weights of Hugging Face would be evaluated on other pixels than in transformers."""
    example = EvalMasks(sample, squash=64).load(0)
    with Image.open(sample.name(0)) as image:
        expected = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(example['image'], expected)
    np.testing.assert_array_equal(example['image_size'], [64, 64])
    np.testing.assert_array_equal(example['label_size'], [300, 400])


def test_the_image_is_rotated_as_its_exif_orientation_says():
    """OpenCV, and so mmsegmentation, rotates images but not masks."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored image must be rotated by 90°
    source = Pictures(halves(4, 6), exif=exif)
    for opened in (lambda: EvalMasks(source), lambda: TrainMasks(source, 4).load(0)):
        with pytest.raises(UserError, match=r'mask 0\.png has 6×4 pixels, but the upright image 0\.png has 4×6'):
            opened()


def test_an_image_that_cannot_be_read_is_named():
    """The user would not find the damaged file."""

    class Damaged(Pictures):
        def __getitem__(self, index):
            return super().__getitem__(index)._replace(image=b'no image')

    data = TrainMasks(Damaged(halves(4, 4)), 4)
    for broken in (lambda: data.load(0), lambda: data.check(0), lambda: EvalMasks(Damaged(halves(4, 4)))):
        with pytest.raises(UserError, match=r'0\.png cannot be decoded'):
            broken()


def test_a_scale_that_is_not_above_0_is_refused(sample):
    """The resize would fail with an error that does not name the option."""
    for scales in ((), (1.0, 0.0)):
        with pytest.raises(UserError, match=r'eval\.scales must be one or more factors above 0, not \('):
            EvalMasks(sample, scales=scales)


@pytest.mark.parametrize('options', [{'scale': (0, 2)}, {'scale': (2, 1)}, {'resize': (0, 5)}])
def test_invalid_options_are_refused(sample, options):
    """The first example would fail with an error that does not name the option."""
    with pytest.raises(UserError, match=rf'data\.{next(iter(options))} must be'):
        TrainMasks(sample, 8, **options)


def test_fit_size_follows_mmcv():
    """Images would be resized to sizes that differ by a pixel."""
    assert fit_size((512, 683), (2048, 512)) == (512, 683)
    assert fit_size((364, 500), (2048, 512)) == (512, 703)
    assert fit_size((5, 10), (5, 3)) == (3, 5)  # 2.5 is rounded up
    assert fit_size((100, 1000), (512, 2048)) == (205, 2048)  # the longer side is the limit, 204.8 is rounded
    assert fit_size((1, 5000), (1024, 256)) == (1, 1024)  # a side is never 0


def test_batches_of_training_crops(sample):
    """Masks would not reach the devices."""
    batches = train_batches(TrainMasks(sample, 32), Share(1), seed=0, start_step=0)
    batch = next(batches)
    batches.close()
    assert {name: x.shape for name, x in batch.items()} == {
        'image': (1, 32, 32, 3),
        'label': (1, 32, 32),
        'size': (1, 2),
    }


@pytest.mark.parametrize(('draw', 'crop'), cases.MASK_CROPS)
def test_crops_are_equal_to_mmsegmentation(sample, draw, crop):
    """The published recipe would be trained with other crops, or pixels that are shifted or rounded differently."""
    stored = reference.arrays('opencv')
    for name, array in TrainMasks(sample, crop).load(0, (draw,)).items():
        np.testing.assert_array_equal(reference.sketch(array), stored[f'crop {crop} {draw} {name}'])
