"""Where examples come from: the bundled set, a folder of images, a TFDS directory, and what errors say."""

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
from conftest import LONGEST
from PIL import Image

from convnext_jax.data.labelled_images import MAX_LABELS, EvalImages
from convnext_jax.data.pipeline import Share, eval_batches
from convnext_jax.data.sources import BUNDLED, check_has_classes, open_source, with_classes_of_model
from convnext_jax.errors import UserError


def write_image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('L', (2, 2), value).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes; the names' order is neither the order of creation nor of the values."""
    for value, name in enumerate(['zebra/b.png', 'zebra/a.JPG', 'ant/deep/z.webp', 'ant/c.jpeg']):
        write_image(tmp_path / 'train' / name, value)
    return tmp_path


def tfds_directory(parent, name, **info):
    """A TFDS directory of one's own: the bundled set under another name."""
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
def test_a_part_can_be_held_out(tmp_path, name):
    """A minival that overlaps the training images, or holds the last class alone, measures nothing."""
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
    assert 'holds none of the 100 images' in error_of(name, str(tmp_path), 'train[100:]')
    assert 'is not as train[:99%]' in error_of(name, str(tmp_path), 'train[:x]')


def test_bundled_set_is_read_without_tensorflow():
    """The first command of the README would need a gigabyte of TensorFlow, or fail without it."""
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
    result = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True, timeout=LONGEST)
    assert result.returncode == 0, result.stderr


def test_bundled_set_is_balanced_and_decodes():
    """The demo's accuracy would mean something else."""
    source = open_source('fashion_mnist_mini', '', 'test')
    assert len(source.class_names) == 10
    examples = [source[index] for index in range(len(source))]
    np.testing.assert_array_equal(np.bincount([example.label for example in examples]), [100] * 10)
    assert isinstance(examples[0].label, int)
    assert examples[3].name == 'fashion_mnist_mini test, example 3'
    image = Image.open(io.BytesIO(examples[3].image))
    assert (image.mode, image.size) == ('L', (28, 28))


def test_split_may_be_a_slice():
    whole, part = (open_source('fashion_mnist_mini', '', split) for split in ('test', 'test[10:25]'))
    assert len(part) == 15
    assert [part[i].image for i in range(15)] == [whole[i].image for i in range(10, 25)]


def test_tfds_directory_of_one_s_own(tmp_path):
    """Users' data sets are known to no TFDS release."""
    tfds_directory(tmp_path, 'my_clothes')
    ours, bundled = open_source('my_clothes', str(tmp_path), 'test'), open_source('fashion_mnist_mini', '', 'test')
    assert ours.class_names == bundled.class_names
    assert (ours[7].image, ours[7].label) == (bundled[7].image, bundled[7].label)
    assert ours[7].name == 'my_clothes test, example 7'


@pytest.mark.parametrize('split', ['validation', 'train[:abc]', '', 'train[9000:]', 'train[:0]'])
def test_bad_split_is_one_line(split):
    message = error_of('fashion_mnist_mini', '', split)
    assert message.startswith(f"fashion_mnist_mini has no split '{split}' in ArrayRecord form: ")


def test_bad_tfds_names_and_directories_are_one_line(tmp_path):
    """TFDS's own errors fill a screen."""
    assert error_of('mnist', '', 'train') == (
        'data.dir is not set: say with --config.data.dir=DIR where mnist is on this machine'
    )
    missing = tmp_path / 'missing'
    assert error_of('mnist', str(missing), 'train') == (
        f'data.dir={missing} is not a folder: say with --config.data.dir=DIR where mnist is on this machine'
    )
    assert f"TFDS knows no data set 'my_clotehs', and there is none of that name in {tmp_path}" == error_of(
        'my_clotehs', str(tmp_path), 'train'
    )
    assert f'{tmp_path} holds no prepared mnist: prepare it' in error_of('mnist', str(tmp_path), 'train')


@pytest.mark.parametrize('name', ['', 'No Such!', 'mnist/no_such_config', 'mnist:9.9.9'])
def test_malformed_tfds_name_is_one_line(name, tmp_path):
    """A colon or a slash in data.name ends in a traceback."""
    assert name in error_of(name, str(tmp_path), 'train')


def test_tfds_set_that_is_no_image_classification_or_no_array_record(tmp_path):
    """A set of captions, or one prepared with TFDS's default of TFRecord, must say what is wrong."""
    tfds_directory(tmp_path, 'records', fileFormat='tfrecord')
    assert "records has no split 'train' in ArrayRecord form" in error_of('records', str(tmp_path), 'train')
    features = tfds_directory(tmp_path, 'captions') / 'features.json'
    features.write_text(features.read_text().replace('"label"', '"caption"'))
    message = error_of('captions', str(tmp_path), 'train')
    assert message == "captions is no image classification: its features are ['caption', 'image']"


def imagenet_like(parent, name, version, split, field, labels):
    """A TFDS directory with the features of an ImageNet: one image for each of `labels`, a number or several."""
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


def test_images_of_several_labels_or_none(tmp_path):
    """ImageNet ReaL: an image without a label that people agreed on does not count."""
    imagenet_like(tmp_path, 'imagenet2012_real', '1.0.0', 'validation', 'real_label', [(3,), (), (1, 7, 2)])
    source = open_source('imagenet2012_real', str(tmp_path), 'validation')
    assert [source[index].label for index in range(3)] == [(3,), (), (1, 7, 2)]
    (batch,) = eval_batches(EvalImages(source, 4, 3, crop_pct=1.0), Share(4))
    assert batch['label'].shape == (4, MAX_LABELS)
    assert [[label for label in row if label >= 0] for row in batch['label'].tolist()[:3]] == [[3], [], [1, 7, 2]]
    np.testing.assert_array_equal(batch['weight'], [1, 0, 1, 0])


