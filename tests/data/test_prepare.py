"""The `prepare` command: complete data sets for TFDS from the official tar files and from folders."""

import collections
import fcntl
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import TIMEOUT
from PIL import Image as Picture

from convnext_jax import __main__ as package_command
from convnext_jax.data import dataset_writer
from convnext_jax.data.dataset_writer import Image, write_dataset
from convnext_jax.data.prepare import prepare_folder, prepare_imagenet2012
from convnext_jax.data.sources import open_source
from convnext_jax.errors import UserError

ROOT = Path(__file__).parents[2]
SYNSETS = ['n01440764', 'n01443537', 'n15075141']  # classes 0, 1 and 999
VALIDATION = {1: 65, 2: 970, 3: 230, 50000: 355}  # the classes of some validation images


def jpeg(value):
    buffer = io.BytesIO()
    Picture.new('L', (8, 8), value).save(buffer, 'JPEG')
    return buffer.getvalue()


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def tars(tmp_path):
    """Small versions of the official tar files: three classes of five images, and four validation images, unordered."""
    folder = tmp_path / 'tars'
    folder.mkdir()
    inner = {
        f'{synset}.tar': tar_of({f'{synset}_{i}.JPEG': jpeg(20 * c + i) for i in range(5)})
        for c, synset in enumerate(SYNSETS)
    }
    (folder / 'ILSVRC2012_img_train.tar').write_bytes(tar_of(inner))
    validation = {f'ILSVRC2012_val_{number:08}.JPEG': jpeg(number % 200) for number in reversed(VALIDATION)}
    (folder / 'ILSVRC2012_img_val.tar').write_bytes(tar_of(validation))
    return folder


@pytest.fixture
def folder(tmp_path):
    """Two splits of two classes with 30 + 4 images, in several formats, and with names that are not ASCII."""
    root = tmp_path / 'photos'
    for split, count in {'train': 15, 'val': 2}.items():
        for c, name in enumerate(['ant hill', 'żubr']):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f'{i} é.jpg').write_bytes(jpeg(100 * c + i))
    Picture.new('RGB', (3, 3)).save(root / 'train' / 'żubr' / '0 é.jpg', 'PNG')
    return root


def prepared(tmp_path, name, split):
    source = open_source(name, str(tmp_path / 'data'), split)
    return source, [source[i] for i in range(len(source))]


