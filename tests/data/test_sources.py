"""Data sources: the bundled data set, folders of images, TFDS directories, and error messages."""

import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import TIMEOUT
from PIL import Image

from convnext_jax.data.labelled_images import MAX_LABELS, EvalImages
from convnext_jax.data.pipeline import Share, eval_batches
from convnext_jax.data.relabelling import check_has_classes, with_classes_of_model
from convnext_jax.data.sources import BUNDLED, open_source
from convnext_jax.errors import UserError


def write_image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('L', (2, 2), value).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes; the order of the names differs from the order of creation and of the pixel values."""
    for value, name in enumerate(['zebra/b.png', 'zebra/a.JPG', 'ant/deep/z.webp', 'ant/c.jpeg']):
        write_image(tmp_path / 'train' / name, value)
    return tmp_path


def tfds_directory(parent, name, **info):
    """A TFDS directory that TFDS does not know: a copy of the bundled data set with another name."""
    directory = parent / name / '1.0.0'
    directory.mkdir(parents=True)
    for path in BUNDLED['fashion_mnist_mini'].iterdir():
        shutil.copy(path, directory / path.name.replace('fashion_mnist_mini', name))
    path = directory / 'dataset_info.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'name': name} | info))
    return directory


def error_of(*arguments):
    with pytest.raises(UserError) as error:
        open_source(*arguments)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('name', ['folder', 'webdataset'])
def test_a_part_of_a_split(tmp_path, name):
    """A held-out part would overlap the training images, or have only the last class."""
    for label in range(4):
        for number in range(25):
            write_image(tmp_path / 'train' / f'class{label}' / f'{number}.png', 50 * label + number)
    if name == 'webdataset':
        with tarfile.open(tmp_path / 'train-0.tar', 'w') as tar:
            for label in range(4):
                for number in range(25):
                    tar.add(tmp_path / 'train' / f'class{label}' / f'{number}.png', f'{label}{number}.png')
                    info = tarfile.TarInfo(f'{label}{number}.cls')
                    info.size = 1
                    tar.addfile(info, io.BytesIO(str(label).encode()))
        shutil.rmtree(tmp_path / 'train')
    whole, most, rest = (open_source(name, str(tmp_path), split) for split in ('train', 'train[:80%]', 'train[80:]'))
    names = [[source[index].name for index in range(len(source))] for source in (whole, most, rest)]
    assert names[1:] == [[source.name(index) for index in range(len(source))] for source in (most, rest)]
    assert (len(most), len(rest)) == (80, 20)
    assert sorted(names[1] + names[2]) == sorted(names[0])
    assert {rest[index].label for index in range(20)} == {0, 1, 2, 3}
    assert most.class_names == whole.class_names
    assert 'contains none of the 100 images' in error_of(name, str(tmp_path), 'train[100:]')
    assert 'must be like train[:99%]' in error_of(name, str(tmp_path), 'train[:x]')


def test_bundled_set_is_read_without_tensorflow():
    """The demo would need a gigabyte of TensorFlow, or fail without it."""
    code = """
import sys
from convnext_jax.data.sources import open_source
for split, count in {'train': 5000, 'test': 1000}.items():
    source = open_source('fashion_mnist_mini', '', split)
    assert len(source) == count, len(source)
    assert source[count - 1].image.startswith(b'\\x89PNG')
assert 'tensorflow' not in sys.modules
"""
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 0, result.stderr


def test_bundled_set_is_balanced_and_decodes():
    """The accuracy of the demo would have another meaning."""
    source = open_source('fashion_mnist_mini', '', 'test')
    assert len(source.class_names) == 10
    examples = [source[index] for index in range(len(source))]
    np.testing.assert_array_equal(np.bincount([example.label for example in examples]), [100] * 10)
    assert isinstance(examples[0].label, int)
    assert examples[3].name == 'fashion_mnist_mini test, example 3'
    image = Image.open(io.BytesIO(examples[3].image))
    assert (image.mode, image.size) == ('L', (28, 28))


def test_a_slice_of_a_tfds_split():
    """TFDS's notation would select other images than in TFDS."""
    whole, part = (open_source('fashion_mnist_mini', '', split) for split in ('test', 'test[10:25]'))
    assert len(part) == 15
    assert [part[i].image for i in range(15)] == [whole[i].image for i in range(10, 25)]


