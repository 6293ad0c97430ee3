"""Tar shards: search, index, random access, and error messages."""

import concurrent.futures
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
from conftest import TIMEOUT
from PIL import Image

from convnext_jax.data import shards
from convnext_jax.data.labelled_images import TrainImages
from convnext_jax.data.pipeline import Share, train_batches
from convnext_jax.data.sources import open_source
from convnext_jax.errors import UserError


def png(value=0):
    buffer = io.BytesIO()
    Image.new('RGB', (4, 4), (value, 0, 0)).save(buffer, 'PNG')
    return buffer.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def sample(key, value, label, suffix='png'):
    return [(f'{key}.{suffix}', png(value)), (f'{key}.json', b'{}'), (f'{key}.cls', str(label).encode())]


@pytest.fixture
def directory(tmp_path):
    """Two shards with three images; one label precedes its image, and one key occurs in both shards."""
    backwards = reversed(sample('deep.er/b', 2, 0, suffix='PNG'))
    write_tar(tmp_path / 'mini-train-000000.tar', [*sample('a', 1, 2), *backwards, ('a.seg.png', png(9))])
    write_tar(tmp_path / 'mini-train-000001.tar', sample('a', 3, '1\n', suffix='jpeg'))
    return tmp_path


def error_of(directory, split='train'):
    with pytest.raises(UserError) as error:
        open_source('webdataset', str(directory), split)
    assert '\n' not in str(error.value)
    return str(error.value)


def values(source):
    return [Image.open(io.BytesIO(source[i].image)).getpixel((0, 0))[0] for i in range(len(source))]


def test_images_and_labels_of_all_shards(directory):
    """Images with wrong labels, or omitted images, would spoil the training."""
    source = open_source('webdataset', str(directory), 'train')
    assert values(source) == [1, 2, 3]
    assert [source[i].label for i in range(3)] == [2, 0, 1]
    assert all(type(source[i].label) is int for i in range(3))
    assert source.class_names == ['0', '1', '2']
    assert source[2].name == f'{directory / "mini-train-000001.tar"}, a.jpeg'
    assert source[1].image == png(2)
    with pytest.raises(IndexError):
        source[3]
    batches = train_batches(TrainImages(source, 4, 3), Share(3), seed=0, start_step=0)
    assert sorted(next(batches)['label']) == [0, 1, 2]


@pytest.mark.parametrize(
    'name', ['train-0001.tar', 'imagenet-train-000001.tar', 'in1k_train_01.tar', 'train/anything.tar', 'train.0.tar']
)
def test_shards_are_found_by_their_usual_names(tmp_path, name):
    """Users would have to rename thousands of files."""
    for other in ('val-0001.tar', 'retrain-0001.tar', 'train-val-0001.tar'):
        write_tar(tmp_path / other, sample('other', 9, 9))
    write_tar(tmp_path / name, sample('a', 7, 0))
    assert values(open_source('webdataset', str(tmp_path), 'train')) == [7]


def test_class_names(directory):
    """Predictions would have numbers instead of names, or the names of other classes."""
    (directory / 'classnames.txt').write_text('ant\nbee\ncat\ndog\n')
    assert open_source('webdataset', str(directory), 'train').class_names == ['ant', 'bee', 'cat', 'dog']
    (directory / 'classnames.txt').write_text('ant\nbee\n')
    assert error_of(directory).endswith('classnames.txt has 2 class names, but train has images of class 2')


def test_the_index_is_created_once_and_again_when_a_shard_changes(directory, monkeypatch):
    """A million images would be indexed at every start, or old offsets be used in a new file."""
    open_source('webdataset', str(directory), 'train')
    (index,) = directory.glob('*.npy')
    with monkeypatch.context() as patch:
        patch.setattr(shards, 'index_shard', None)  # a call would fail
        assert values(open_source('webdataset', str(directory), 'train')) == [1, 2, 3]
    shard = directory / 'mini-train-000001.tar'
    stat = shard.stat()
    write_tar(shard, sample('longer_name', 5, 1))
    assert shard.stat().st_size == stat.st_size  # only the time differs
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    source = open_source('webdataset', str(directory), 'train')
    assert (values(source), source[2].name) == ([1, 2, 5], f'{shard}, longer_name.png')
    assert len(list(directory.glob('*.npy'))) == 1
    assert not index.exists()


