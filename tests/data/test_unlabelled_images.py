"""Images without labels: flat folders, nested folders, tar shards, and labelled sources."""

import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from convnext_jax.data.labelled_images import EvalImages, TrainImages
from convnext_jax.data.unlabelled_images import UnlabelledImages, open_images
from convnext_jax.errors import UserError


@pytest.fixture
def photos(tmp_path):
    """Ten images, some straight in the folder and some in folders of it, and a split."""
    for number in range(10):
        folder = tmp_path / ['.', 'holiday', 'holiday/beach', 'train'][number % 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40, 40), (20 * number, 0, 0)).save(folder / f'{number}.png')
    return tmp_path


def reds(source):
    images = UnlabelledImages(EvalImages(source, 32, 3, crop_pct=1.0), numbered=True)
    examples = [images.load(index) for index in range(len(images))]
    assert [example['index'] for example in examples] == list(range(len(images)))
    assert all(
        {name: (x.shape, x.dtype) for name, x in example.items()}
        == {name: (x.shape, x.dtype) for name, x in images.features.items()}
        for example in examples
    )
    return sorted(int(example['image'][0, 0, 0]) // 20 for example in examples)


def test_a_folder_of_images_needs_no_folders_for_classes_or_splits(photos):
    """Photographs to pre-train on are seldom sorted."""
    assert reds(open_images('folder', str(photos), 'images')) == list(range(10))
    assert reds(open_images('folder', str(photos), 'train')) == [3, 7]
    parts = [reds(open_images('folder', str(photos), f'images[{part}]')) for part in (':80%', '80%:')]
    assert [len(part) for part in parts] == [8, 2]
    assert sorted(parts[0] + parts[1]) == list(range(10))


def test_a_missing_split_is_refused_with_what_to_give_instead(photos, tmp_path):
    """A typing error must not train on every image below the folder."""
    with pytest.raises(UserError, match=r'validation is not a folder: .*--config.data.train_split=images\[:95%\]'):
        open_images('folder', str(photos), 'validation')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'notes.txt').write_text('nothing')
    with pytest.raises(UserError, match=r'empty contains no images; left out: .txt files \(1\)'):
        open_images('folder', str(photos), 'empty')


def test_tar_shards_need_no_labels(photos, tmp_path):
    """Shards of web images rarely have .cls files, so users would have to add labels that pre-training ignores."""
    with tarfile.open(tmp_path / 'web-train-0000.tar', 'w') as tar:
        for number in range(10):
            (path,) = photos.rglob(f'{number}.png')
            tar.add(path, f'{number:04}.png')
    (tmp_path / '0003.cls').write_text('7')
    with tarfile.open(tmp_path / 'web-train-0000.tar', 'a') as tar:
        tar.add(tmp_path / '0003.cls', '0003.cls')
    source = open_images('webdataset', str(tmp_path), 'train')
    assert reds(pickle.loads(pickle.dumps(source))) == list(range(10))
    assert source.name(4) == f'{tmp_path / "web-train-0000.tar"}, 0004.png'
    parts = [reds(open_images('webdataset', str(tmp_path), f'train[{part}]')) for part in (':80%', '80%:')]
    assert sorted(parts[0] + parts[1]) == list(range(10))


def test_labels_of_a_labelled_source_are_left_out(photos):
    """One set of arrays whatever the source: the compiled step does not depend on it."""
    source = open_images('fashion_mnist_mini', '', 'train[:5]')
    images = UnlabelledImages(TrainImages(source, 32, 1, crop_scale=(0.2, 1.0)))
    assert images.random
    assert images.load(0, (1, 2)).keys() == images.features.keys() == {'image'}
    assert np.any(images.load(0, (1, 2))['image'] != images.load(0, (1, 3))['image'])
    unlabelled = UnlabelledImages(
        TrainImages(open_images('folder', str(photos), 'images'), 32, 3, crop_scale=(0.2, 1.0))
    )
    assert pickle.loads(pickle.dumps(unlabelled)).load(9, (0,))['image'].shape == (32, 32, 3)


def test_an_image_that_cannot_be_read_is_named(photos):
    """The check before the first step finds it, without decoding all of it."""
    (photos / '0.png').write_bytes(b'\x89PNG damaged')
    images = UnlabelledImages(EvalImages(open_images('folder', str(photos), 'images'), 32, 3, crop_pct=1.0))
    (index,) = (index for index in range(10) if images.name(index).endswith('/0.png'))
    with pytest.raises(UserError, match=r'/0\.png'):
        images.check(index)
