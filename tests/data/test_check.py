"""The check that finds unreadable evaluation images before the first step."""

import io

import numpy as np
import pytest
from PIL import Image

from convnext_jax.data.check import MAX_NAMED, describe_unreadable, find_unreadable
from convnext_jax.data.labelled_images import EvalImages
from convnext_jax.data.sources import FolderSource


def encoded(kind='jpeg', size=(60, 40), mode='RGB'):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """80 images of two classes, in several formats."""
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
    """An unreadable image would end the run at its first evaluation, after an expensive epoch."""
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
    assert 'too narrow' in found['bee/79.jpg']


def test_several_processes_share_the_images(folder):
    """An image that no process checks would end the job later."""
    for name in ('ant/00.jpg', 'ant/20.jpg', 'bee/47.jpg', 'bee/79.jpg'):
        (folder / 'val' / name).write_bytes(b'')
    parts = [unreadable(folder, process, 3) for process in range(3)]
    assert [sorted(part) for part in parts] == [['ant/00.jpg'], ['ant/20.jpg', 'bee/79.jpg'], ['bee/47.jpg']]


def test_the_message_names_a_few_images_and_counts_all():
    """A message with thousands of names would be unreadable."""
    errors = {index: f'image {index} is damaged' for index in range(MAX_NAMED + 2)}
    line = describe_unreadable(errors, 100, 'val')
    assert line.startswith(f'{MAX_NAMED + 2} of the 100 images of val cannot be read: image 0 is damaged; image 1')
    assert f'image {MAX_NAMED} ' not in line
    assert 'and 2 more. Remove or replace them' in line
    assert 'more' not in describe_unreadable({3: 'image 3 is damaged'}, 100, 'val').replace('Remove', '')
