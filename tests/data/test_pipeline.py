"""The batches of training and evaluation: the order as a function of seed and step, and the share of each process."""

import io
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from convnext_jax.data import pipeline
from convnext_jax.data.labelled_images import EvalImages, TrainImages
from convnext_jax.data.pipeline import (
    Share,
    Unreadable,
    eval_batches,
    prefetch_to_device,
    shuffled,
    steps_per_epoch,
    train_batches,
)
from convnext_jax.data.sources import EncodedImage
from convnext_jax.errors import UserError


class Numbered:
    """Images of noise whose labels are their indices; those in `broken` cannot be decoded."""

    multi_label = False

    def __init__(self, count, broken=()):
        self.class_names = [str(index) for index in range(count)]
        self._broken = broken

    def __len__(self):
        return len(self.class_names)

    def __getitem__(self, index):
        if index in self._broken:
            return EncodedImage(b'no image', index, f'number {index}')
        buffer = io.BytesIO()
        pixels = np.random.default_rng(index).integers(0, 256, (6, 6), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, 'PNG')
        return EncodedImage(buffer.getvalue(), index, self.name(index))

    def name(self, index):
        return f'number {index}'


def images(count, broken=(), crop_scale=()):
    return TrainImages(Numbered(count, broken), 4, 1, crop_scale=crop_scale)


def train(count=23, share=None, *, steps, seed=0, start_step=0, crop_scale=(0.3, 1.0), repeats=1):
    dataset = images(count, crop_scale=crop_scale)
    batches = train_batches(dataset, share or Share(4), seed=seed, start_step=start_step, repeats=repeats)
    return list(itertools.islice(batches, steps))


def evaluation(count, share):
    return list(eval_batches(EvalImages(Numbered(count), 4, 1, crop_pct=1.0), share))


def labels(batches):
    return [int(label) for batch in batches for label in batch['label']]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_dtypes_and_shapes_of_a_batch():
    """The transfer of float32 images to the device would take four times as long as the transfer of uint8 images."""
    fields = {'image': ((4, 4, 4, 1), 'uint8'), 'label': ((4,), 'int32')}
    weighted = fields | {'weight': ((4,), 'float32')}  # training batches have no padding
    for batch, expected in ((train(steps=1)[0], fields), (evaluation(23, Share(4))[0], weighted)):
        assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == expected