def test_a_tfds_directory_that_tfds_does_not_know(tmp_path):
    """Users could not train on their own TFDS data sets."""
    tfds_directory(tmp_path, 'my_clothes')
    ours, bundled = open_source('my_clothes', str(tmp_path), 'test'), open_source('fashion_mnist_mini', '', 'test')
    assert ours.class_names == bundled.class_names
    assert (ours[7].image, ours[7].label) == (bundled[7].image, bundled[7].label)
    assert ours[7].name == 'my_clothes test, example 7'


@pytest.mark.parametrize('split', ['validation', 'train[:abc]', '', 'train[9000:]', 'train[:0]'])
def test_a_bad_split_is_a_user_error(split):
    """TFDS's own errors fill a screen."""
    message = error_of('fashion_mnist_mini', '', split)
    assert message.startswith(f"fashion_mnist_mini has no split '{split}' in ArrayRecord format: ")


def test_bad_tfds_names_and_directories_are_user_errors(tmp_path):
    """TFDS's own errors fill a screen."""
    assert error_of('mnist', '', 'train') == ('data.dir is not set: set --config.data.dir=DIR to the folder of mnist')
    missing = tmp_path / 'missing'
    assert error_of('mnist', str(missing), 'train') == (
        f'data.dir={missing} is not a folder: set --config.data.dir=DIR to the folder of mnist'
    )
    assert f"there is no data set 'my_clotehs' in {tmp_path}, and TFDS does not know this name" == error_of(
        'my_clotehs', str(tmp_path), 'train'
    )
    assert f'{tmp_path} does not contain mnist: prepare it' in error_of('mnist', str(tmp_path), 'train')


@pytest.mark.parametrize('name', ['', 'No Such!', 'mnist/no_such_config', 'mnist:9.9.9'])
def test_a_malformed_tfds_name_is_a_user_error(name, tmp_path):
    """A colon or a slash in data.name would cause a traceback."""
    assert name in error_of(name, str(tmp_path), 'train')


def test_tfds_data_sets_without_labels_or_array_records_are_user_errors(tmp_path):
    """For captions, or TFDS's default format TFRecord, the message would not say what is wrong."""
    tfds_directory(tmp_path, 'records', fileFormat='tfrecord')
    assert "records has no split 'train' in ArrayRecord format" in error_of('records', str(tmp_path), 'train')
    features = tfds_directory(tmp_path, 'captions') / 'features.json'
    features.write_text(features.read_text().replace('"label"', '"caption"'))
    message = error_of('captions', str(tmp_path), 'train')
    assert message == "captions has no labelled images: its features are ['caption', 'image']"


