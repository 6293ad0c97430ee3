"""The search for image files: hidden files, links, and files without a known suffix."""

import os
from pathlib import Path

import pytest
from PIL import Image

from convnext_jax.data.decode import FORMATS
from convnext_jax.data.image_files import IMAGE_SUFFIXES, describe_left_out, find_images


def write(path: Path, form: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (3, 2)).save(path, form)


def names(folder: Path) -> list[str]:
    return [os.path.relpath(path, folder) for path in find_images(folder).paths]


def test_hidden_files_and_folders_are_left_out_and_counted(tmp_path):
    """Thumbnails, copies in notebook folders and macOS metadata would become training examples."""
    for name in ('a.jpg', 'deep/b.png', '.thumbnails/a.jpg', '.ipynb_checkpoints/deep/b.png', 'deep/.c.png'):
        write(tmp_path / name)
    (tmp_path / '._a.jpg').write_bytes(b'Mac OS X')
    assert names(tmp_path) == ['a.jpg', 'deep/b.png']
    left_out = find_images(tmp_path).left_out
    assert describe_left_out(left_out) == 'left out: hidden files (2), hidden folders (2)'


def test_linked_folders_are_followed_once(tmp_path):
    """As in torchvision and timm, links are followed; a circle must end, and a folder with two links count once."""
    folder, elsewhere = tmp_path / 'set', tmp_path / 'elsewhere'
    write(folder / 'own/a.jpg')
    write(elsewhere / 'b.jpg')
    (folder / 'again').symlink_to(folder / 'own')  # sorted before its target
    (folder / 'batch2').symlink_to(elsewhere)
    (folder / 'batch3').symlink_to(elsewhere)
    (elsewhere / 'circle').symlink_to(folder)
    assert names(folder) == ['batch3/b.jpg', 'own/a.jpg'] or names(folder) == ['batch2/b.jpg', 'own/a.jpg']
    assert find_images(folder).left_out == {'links to folders that were already read': 3}


def test_links_to_other_classes_are_left_out(tmp_path):
    """Their images would occur twice, with different labels."""
    write(tmp_path / 'ant/a.jpg')
    write(tmp_path / 'bee/deep/b.jpg')
    (tmp_path / 'ant/up').symlink_to('..')
    (tmp_path / 'ant/other').symlink_to('../bee/deep')
    found = find_images(tmp_path / 'ant', tmp_path)
    assert [os.path.relpath(path, tmp_path) for path in found.paths] == ['ant/a.jpg']
    assert found.left_out == {'links to folders of other classes': 2}


def test_links_in_a_circle_and_pipes_do_not_end_the_search(tmp_path):
    """One such entry among a million files would end the run, or block it forever."""
    write(tmp_path / 'a.jpg')
    (tmp_path / 'self').symlink_to('self')
    (tmp_path / 'through').symlink_to('a.jpg/x')
    os.mkfifo(tmp_path / 'pipe')
    os.mkfifo(tmp_path / 'pipe.jpg')
    assert names(tmp_path) == ['a.jpg']
    assert find_images(tmp_path).left_out == {'files without a suffix': 2, 'pipes, sockets and devices': 2}


def test_a_broken_link_with_an_image_suffix_is_an_image(tmp_path):
    """Images on a disk that is not mounted would silently be ignored."""
    (tmp_path / 'lost.jpg').symlink_to(tmp_path / 'unmounted.jpg')
    (tmp_path / 'lost').symlink_to(tmp_path / 'unmounted')
    assert names(tmp_path) == ['lost.jpg']
    assert find_images(tmp_path).left_out == {'files without a suffix': 1}


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM'])
def test_the_content_identifies_an_image_without_a_known_suffix(tmp_path, form):
    """Downloaded images without a suffix, or with an unusual one, would be ignored."""
    write(tmp_path / 'download', form)
    assert names(tmp_path) == ['download']
    if form != 'TIFF':
        write(tmp_path / 'photo.jpg_large', form)
        assert names(tmp_path) == ['download', 'photo.jpg_large']


def test_other_files_are_left_out_and_counted_by_suffix(tmp_path):
    """For a camera raw file, which is a TIFF, the thumbnail of 160 pixels would be used."""
    write(tmp_path / 'raw.NEF', 'TIFF')
    (tmp_path / 'notes.txt').write_text('P1 notes')
    (tmp_path / 'movie').write_bytes(bytes(100))
    write(tmp_path / 'album.jpg' / 'scan.TIFF')
    assert names(tmp_path) == ['album.jpg/scan.TIFF']
    assert find_images(tmp_path).left_out == {'.nef files': 1, '.txt files': 1, 'files without a suffix': 1}


def test_all_suffixes_of_the_decoded_formats_are_known():
    """Every file with a missing suffix would be opened at each start."""
    theirs = {suffix for suffix, form in Image.registered_extensions().items() if form in (*FORMATS, 'MPO')}
    assert theirs == IMAGE_SUFFIXES