def test_an_epoch_has_each_example_at_most_once():
    """With sampling with replacement, an epoch would not contain a third of the data."""
    batches = train(steps=15)
    epochs = [labels(batches[first : first + 5]) for first in (0, 5, 10)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3, 'each epoch has another order'
    assert len({frozenset(epoch) for epoch in epochs}) > 1, 'different examples are dropped in each epoch'
    assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize('images', [1, 2, 3, 5, 17, 1000, 65536, 65537])
def test_an_order_is_a_permutation(images):
    """Grain's cipher repeats an index in splits of 65,537 images: one image would never be used."""
    assert len({shuffled(position, images, seed=1, epoch=2) for position in range(images)}) == images


def test_an_epoch_has_every_example_if_the_batch_size_divides_the_split():
    """Some examples would be dropped, or belong to the next epoch."""
    for epoch in (train(24, steps=6), train(24, steps=6, start_step=6)):
        assert sorted(labels(epoch)) == list(range(24))


def test_images_have_their_own_labels():
    """Images with the labels of others would spoil the training."""
    source = Numbered(23)
    for batch in train(steps=6, crop_scale=()):
        for pixels, label in zip(batch['image'], batch['label'], strict=True):
            image = Image.open(io.BytesIO(source[int(label)].image)).resize((4, 4), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(pixels[:, :, 0], image)


def test_small_images_without_random_crops_are_decoded_once(monkeypatch):
    """Decoding small images in each epoch would be most of the host's work; large splits would fill the memory."""
    reads = []
    original = Numbered.__getitem__
    monkeypatch.setattr(Numbered, '__getitem__', lambda self, index: reads.append(index) or original(self, index))
    cached = train(23, steps=30, crop_scale=())
    assert sorted(set(reads)) == list(range(23))
    assert len(reads) <= 2 * 23, 'two threads may load an image at once, but not two epochs'
    monkeypatch.setattr(pipeline, 'CACHE_BYTES', 23 * 16 - 1)
    reads.clear()
    assert_equal(train(23, steps=30, crop_scale=()), cached)
    assert len(reads) >= 120
    monkeypatch.undo()
    assert not any((a['image'] == b['image']).all() for a, b in itertools.pairwise(train(4, steps=5))), (
        'crops are not cached'
    )


def test_order_and_crops_depend_on_the_seed():
    """A run could not be repeated, or every run would have one order."""
    assert_equal(train(steps=5), train(steps=5))
    assert labels(train(steps=5)) != labels(train(steps=5, seed=1))


def test_the_crop_of_an_example_changes_in_each_epoch():
    """One crop for all epochs would not be an augmentation."""
    crops = {}
    for batch in train(24, steps=12):
        for pixels, label in zip(batch['image'], batch['label'], strict=True):
            crops.setdefault(int(label), []).append(pixels)
    assert sum((first != second).any() for first, second in crops.values()) > 20


def test_repeated_augmentation():
    """Equal copies would not be an augmentation, and neighbouring copies would be mixed with each other by mixup."""
    batches = train(24, Share(12), steps=4, repeats=3)
    for batch in batches:
        first, second, third = batch['label'].reshape(3, 4)
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, third)
        assert len(set(first)) == 4
        copies = batch['image'].reshape(3, 4, -1)
        assert sum((copies[a] != copies[b]).any() for a, b in ((0, 1), (0, 2), (1, 2))) == 3
    assert len(set(labels(batches[:2]))) == 8, 'the number of steps in an epoch does not change'
    assert len(set(labels(batches))) > 8, 'each epoch has other images'
    assert_equal(train(24, Share(12), steps=2, start_step=2, repeats=3), batches[2:])
    with pytest.raises(UserError, match='batch_size=12 must be a multiple of data.repeats=5'):
        train(24, Share(12), steps=1, repeats=5)


@pytest.mark.parametrize('start_step', [1, 5, 12])
def test_a_step_gives_the_same_batch_wherever_the_run_starts(start_step):
    """A resumed run would use some examples twice and others never."""
    assert_equal(train(steps=3, start_step=start_step), train(steps=start_step + 3)[start_step:])


def test_a_late_step_does_not_read_the_earlier_ones():
    """A resumed ImageNet run would read earlier batches for hours."""
    batches = train(steps=2, start_step=10**9)
    assert len(set(labels(batches))) == 8


def share_of(process, processes, batch_size=4):
    """The share of a process for a mesh in the order of the processes."""
    size = batch_size // processes
    return Share(batch_size, range(process * size, (process + 1) * size))


@pytest.mark.parametrize('processes', [2, 4])
def test_several_processes_load_the_batches_of_one_process(processes):
    """A run on four hosts would differ from a run on one, or use examples twice."""
    parts = [train(steps=7, share=share_of(process, processes)) for process in range(processes)]
    joined = [
        {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        for batches in zip(*parts, strict=True)
    ]
    assert_equal(joined, train(steps=7))


def test_a_process_with_scattered_devices_loads_their_examples():
    """The best order of devices for a topology may mix the hosts, which must not change the batch."""
    scattered = train(steps=7, share=Share(4, (0, 3)))
    assert_equal(scattered, [{name: array[[0, 3]] for name, array in batch.items()} for batch in train(steps=7)])


@pytest.mark.parametrize(
    ('batch_size', 'processes'), [(1, 1), (7, 1), (23, 1), (64, 1), (1024, 1), (6, 2), (4, 4), (64, 4), (1032, 8)]
)
def test_evaluation_counts_every_example_once(batch_size, processes):
    """The accuracy would cover only a part of the split, or include padding."""
    parts = [evaluation(23, share_of(process, processes, batch_size)) for process in range(processes)]
    assert {len(part) for part in parts} == {-(-23 // batch_size)}, 'all processes have the same number of steps'
    counted = []
    for batches in zip(*parts, strict=True):
        weight, label, image = (
            np.concatenate([batch[name] for batch in batches]) for name in ('weight', 'label', 'image')
        )
        assert weight.shape == (batch_size,)
        assert set(weight) <= {0, 1}
        assert not image[weight == 0].any()
        counted += list(label[weight == 1])
    assert counted == list(range(23))


def test_evaluation_images_are_in_order():
    """Images with the labels of others would give a wrong accuracy."""
    source, batches = Numbered(23), evaluation(23, Share(8))
    for index in (0, 9, 22):
        image = Image.open(io.BytesIO(source[index].image)).resize((4, 4), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(batches[index // 8]['image'][index % 8, :, :, 0], image)


def test_prefetched_batches_are_sharded_and_complete():
    """A batch on one device would leave seven idle, and a batch that remains in the queue would not be evaluated."""
    assert jax.device_count() >= 8, 'tests/conftest.py simulates eight devices'
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()[:8]), ('data',)), PartitionSpec('data'))
    host = evaluation(40, Share(16))
    for ahead in (1, 2, 5):
        device = list(prefetch_to_device(iter(host), sharding, ahead=ahead))
        assert_equal(device, host)
        for leaf in jax.tree.leaves(device):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            assert len({shard.device for shard in leaf.addressable_shards}) == 8
            assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {2}


def test_batches_are_transferred_in_advance():
    """The device would wait at every step for the transfer of the next batch."""
    requested = []
    batches = (requested.append(step) or batch for step, batch in enumerate(evaluation(40, Share(8))))
    ours = prefetch_to_device(batches, jax.sharding.SingleDeviceSharding(jax.devices()[0]), ahead=2)
    next(ours)
    assert requested == [0, 1, 2]
    next(ours)
    assert requested == [0, 1, 2, 3]


def test_a_split_smaller_than_a_batch_is_an_error():
    """The run would wait forever for the first batch, or divide by zero."""
    assert steps_per_epoch(24, 24) == 1
    assert steps_per_epoch(47, 24) == 1
    for use in (lambda: steps_per_epoch(23, 24), lambda: train(23, Share(24), steps=1)):
        with pytest.raises(UserError, match='batch_size=24 is larger than the 23 training images: lower it'):
            use()


@pytest.mark.parametrize('crop_scale', [(0.5,), (0.0, 1.0), (0.8, 0.2), (0.5, 1.5), (0.1, 0.2, 0.3)])
def test_bad_crop_scale(crop_scale):
    """A reversed range would give crops of wrong sizes."""
    with pytest.raises(UserError, match='data.crop_scale must be two fractions of the area'):
        train(steps=1, crop_scale=crop_scale)


def test_an_image_that_cannot_be_decoded_is_named():
    """An error in a loading thread would be lost, or not name the image."""
    training = train_batches(images(8, broken=(5,)), Share(4), seed=0, start_step=0)
    evaluation = eval_batches(EvalImages(Numbered(8, broken=(5,)), 4, 1, crop_pct=1.0), Share(4))
    for batches in (training, evaluation):
        with pytest.raises(UserError, match='number 5 cannot be decoded as an image'):
            list(itertools.islice(batches, 2))


@pytest.mark.parametrize('crop_scale', [(), (0.3, 1.0)])
def test_an_unreadable_image_is_reported_and_replaced_by_the_next(crop_scale):
    """One damaged file would end a run of days, or the batch would depend on the order of loading."""
    options = {'seed': 0, 'start_step': 0}
    expected = train(1000, Share(50), steps=20, crop_scale=crop_scale)
    dataset = images(1000, broken=(5,), crop_scale=crop_scale)
    unreadable = Unreadable(dataset)
    batches = train_batches(dataset, Share(50), unreadable=unreadable, **options)
    repaired = list(itertools.islice(batches, 20))
    assert_equal(
        [{'label': np.where(batch['label'] == 5, 6, batch['label'])} for batch in expected], labels_of(repaired)
    )
    again = train_batches(dataset, Share(50), unreadable=Unreadable(dataset), **options)
    assert_equal(list(itertools.islice(again, 20)), repaired)
    assert len(unreadable) == 1
    (line,) = unreadable.new_messages()
    assert 'number 5 cannot be decoded' in line
    assert line.endswith('the next image is used instead')
    assert unreadable.new_messages() == []


def labels_of(batches):
    return [{'label': batch['label']} for batch in batches]


def test_several_unreadable_neighbours_are_all_reported():
    """In a damaged shard, only the first of several images would be named and counted."""
    dataset = images(3000, broken=(5, 6))
    unreadable = Unreadable(dataset)
    loaded = train_batches(dataset, Share(100), seed=0, start_step=0, unreadable=unreadable)
    batches = list(itertools.islice(loaded, 30))
    assert labels(batches).count(7) == 3
    assert sorted(line.split(' cannot')[0] for line in unreadable.new_messages()) == ['number 5', 'number 6']


def test_more_than_one_unreadable_image_in_a_thousand_is_an_error():
    """Training would continue on a small part of the data."""
    unreadable = Unreadable(images(2000, broken=(3, 7, 9)))
    for index in (3, 3, 7):  # an image counts once
        unreadable.add(index)
    with pytest.raises(
        UserError,
        match='number 9 cannot.* 3 of the 2000 .* more than one in a thousand: replace each',
    ):
        unreadable.add(9)


def test_the_unreadable_images_of_other_processes_count():
    """Only the main process reports, and each of 1,000 hosts alone would see too few unreadable images to stop."""
    dataset = images(2000, broken=(3, 7, 9))
    here, there = Unreadable(dataset), Unreadable(dataset)
    here.add(3)
    there.add(3)
    there.add(7)
    gathered = [here.errors(), there.errors()]
    here.merge(gathered)
    assert len(here) == 2
    assert [line.split(' cannot')[0] for line in here.new_messages()] == ['number 3', 'number 7']
    with pytest.raises(UserError, match='number 9 cannot.*3 of the 2000 training images'):
        here.add(9)
    there.merge([[(3, 'number 3 is broken'), (7, 'number 7 is broken')]])
    with pytest.raises(UserError, match='number 9 is broken. 3 of the 2000 training images'):
        there.merge([[(9, 'number 9 is broken')]])


def test_a_split_of_unreadable_images_is_an_error():
    """The search for a readable image would not end."""
    dataset = images(50, broken=range(50))
    with pytest.raises(UserError, match='number .* cannot be decoded as an image'):
        next(train_batches(dataset, Share(4), seed=0, start_step=0, unreadable=Unreadable(dataset)))


def test_the_message_for_an_image_that_is_readable_again():
    """After a short failure of a file server, the log would call the image damaged."""
    unreadable = Unreadable(images(2000))
    unreadable.add(4)
    assert unreadable.new_messages() == [
        'number 4 could not be read at the first attempt: the next image is used instead'
    ]