def imagenet_like(parent, name, version, split, field, labels):
    """A TFDS directory with the features of an ImageNet variant; each item of `labels` is a number or a tuple."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    directory = tfds_directory(parent, name, version=version)
    directory = directory.rename(directory.with_name(version))
    for path in directory.glob('*array_record*'):
        path.unlink()
    records = []
    for label in labels:
        buffer = io.BytesIO()
        Image.new('RGB', (4, 4)).save(buffer, 'JPEG')
        example = tf_example_pb2.Example()
        example.features.feature['image'].bytes_list.value.append(buffer.getvalue())
        example.features.feature[field].int64_list.value.extend(label if isinstance(label, tuple) else [label])
        records.append(example.SerializeToString())
    writer = ArrayRecordWriter(str(directory / f'{name}-{split}.array_record-00000-of-00001'), 'group_size:1')
    for record in records:
        writer.write(record)
    writer.close()
    kind = {
        'classLabel': {'numClasses': '10'},
        'pythonClassName': 'tensorflow_datasets.core.features.class_label_feature.ClassLabel',
    }
    if isinstance(labels[0], tuple):
        kind = {
            'sequence': {'feature': kind, 'length': '-1'},
            'pythonClassName': 'tensorflow_datasets.core.features.sequence_feature.Sequence',
        }
    path = directory / 'features.json'
    features = json.loads(path.read_text())
    columns = features['featuresDict']['features']
    del columns['label']
    columns['image']['image'] = {'dtype': 'uint8', 'encodingFormat': 'jpeg', 'shape': {'dimensions': ['-1', '-1', '3']}}
    columns[field] = kind
    path.write_text(json.dumps(features))
    path = directory / 'dataset_info.json'
    info = json.loads(path.read_text())
    lengths = [str(len(records))]
    info['splits'] = [info['splits'][0] | {'name': split, 'shardLengths': lengths, 'numBytes': '1000'}]
    path.write_text(json.dumps(info))


def test_images_with_several_labels_or_none(tmp_path):
    """On ImageNet-ReaL the accuracy would include images without a label."""
    imagenet_like(tmp_path, 'imagenet2012_real', '1.0.0', 'validation', 'real_label', [(3,), (), (1, 7, 2)])
    source = open_source('imagenet2012_real', str(tmp_path), 'validation')
    assert [source[index].label for index in range(3)] == [(3,), (), (1, 7, 2)]
    (batch,) = eval_batches(EvalImages(source, 4, 3, crop_pct=1.0), Share(4))
    assert batch['label'].shape == (4, MAX_LABELS)
    assert [[label for label in labels if label >= 0] for labels in batch['label'].tolist()[:3]] == [[3], [], [1, 7, 2]]
    np.testing.assert_array_equal(batch['weight'], [1, 0, 1, 0])


def test_imagenet_a_and_r_are_evaluated_on_their_classes(tmp_path):
    """Their accuracy would not be comparable; a slice must use the classes of the whole split."""
    imagenet_like(tmp_path, 'imagenet_a', '0.1.0', 'test', 'label', [5, 2, 5, 9])
    imagenet_like(tmp_path, 'my_photos', '1.0.0', 'test', 'label', [5, 2, 5, 9])
    assert open_source('imagenet_a', str(tmp_path), 'test[:1]').eval_classes == (2, 5, 9)
    assert open_source('my_photos', str(tmp_path), 'test').eval_classes is None


def test_labels_are_in_the_order_of_the_class_names(folder):
    """In the order of the file system, labels would differ from machine to machine."""
    source = open_source('folder', str(folder), 'train')
    assert source.class_names == ['ant', 'zebra']
    root = folder / 'train'
    files = ['ant/c.jpeg', 'ant/deep/z.webp', 'zebra/a.JPG', 'zebra/b.png']
    examples = [source[index] for index in range(len(source))]
    assert [(example.name, example.label) for example in examples] == [
        (str(root / name), int(name.startswith('zebra'))) for name in files
    ]
    assert all(example.image == (root / name).read_bytes() for example, name in zip(examples, files, strict=True))
    with pytest.raises(IndexError):
        source[4]


def test_a_folder_warns_of_files_that_are_left_out(folder):
    """Images in an unsupported format would silently be ignored."""
    (folder / 'train/ant/d.heic').write_bytes(b'')
    (folder / 'train/zebra/._a.JPG').write_bytes(b'Mac OS X')
    (folder / 'train/classes.txt').write_text('ant, zebra')
    (folder / 'train/.cache').mkdir()
    with pytest.warns(UserWarning, match='left out: ') as caught:
        assert len(open_source('folder', str(folder), 'train')) == 4
    (warning,) = caught
    assert str(warning.message) == (
        f'{folder / "train"}: left out: .heic files (1), files beside the class folders (1), '
        'hidden entries beside the class folders (1), hidden files (1)'
    )


def test_a_split_with_one_class_is_an_error(folder):
    """If the classes are one folder deeper, the loss would be 0 and the accuracy 100 % from the first step."""
    check_has_classes(open_source('folder', str(folder), 'train'), 'train')
    (folder / 'deep').mkdir()
    (folder / 'train').rename(folder / 'deep' / 'images')
    source = open_source('folder', str(folder), 'deep')
    with pytest.raises(UserError, match='^deep has one class, .images.: a classifier needs two or more') as error:
        check_has_classes(source, 'deep')
    hint = f'if they are the classes, move them to {folder / "deep"}, or train with the split deep/images'
    assert str(error.value).endswith(f'. {folder / "deep" / "images"} contains the folders ant, zebra: {hint}')
    assert open_source('folder', str(folder), 'deep/images').class_names == ['ant', 'zebra']  # the hint works
    with pytest.raises(UserError, match='or train with the split deep/images'):
        with_classes_of_model(source, ['ant', 'zebra'], 2)


def labels(source):
    return [source[index].label for index in range(len(source))]


def test_labels_are_matched_to_the_class_names_of_the_model(folder):
    """Matched by position, a test set without the first class would have an accuracy of 0 %."""
    source = open_source('folder', str(folder), 'train')
    assert with_classes_of_model(source, ['ant', 'zebra'], 2) == (source, '')
    renamed, note = with_classes_of_model(source, ['zebra', 'bee', 'ant'], 5)
    assert (labels(renamed), note) == ([2, 2, 0, 0], '')
    assert renamed.class_names == ['zebra', 'bee', 'ant']
    assert (len(renamed), renamed.name(0), renamed[0].image) == (4, source.name(0), source[0].image)
    assert labels(pickle.loads(pickle.dumps(renamed))) == [2, 2, 0, 0]
    with pytest.raises(UserError, match='^the model lacks these classes: ant$'):
        with_classes_of_model(source, ['bee', 'zebra'], 2)
    unchanged, note = with_classes_of_model(source, None, 2)
    assert unchanged is source
    assert note.startswith(
        'classes are matched by position, class 0 (ant) to output 0, because the weights have no class names'
    )


def test_relabelled_examples_with_several_labels(tmp_path):
    """ImageNet-ReaL and ImageNet-A could not be used with models that have another order of classes."""
    imagenet_like(tmp_path, 'imagenet2012_real', '1.0.0', 'validation', 'real_label', [(3,), (), (1, 7, 2)])
    imagenet_like(tmp_path, 'imagenet_a', '0.1.0', 'test', 'label', [5, 2, 5, 9])
    real = open_source('imagenet2012_real', str(tmp_path), 'validation')
    backwards = list(reversed([f'class {label}' for label in range(10)]))
    real.class_names = list(reversed(backwards))
    assert labels(with_classes_of_model(real, backwards, 10)[0]) == [(6,), (), (8, 2, 7)]
    some = open_source('imagenet_a', str(tmp_path), 'test')
    some.class_names = real.class_names
    assert with_classes_of_model(some, backwards, 10)[0].eval_classes == (0, 4, 7)


def test_broken_links_in_a_folder(folder):
    """Images on a disk that is not mounted would silently be ignored."""
    (folder / 'train/ant/lost.jpg').symlink_to(folder / 'unmounted.jpg')
    source = open_source('folder', str(folder), 'train')
    assert len(source) == 5
    with pytest.raises(UserError, match='ant/lost.jpg cannot be read: No such file or directory'):
        [source[index] for index in range(5)]
    (folder / 'train/.#lock').symlink_to('nobody@nowhere')  # a lock file of an editor
    with pytest.warns(UserWarning, match=r'hidden entries beside the class folders \(1\)'):
        assert len(open_source('folder', str(folder), 'train')) == 5
    (folder / 'train/.#lock').unlink()
    (folder / 'train/cat').symlink_to(folder / 'unmounted')
    assert (
        error_of('folder', str(folder), 'train')
        == f'{folder / "train"} contains broken links: cat. Remove or repair them'
    )


def test_the_errors_of_a_folder_name_it(folder):
    """The user could not find the problem."""
    assert error_of('folder', str(folder), 'val').startswith(
        f'{folder / "val"} is not a folder: set --config.data.dir=DIR'
    )
    (folder / 'val').mkdir()
    write_image(folder / 'val/loose.png')
    assert error_of('folder', str(folder), 'val').startswith(f'{folder / "val"} contains no folders')
    (folder / 'train/bee').mkdir()
    assert error_of('folder', str(folder), 'train').startswith(
        f'class folder {folder / "train/bee"} contains no images'
    )


def test_a_file_that_cannot_be_read_is_named(folder):
    """The user could not find one missing file among a million."""
    source = open_source('folder', str(folder), 'train')
    (folder / 'train/zebra/b.png').unlink()
    with pytest.raises(UserError, match='train/zebra/b.png cannot be read: No such file or directory'):
        source[3]