def error_of(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_imagenet_by_the_command(commands, tars, tmp_path):
    """A wrong label or byte would be found after weeks of training, or never."""
    flags = (f'--manual_dir={tars}', f'--data_dir={tmp_path / "data"}')
    done = commands.run('-m', 'convnext_jax', 'prepare', 'imagenet2012', *flags)
    directory = tmp_path / 'data' / 'imagenet2012' / '5.1.0'
    line = f'{directory} holds train 15, validation 4 images'
    assert done.stdout == f'{line}\n'
    assert done.stderr.splitlines() == [
        f'warning: {tars / "ILSVRC2012_img_train.tar"} contains 15 images, but the official file contains 1,281,167',
        f'warning: {tars / "ILSVRC2012_img_val.tar"} contains 4 images, but the official file contains 50,000',
    ]
    source, examples = prepared(tmp_path, 'imagenet2012', 'train')
    assert len(source.class_names) == 1000
    assert {(source.class_names[example.label], example.image) for example in examples} == {
        (synset, jpeg(20 * c + i)) for c, synset in enumerate(SYNSETS) for i in range(5)
    }
    assert {(example.label, example.image) for example in prepared(tmp_path, 'imagenet2012', 'validation')[1]} == {
        (label, jpeg(number % 200)) for number, label in VALIDATION.items()
    }
    assert len(prepared(tmp_path, 'imagenet2012', 'train[:60%]')[1]) == 9
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    again = commands.run('-m', 'convnext_jax', 'prepare', 'imagenet2012', *flags)
    assert again.stdout == f'{line}: already prepared (remove it to prepare it again)\n'
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_imagenet_equals_the_data_set_that_tfds_prepares(tars, tmp_path):
    """Users of TFDS would get other features, other class numbers, or other images in 'train[:10%]'."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.hashing import Hasher

    prepare_imagenet2012(tars, tmp_path / 'data')
    builder = tfds.builder('imagenet2012', data_dir=tmp_path / 'data')
    theirs = tfds.builder('imagenet2012', data_dir=tmp_path / 'nowhere')  # the definition in TFDS
    assert builder.info.features.to_json() == theirs.info.features.to_json()
    assert builder.info.features['label'].names == theirs.info.features['label'].names
    assert (builder.info.version, builder.info.supervised_keys) == (theirs.info.version, theirs.info.supervised_keys)
    names = [record['file_name'].decode() for record in builder.as_data_source('train')]
    assert names == sorted((f'{s}_{i}.JPEG' for s in SYNSETS for i in range(5)), key=Hasher('train').hash_key)
    assert 'tensorflow' not in sys.modules


def test_folder_by_the_command(commands, folder, tmp_path):
    """Re-encoded photographs would lose quality, and renamed classes their meaning."""
    arguments = ('prepare', 'folder', f'--manual_dir={folder}', f'--data_dir={tmp_path / "data"}', '--name=my_photos')
    done = commands.run('-m', 'convnext_jax', *arguments)
    directory = tmp_path / 'data' / 'my_photos' / '1.0.0'
    assert done.stdout == f'{directory} holds train 30, val 4 images\n'
    assert sorted(path.name for path in directory.iterdir()) == [
        'dataset_info.json',
        'features.json',
        'label.labels.txt',
        'my_photos-train.array_record-00000-of-00001',
        'my_photos-val.array_record-00000-of-00001',
    ]
    for split in ('train', 'val'):
        ours, examples = prepared(tmp_path, 'my_photos', split)
        theirs = open_source('folder', str(folder), split)
        assert ours.class_names == theirs.class_names == ['ant hill', 'żubr']
        pairs = [(theirs[i].label, theirs[i].image) for i in range(len(theirs))]
        assert collections.Counter((e.label, e.image) for e in examples) == collections.Counter(pairs)


KILLED = """
import os, pathlib, signal, sys
from convnext_jax.data import dataset_writer, prepare
dataset_writer.SHARD_BYTES = 1500
fsync, left = os.fsync, [3]
def fsync_or_die(file):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)
os.fsync = fsync_or_die
prepare.prepare_folder(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), 'my_photos')
"""


def test_complete_shards_are_kept_after_a_kill(folder, tmp_path, monkeypatch, capsys):
    """Hours of copying would be repeated, or an incomplete data set would look complete."""
    command = [sys.executable, '-c', KILLED, str(folder), str(tmp_path / 'data')]
    assert subprocess.run(command, cwd=ROOT, timeout=TIMEOUT).returncode == -9
    scratch = tmp_path / 'data' / 'my_photos' / 'incomplete.1.0.0'
    kept = {path.name: path.stat().st_mtime_ns for path in scratch.glob('*array_record-*-of-?????')}
    assert len(kept) == 2
    assert [path.name[-8:] for path in scratch.glob('*.writing')] == ['.writing']
    assert "there is no data set 'my_photos'" in error_of(open_source, 'my_photos', str(tmp_path / 'data'), 'train')
    monkeypatch.setattr(dataset_writer, 'SHARD_BYTES', 1500)
    prepare_folder(folder, tmp_path / 'data', 'my_photos')
    assert (
        capsys.readouterr().out.splitlines()[0]
        == f'{scratch} is from an interrupted command: its complete shards are kept'
    )
    directory = scratch.with_name('1.0.0')
    assert not scratch.exists()
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}.items()
    assert not [path for path in directory.iterdir() if path.suffix in ('.writing', '.sha256')]
    _, examples = prepared(tmp_path, 'my_photos', 'train')
    assert len(list(directory.glob('*-train.*'))) > 3
    assert sorted(e.image for e in examples) == sorted(path.read_bytes() for path in (folder / 'train').rglob('*.jpg'))


@pytest.mark.slow
def test_shards_of_other_images_are_removed(folder, tmp_path, monkeypatch, capsys):
    """Shards of two different folders would be mixed."""
    subprocess.run([sys.executable, '-c', KILLED, str(folder), str(tmp_path / 'data')], cwd=ROOT, timeout=TIMEOUT)
    (folder / 'train' / 'żubr' / '3 é.jpg').unlink()
    monkeypatch.setattr(dataset_writer, 'SHARD_BYTES', 1500)
    prepare_folder(folder, tmp_path / 'data', 'my_photos')
    assert 'is from an interrupted command with other images: it is removed' in capsys.readouterr().out
    assert len(prepared(tmp_path, 'my_photos', 'train')[1]) == 29


def test_a_full_disk_is_a_user_error(folder, tmp_path):
    """An incomplete shard would be renamed as if it were complete."""
    code = """
