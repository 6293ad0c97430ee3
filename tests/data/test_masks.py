"""Folders of images and masks: which files belong together, and error messages."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convnext_jax import __main__ as package_command
from convnext_jax.data.masks import open_masks
from convnext_jax.data.prepare import prepare_masks
from convnext_jax.errors import UserError
from tests.reference.cases import SAMPLE


def write(path, value=0, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB' if path.suffix == '.jpg' else 'L', size, value).save(path)


@pytest.fixture
def folders(tmp_path):
    """Four images with masks in two splits, in the layout of ADE20K."""
    for split, names in {'training': ('b', 'a', 'deep/c'), 'validation': ('d',)}.items():
        for name in names:
            write(tmp_path / 'images' / split / f'{name}.jpg')
            write(tmp_path / 'annotations' / split / f'{name}.png', ord(name[-1]) - ord('a'))
    (tmp_path / 'classes.txt').write_text('wall\nsky\ncar\ntree\n')
    return tmp_path


def error_of(folder, split='training', **options):
    with pytest.raises(UserError) as error:
        open_masks('masks', str(folder), split, **options)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_each_image_has_the_mask_of_its_name(folders):
    """Images would be trained with the masks of other images."""
    source = open_masks('masks', str(folders), 'training')
    assert [Path(source.name(index)).name for index in range(len(source))] == ['a.jpg', 'b.jpg', 'c.jpg']
    for index in range(3):
        example = source[index]
        assert example.image_name == source.name(index)
        assert (source.classes.labels(example.mask, example.mask_name) == index).all()
        assert example.image == Path(example.image_name).read_bytes()


def test_two_folders_with_other_names_and_without_splits(folders):
    """Data sets in other layouts would have to be moved."""
    for name in ('images', 'annotations'):
        (folders / name / 'training').rename(folders / f'my {name}')
    options = {'image_dir': 'my images', 'mask_dir': str(folders / 'my annotations')}
    source = open_masks('masks', str(folders), 'images', **options)
    train, held_out = (open_masks('masks', str(folders), f'images[{part}]', **options) for part in (':67%', '67%:'))
    names = [{part.name(index) for index in range(len(part))} for part in (source, train, held_out)]
    assert (len(source), len(train), len(held_out)) == (3, 2, 1)
    assert names[1] | names[2] == names[0]


def test_the_list_of_classes_may_be_anywhere(folders):
    """A data set in a folder that is not writable could not be used."""
    (folders / 'classes.txt').rename(folders / 'names.txt')
    assert 'no list of classes' in error_of(folders)
    source = open_masks('masks', str(folders), 'training', classes=str(folders / 'names.txt'))
    assert source.classes.names == ('wall', 'sky', 'car', 'tree')


def test_ade20k_as_it_is_downloaded():
    """The benchmark's files would have to be changed first."""
    source = open_masks('masks', str(SAMPLE), 'validation', reduce_zero_label=True)
    assert len(source.classes.names) == 150
    assert source.classes.names[:4] == ('wall', 'building', 'sky', 'floor')
    labels = source.classes.labels(source[0].mask, 'mask')
    with Image.open(source[0].mask_name) as mask:
        np.testing.assert_array_equal(labels, np.asarray(mask) - 1)  # 0 − 1 is 255 in uint8


def test_a_missing_counterpart_is_named(folders):
    """A typing error in one name would be found after hours of training, or never."""
    (folders / 'annotations' / 'training' / 'a.png').unlink()
    message = error_of(folders)
    assert message.startswith('1 of the 3 images have no mask in')
    assert str(folders / 'images' / 'training' / 'a.jpg') in message
    write(folders / 'annotations' / 'training' / 'a.png')
    write(folders / 'annotations' / 'training' / 'x.png')
    message = error_of(folders)
    assert message.startswith('1 of the 4 masks have no image in')
    assert str(folders / 'annotations' / 'training' / 'x.png') in message


def test_two_images_for_one_mask_are_refused(folders):
    """One of them would be ignored."""
    write(folders / 'images' / 'training' / 'a.png')
    assert 'differ in their suffix only' in error_of(folders)


def test_missing_folders_are_explained(folders):
    """The user would not know which option names the folder."""
    assert 'is not a folder: set --config.data.dir=DIR' in error_of(folders, 'train')
    assert error_of(folders, mask_dir='masks').startswith(f'{folders / "masks"} is not a folder')
    assert error_of(folders / 'nowhere').startswith(f'{folders / "nowhere" / "images"} is not a folder')
    (folders / 'images' / 'empty').mkdir()
    assert 'contains no images' in error_of(folders, 'empty')


def test_a_mask_that_was_removed_is_named(folders):
    """The run would end with the traceback of an OSError."""
    source = open_masks('masks', str(folders), 'training')
    (folders / 'annotations' / 'training' / 'a.png').unlink()
    with pytest.raises(UserError, match=r'a\.png cannot be read: No such file'):
        source[0]


def test_scene_parse150_of_tfds_is_refused():
    """It looks like the benchmark, but its masks have other classes."""
    with pytest.raises(UserError, match='100 kinds of instances'):
        open_masks('scene_parse150', '/data', 'train')


def test_a_prepared_data_set_has_the_same_examples(folders, tmp_path):
    """Training from large files would use other images, masks or classes."""
    (folders / 'classes.txt').write_text('sky\ncar\ntree\n')
    flags = (f'--manual_dir={folders}', f'--data_dir={tmp_path / "data"}', '--name=streets', '--reduce_zero_label')
    package_command.main(['convnext_jax', 'prepare', 'masks', *flags])
    for split, count in {'training': 3, 'validation': 1}.items():
        original = open_masks('masks', str(folders), split, reduce_zero_label=True)
        prepared = open_masks('streets', str(tmp_path / 'data'), split, reduce_zero_label=True)
        prepared = pickle.loads(pickle.dumps(prepared))
        assert len(prepared) == count
        assert prepared.classes == original.classes
        pairs = ({example[:2] for example in map(source.__getitem__, range(count))} for source in (original, prepared))
        assert next(pairs) == next(pairs)
    example = open_masks('streets', str(tmp_path / 'data'), 'training[:34%]', reduce_zero_label=True)[0]
    assert example.mask_name.startswith('mask of streets training[:34%], example 0 (')
    with pytest.raises(UserError, match=r'with reduce_zero_label=True: set data\.reduce_zero_label=True'):
        open_masks('streets', str(tmp_path / 'data'), 'training')


def test_preparing_explains_what_is_missing(folders, tmp_path):
    """Hours of writing would end with an unusable data set, or the user would not know what to do."""

    def message(name='streets', **options):
        with pytest.raises(UserError) as error:
            prepare_masks(folders, tmp_path / 'data', name, **options)
        return str(error.value)

    assert '--name=masks is the name of another data set' in message('masks')
    assert '--image_dir' in message(image_dir='pictures')
    assert 'no folders of equal names' in message(mask_dir='images/training')
    (folders / 'annotations' / 'validation' / 'd.png').unlink()
    write(folders / 'annotations' / 'validation' / 'e.png')
    assert 'have no mask' in message()
    assert not (tmp_path / 'data').exists()


def test_a_data_set_without_masks_is_refused():
    """The error would be a KeyError in the first batch."""
    with pytest.raises(UserError, match='fashion_mnist_mini has no masks'):
        open_masks('fashion_mnist_mini', '', 'train')
