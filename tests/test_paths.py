"""Local paths: the home folder, and folder names with unusual characters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convnext_jax.errors import UserError
from convnext_jax.paths import local_path, plain_path


def test_the_home_folder_is_found(monkeypatch, tmp_path):
    """A run is written to a folder named '~', because shells do not expand the ~ after `=`."""
    monkeypatch.setenv('HOME', str(tmp_path))
    assert local_path('~/run') == tmp_path / 'run'
    assert local_path('a/~') == Path('a/~')
    with pytest.raises(UserError, match='~nobody-of-that-name/run cannot be expanded'):
        local_path('~nobody-of-that-name/run')


def test_an_unusual_folder_has_a_plain_path_until_the_process_ends(tmp_path):
    """TensorStore writes the arrays of a checkpoint into another folder, and no checkpoint can be restored."""
    folders = [tmp_path / name for name in ('back\\slash', '[0:3]', 'a\nb', "'#%20", os.fsdecode(b'\xff'))]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / 'file').write_text(f'here {number}')
    code = (
        'import pathlib, sys; from convnext_jax.paths import plain_path\n'
        'for folder in sys.argv[1:]:\n'
        '    plain = plain_path(pathlib.Path(folder)); print(plain, (plain / "file").read_text())'
    )
    lines = subprocess.check_output([sys.executable, '-c', code, *folders], text=True).splitlines()
    for number, (folder, line) in enumerate(zip(folders, lines, strict=True)):
        plain, content = line.split(' ', 1)
        assert content == f'here {number}'
        assert plain.isascii()
        assert not Path(plain).parent.exists()
        assert (folder / 'file').exists()


def test_a_plain_folder_is_its_own_path(tmp_path, monkeypatch):
    """Messages of libraries name a temporary link instead of the user's folder."""
    monkeypatch.chdir(tmp_path)
    assert plain_path(Path('a é-1')) == tmp_path / 'a é-1'