def test_the_index_of_a_read_only_folder_is_in_the_cache(directory, tmp_path_factory, monkeypatch):
    """Shared data are often read-only: they could not be used, or be indexed at every start."""
    cache = tmp_path_factory.mktemp('cache')
    monkeypatch.setattr(shards, 'CACHE', cache)
    monkeypatch.setattr(
        os, 'access', lambda path, mode: False
    )  # the tests may run as root, which can write to any folder
    with pytest.warns(UserWarning, match=f'{directory} is not writable: the index of its shards is stored as {cache}'):
        source = open_source('webdataset', str(directory), 'train')
    assert values(source) == values(open_source('webdataset', str(directory), 'train')) == [1, 2, 3]  # no warning
    assert not list(directory.glob('*.npy'))


def test_a_source_can_be_used_by_processes_and_threads(directory):
    """A pickled index would take gigabytes, and a shared file position would mix up concurrent reads."""
    write_tar(directory / 'big-0.tar', [member for i in range(600) for member in sample(f'{i:04}', i % 256, i % 10)])
    source = open_source('webdataset', str(directory), 'big')
    pickled = cloudpickle.dumps(source)
    assert len(pickled) < 2000
    code = 'import pickle, sys; s = pickle.load(sys.stdin.buffer); print(len(s), s[321].label, s[321].name)'
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, '-c', code], input=pickled, cwd=root, capture_output=True, timeout=TIMEOUT)
    assert result.stdout.decode().split() == ['600', '1', f'{directory / "big-0.tar"},', '0321.png'], result.stderr
    order = np.random.default_rng(0).permutation(600)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: source[int(i)].image, order))
    assert read == [png(i % 256) for i in order]


@pytest.mark.slow
def test_several_processes_can_open_a_split_at_once(directory):
    """All processes of a pod open the data at the same time."""
    root = Path(__file__).parents[2]
    code = f"""
from convnext_jax.data.sources import open_source
source = open_source('webdataset', {str(directory)!r}, 'train')
print(len(source), source[2].label)
"""
    command = [sys.executable, '-c', code]
    processes = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=TIMEOUT)[0] for process in processes] == ['3 1\n'] * 2
    assert len(list(directory.glob('*npy*'))) == 1


@pytest.mark.parametrize(
    ('members', 'line'),
    [
        ([*sample('b', 0, 0), ('a.cls', b'1')], 'contains a.cls, but no image with this key'),
        (sample('a', 0, 'cat'), "a.cls contains b'cat', not a class number"),
        (sample('a', 0, -1), "a.cls contains b'-1', not a class number"),
        (sample('a', 0, ''), "a.cls contains b'', not a class number"),
        ([*sample('a', 0, 0), ('a.jpg', png())], 'contains a.png and a.jpg with the same key: remove one of them'),
        ([*sample('a', 0, 0), ('a.cls', b'1')], 'contains a.cls and a.cls with the same key: remove one of them'),
        (sample('a.1', 0, 1), 'a.1.cls has a dot in its key'),
        ([], 'contains no images: it needs KEY.jpg'),
        ([('a.txt', b'')], 'contains no images: it needs KEY.jpg'),
    ],
)
def test_an_invalid_shard_is_named(directory, members, line):
    """A guessed label or an omitted image would spoil the training."""
    shard = directory / 'mini-train-000001.tar'
    write_tar(shard, members)
    message = error_of(directory)
    assert str(shard) in message
    assert line in message
    assert not list(directory.glob('*npy*'))


def test_a_classifier_needs_the_class_of_each_image(directory):
    """Images without a label would train as some class."""
    shard = directory / 'mini-train-000001.tar'
    write_tar(shard, [*sample('a', 0, 0), ('b.png', png()), ('c.png', png())])
    assert error_of(directory) == (
        f'2 of 5 images of train have no .cls file, such as {shard}, b.png: a classifier needs the class of each image'
    )


