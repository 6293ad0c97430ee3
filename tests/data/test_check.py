"""Images of the evaluation that cannot be read are found before the first step."""

import io

import numpy as np
import pytest
from PIL import Image

from convnext_jax.data.check import SHOWN, describe_unreadable, find_unreadable
from convnext_jax.data.labelled_images import EvalImages
from convnext_jax.data.sources import FolderSource


def encoded(kind='jpeg', size=(60, 40), mode='RGB'):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """80 images of two classes, of several formats; what a test adds sorts behind them."""
    for name in ('ant', 'bee'):
        (tmp_path / 'val' / name).mkdir(parents=True)
    images = [encoded(), encoded('png'), encoded(mode='CMYK'), encoded(mode='L')]
    for number in range(80):
        path = tmp_path / 'val' / ('ant' if number < 40 else 'bee') / f'{number:02}.jpg'
        path.write_bytes(images[number % len(images)])
    return tmp_path


def unreadable(folder, process=0, processes=1, waiting=lambda seconds, name: None):
    images = EvalImages(FolderSource(folder, 'val'), 32, 3, crop_pct=0.875)
    found = {}
    for part in find_unreadable(images, process=process, processes=processes, waiting=waiting):
        found |= part
    return {images.name(index).removeprefix(f'{folder}/val/'): error for index, error in found.items()}


def test_every_kind_of_unreadable_image_is_found(folder):
    """One of them would end the run at its first evaluation, after an epoch that was paid for."""
    assert unreadable(folder) == {}
    broken = {
        'ant/01.jpg': b'',
        'ant/33.jpg': encoded()[:-40],
        'bee/40.jpg': b'no image',
        'bee/41.jpg': encoded('png')[:-30],
        'bee/79.jpg': encoded('png', size=(1, 100_000)),
    }
    for name, content in broken.items():
        (folder / 'val' / name).write_bytes(content)
    (folder / 'val' / 'bee' / '50.jpg').unlink()
    (folder / 'val' / 'bee' / '50.jpg').symlink_to('nowhere')
    found = unreadable(folder)
    assert found.keys() == {*broken, 'bee/50.jpg'}
    assert all(name in error for name, error in found.items())
    assert 'too thin' in found['bee/79.jpg']


def test_each_of_several_processes_checks_its_part(folder):
    """Each would wait for the others in as many parts, and an image that nobody checks would end the job later."""
    for name in ('ant/00.jpg', 'ant/20.jpg', 'bee/47.jpg', 'bee/79.jpg'):
        (folder / 'val' / name).write_bytes(b'')
    parts = [unreadable(folder, process, 3) for process in range(3)]
    assert [sorted(part) for part in parts] == [['ant/00.jpg'], ['ant/20.jpg', 'bee/79.jpg'], ['bee/47.jpg']]


def test_a_few_are_named_and_all_are_counted():
    errors = {index: f'image {index} is damaged' for index in range(SHOWN + 2)}
    line = describe_unreadable(errors, 100, 'val')
    assert line.startswith(f'{SHOWN + 2} of the 100 images of val cannot be read: image 0 is damaged; image 1')
    assert f'image {SHOWN} ' not in line
    assert 'and 2 more. Remove or replace them' in line
    assert 'more' not in describe_unreadable({3: 'image 3 is damaged'}, 100, 'val').replace('Remove', '')