import pathlib, resource, sys
from convnext_jax.data.prepare import prepare_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
prepare_folder(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), 'my_photos')
"""
    command = [sys.executable, '-c', code, str(folder), str(tmp_path / 'data')]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    shard = tmp_path / 'data/my_photos/incomplete.1.0.0/my_photos-train.array_record-00000-of-00001'
    assert f'UserError: {shard} cannot be written: ' in failed.stderr.splitlines()[-1]
    assert 'File too large' in failed.stderr.splitlines()[-1]
    assert not shard.exists()


def test_an_image_that_cannot_be_read_is_named(folder, tmp_path):
    """The user could not find one missing file among a million."""
    directory = tmp_path / 'data' / 'my_photos' / '1.0.0'
    lost, kept = folder / 'lost.jpg', folder / 'train' / 'ant hill' / '1 é.jpg'
    images = [Image('kept', 0, kept, 0, kept.stat().st_size), Image('lost', 0, lost, 0, 10)]
    message = error_of(write_dataset, directory, ['ant hill'], {'train': images}, None)
    assert message == f'{lost} cannot be read: No such file or directory'
    lost.write_bytes(b'short')
    message = error_of(write_dataset, directory, ['ant hill'], {'train': images}, None)
    assert message == f'{lost} ends before byte 10: it is truncated, copy it again'
    assert not directory.exists()


def test_another_process_that_prepares_the_data_set_is_an_error(folder, tmp_path):
    """Two processes would write to the same files."""
    directory = tmp_path / 'data' / 'my_photos'
    directory.mkdir(parents=True)
    lock = os.open(directory, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    message = error_of(prepare_folder, folder, tmp_path / 'data', 'my_photos')
    assert message == f'another process is preparing {directory}: wait until it has finished'
    os.close(lock)
    prepare_folder(folder, tmp_path / 'data', 'my_photos')


def test_missing_damaged_or_wrong_imagenet_tars(tars, tmp_path):
    """A truncated download would give a data set without some classes."""

    def message():
        text = error_of(prepare_imagenet2012, tars, tmp_path / 'data')
        assert not (tmp_path / 'data/imagenet2012/5.1.0').exists()
        return text

    train, validation = tars / 'ILSVRC2012_img_train.tar', tars / 'ILSVRC2012_img_val.tar'
    whole = train.read_bytes()
    inner = tar_of({f'{SYNSETS[0]}_{i}.JPEG': jpeg(i) for i in range(3)})
    for damaged in (inner[:-9000], inner[:700], b'', b'no tar at all' * 100):
        train.write_bytes(tar_of({f'{SYNSETS[0]}.tar': damaged, f'{SYNSETS[1]}.tar': inner}))
        assert message().startswith(f'{train}, {SYNSETS[0]}.tar is ')
    train.write_bytes(whole[:-9000])
    assert message().startswith(f'{train} is ')
    train.write_bytes(tar_of({'n99999999.tar': inner}))
    assert message() == f'{train} contains n99999999.tar, which is not the SYNSET.tar of one of the 1,000 classes'
    train.write_bytes(tar_of({}))
    assert message() == f'{train} contains no images: download it again'
    train.write_bytes(whole)
    validation.write_bytes(tar_of({'ILSVRC2012_val_00050001.JPEG': b''}))
    assert message().startswith(f'{validation} contains ILSVRC2012_val_00050001.JPEG, which is not one of')
    train.unlink()
    validation.unlink()
    assert message().startswith(f'missing: {train} and {validation}. Download them from image-net.org')


def test_invalid_names_and_folders(folder, tmp_path):
    """TFDS could not read a data set with such a name, split or class."""

    def message(name='my_photos', root=folder):
        return error_of(prepare_folder, root, tmp_path / 'data', name)

    assert message('My-Photos') == "--name=My-Photos: a TFDS name starts with a letter and consists of a-z, 0-9 and '_'"
    assert message('mnist') == '--name=mnist is the name of another data set: choose another name'
    assert message('folder') == '--name=folder is the name of another data set: choose another name'
    assert message(root=folder / 'nowhere') == f'--manual_dir={folder / "nowhere"} is not a folder'
    assert message(root=folder / 'val' / 'żubr').startswith(f'{folder / "val" / "żubr"} contains no folders')
    (folder / 'val' / 'żubr').rename(folder / 'val' / 'bee')
    assert message() == f'{folder / "train"} lacks these classes: bee'
    (folder / 'val').rename(folder / 'a-b')
    assert message() == f"{folder / 'a-b'} is not a valid split name: rename it to letters, digits and '_'"


@pytest.mark.parametrize('name', [' dog', 'two\nlines', 'a\udcff'])
def test_class_names_that_tfds_cannot_store(tmp_path, name):
    """TFDS would read another name or two names, and images would have wrong classes."""
    for class_name in (name, 'cat'):
        path = tmp_path / 'images' / 'train' / class_name / '0.png'
        path.parent.mkdir(parents=True)
        Picture.new('RGB', (4, 4)).save(path)
    with pytest.raises(UserError, match='is not a valid class name in TFDS: rename its folder'):
        prepare_folder(tmp_path / 'images', tmp_path / 'data', 'mine')
    assert not (tmp_path / 'data').exists()


@pytest.mark.parametrize(
    ('arguments', 'line'),
    [
        ((), 'imagenet2012, folder or masks is missing'),
        (('mnist',), "prepare needs 'imagenet2012', 'folder' or 'masks', not 'mnist'"),
        (('imagenet2012',), '--manual_dir is missing'),
        (('folder', '--manual_dir=a'), '--data_dir is missing'),
        (('folder', '--manual_dir=a', '--data_dir=b'), '--name is missing'),
        (('masks', '--manual_dir=a', '--data_dir=b'), '--name is missing'),
    ],
)
def test_prepare_refuses_incomplete_arguments(arguments, line):
    """A missing flag would cause a traceback."""
    with pytest.raises(UserError, match=line):
        package_command.main(['convnext_jax', 'prepare', *arguments])


def test_a_damaged_data_set_is_an_error(folder, tmp_path):
    """The next call would report a damaged data set as already prepared."""
    prepare_folder(folder, tmp_path / 'data', 'my_photos')
    info = tmp_path / 'data/my_photos/1.0.0/dataset_info.json'
    info.write_text(json.dumps({}))
    message = error_of(prepare_folder, folder, tmp_path / 'data', 'my_photos')
    assert message == f'{info.parent} is not a complete data set: remove it and prepare it again'