def test_imagenet_a_and_r_are_judged_among_their_classes(tmp_path):
    """A slice is judged among those of the whole split."""
    imagenet_like(tmp_path, 'imagenet_a', '0.1.0', 'test', 'label', [5, 2, 5, 9])
    imagenet_like(tmp_path, 'my_photos', '1.0.0', 'test', 'label', [5, 2, 5, 9])
    assert open_source('imagenet_a', str(tmp_path), 'test[:1]').judged == (2, 5, 9)
    assert open_source('my_photos', str(tmp_path), 'test').judged is None


def test_folder_is_sorted_and_labelled_by_class_name(folder):
    """Labels that follow the file system's order differ from machine to machine: checkpoints lose their classes."""
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


def test_folder_warns_of_files_that_it_leaves_out(folder):
    """Images in a format that is not read would vanish from training unseen."""
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


def test_a_set_with_one_class_teaches_nothing(folder):
    """The loss is 0 and the accuracy 100 % from the first step where the classes lie one folder deeper."""
    check_has_classes(open_source('folder', str(folder), 'train'), 'train')
    (folder / 'deep').mkdir()
    (folder / 'train').rename(folder / 'deep' / 'images')
    source = open_source('folder', str(folder), 'deep')
    with pytest.raises(UserError, match='^deep has one class, .images., and a classifier needs two or more') as error:
        check_has_classes(source, 'deep')
    hint = f'if they are the classes, move them up into {folder / "deep"}, or train with the split deep/images'
    assert str(error.value).endswith(f'. {folder / "deep" / "images"} holds the folders ant, zebra: {hint}')
    assert open_source('folder', str(folder), 'deep/images').class_names == ['ant', 'zebra']  # the hint is true
    with pytest.raises(UserError, match='or train with the split deep/images'):
        with_classes_of_model(source, ['ant', 'zebra'], 2)


def labels(source):
    return [source[index].label for index in range(len(source))]


def test_labels_follow_the_model_s_class_names(folder):
    """A test set without the first class scored 0 % where labels were numbered by position."""
    source = open_source('folder', str(folder), 'train')
    assert with_classes_of_model(source, ['ant', 'zebra'], 2) == (source, '')
    renamed, note = with_classes_of_model(source, ['zebra', 'bee', 'ant'], 5)
    assert (labels(renamed), note) == ([2, 2, 0, 0], '')
    assert renamed.class_names == ['zebra', 'bee', 'ant']
    assert (len(renamed), renamed.name(0), renamed[0].image) == (4, source.name(0), source[0].image)
    assert labels(pickle.loads(pickle.dumps(renamed))) == [2, 2, 0, 0]
    with pytest.raises(UserError, match='^the model lacks these classes: ant$'):
        with_classes_of_model(source, ['bee', 'zebra'], 2)
    same, note = with_classes_of_model(source, None, 2)
    assert same is source
    assert note.startswith(
        'classes are matched by position, class 0 (ant) to output 0: the weights have no class names'
    )


def test_relabelled_examples_of_several_labels(tmp_path):
    """ImageNet ReaL and ImageNet-A on a model whose classes stand in another order."""
    imagenet_like(tmp_path, 'imagenet2012_real', '1.0.0', 'validation', 'real_label', [(3,), (), (1, 7, 2)])
    imagenet_like(tmp_path, 'imagenet_a', '0.1.0', 'test', 'label', [5, 2, 5, 9])
    real = open_source('imagenet2012_real', str(tmp_path), 'validation')
    backwards = list(reversed([f'class {label}' for label in range(10)]))
    real.class_names = list(reversed(backwards))
    assert labels(with_classes_of_model(real, backwards, 10)[0]) == [(6,), (), (8, 2, 7)]
    some = open_source('imagenet_a', str(tmp_path), 'test')
    some.class_names = real.class_names
    assert with_classes_of_model(some, backwards, 10)[0].judged == (0, 4, 7)


def test_folder_keeps_links_that_lead_nowhere(folder):
    """Images on a disk that is not mounted would vanish from training unseen."""
    (folder / 'train/ant/lost.jpg').symlink_to(folder / 'unmounted.jpg')
    source = open_source('folder', str(folder), 'train')
    assert len(source) == 5
    with pytest.raises(UserError, match='ant/lost.jpg cannot be read: No such file or directory'):
        [source[index] for index in range(5)]
    (folder / 'train/.#lock').symlink_to('nobody@nowhere')  # as editors leave them
    with pytest.warns(UserWarning, match=r'hidden entries beside the class folders \(1\)'):
        assert len(open_source('folder', str(folder), 'train')) == 5
    (folder / 'train/.#lock').unlink()
    (folder / 'train/cat').symlink_to(folder / 'unmounted')
    assert error_of('folder', str(folder), 'train') == f'{folder / "train"} has links that lead nowhere: cat'


def test_folder_errors_name_the_folder(folder):
    assert error_of('folder', str(folder), 'val').startswith(f'{folder / "val"} is not a folder: data.dir holds one')
    (folder / 'val').mkdir()
    write_image(folder / 'val/loose.png')
    assert error_of('folder', str(folder), 'val').startswith(f'{folder / "val"} holds no folders')
    (folder / 'train/bee').mkdir()
    assert error_of('folder', str(folder), 'train').startswith(f'class folder {folder / "train/bee"} holds no images')


def test_file_that_cannot_be_read_is_named(folder):
    """One lost file among a million must be found by the message alone."""
    source = open_source('folder', str(folder), 'train')
    (folder / 'train/zebra/b.png').unlink()
    with pytest.raises(UserError, match='train/zebra/b.png cannot be read: No such file or directory'):
        source[3]