@pytest.mark.parametrize('damage', ['header', 'truncated data', 'truncated header', 'no end mark', 'empty', 'gzip'])
def test_a_damaged_shard_is_named(directory, damage):
    """`tarfile` silently stops at a damaged header: half a shard would be missing in training."""
    shard = directory / 'mini-train-000000.tar'
    data = shard.read_bytes()
    second = shards.tar_members(shard)[1].offset
    shard.write_bytes(
        {
            'header': data[: second - 512] + b'\xff' * 512 + data[second:],
            'truncated data': data[: second + 1],
            'truncated header': data[: second - 300],
            'no end mark': data[: shards.tar_members(shard)[-1].offset + 512],
            'empty': b'',
            'gzip': b'\x1f\x8b' + bytes(2000),
        }[damage]
    )
    message = error_of(directory)
    assert message.startswith(str(shard))
    assert message.endswith('copy or download it again')


def test_a_shard_that_was_truncated_after_it_was_opened_is_named(directory):
    """The user could not find one damaged shard among a thousand."""
    source = open_source('webdataset', str(directory), 'train')
    shard = directory / 'mini-train-000001.tar'
    shard.write_bytes(shard.read_bytes()[:520])
    with pytest.raises(UserError, match=f'{shard} ends before byte'):
        source[2]
    shard.unlink()
    with pytest.raises(UserError, match=f'{shard} cannot be read: No such file or directory'):
        source[2]


def test_a_missing_split_is_an_error(directory):
    """The message would not say which file names are expected."""
    assert error_of(directory, 'val') == (
        f"{directory} contains no shards of split 'val' (val/*.tar or *val-NUMBER.tar): "
        'set --config.data.dir=DIR to their folder'
    )


def test_concatenated_tars_are_an_error(directory):
    """The images of the second file in `cat a.tar b.tar` would silently be ignored."""
    first, second = (directory / f'mini-train-00000{number}.tar' for number in range(2))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    assert 'continues after its end at byte' in error_of(directory)


def test_a_link_in_a_tar_is_an_error(directory):
    """GNU tar stores the second name of a file as a link: this image would silently be ignored."""
    with tarfile.open(directory / 'mini-train-000001.tar', 'a') as tar:
        link = tarfile.TarInfo('c.png')
        link.type, link.linkname = tarfile.LNKTYPE, 'a.jpeg'
        tar.addfile(link)
    assert 'c.png is a link to a.jpeg' in error_of(directory)


def test_a_damaged_index_is_created_again(directory):
    """After a full disk or a crash, users would have to find and remove a damaged index."""
    expected = values(open_source('webdataset', str(directory), 'train'))
    (index,) = directory.glob('train.index-*.npy')
    for damaged in (b'', index.read_bytes()[:40], index.read_bytes()[:-9]):
        index.write_bytes(damaged)
        assert values(open_source('webdataset', str(directory), 'train')) == expected


@pytest.mark.parametrize(
    ('text', 'line'),
    [
        (b'cat\n\ndog\n', 'line 2 is empty'),
        ('Käfer\nb\nc\n'.encode('latin-1'), 'cannot be read as UTF-8'),
        (b'cat\ndog\n', 'has 2 class names, but train has images of class 2'),
    ],
)
def test_invalid_class_names(directory, text, line):
    """An empty line would shift or add a class: the numbers would be right but the names wrong."""
    (directory / 'classnames.txt').write_bytes(text)
    assert line in error_of(directory)


def test_a_byte_order_mark_is_not_part_of_a_name(directory):
    """The first class of a file from Windows would not match."""
    (directory / 'classnames.txt').write_bytes(b'\xef\xbb\xbfcat\nd\x0cog\nowl')
    assert open_source('webdataset', str(directory), 'train').class_names == ['cat', 'd\x0cog', 'owl']


def test_a_label_that_is_not_a_class_number(directory):
    """With the number of the image in KEY.cls there would be a billion classes, which take all memory."""
    write_tar(directory / 'mini-train-000002.tar', sample('x', 1, 999_999_999))
    assert 'has an image of class 999999999' in error_of(directory)
