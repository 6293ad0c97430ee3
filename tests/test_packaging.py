"""The installed package works without a clone of the repository."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec

import pytest
from conftest import ONE_DEVICE, ROOT

from convnext_jax import __main__ as package_command
from convnext_jax import __version__
from convnext_jax.command_line import run
from convnext_jax.configs import RECIPES
from convnext_jax.errors import UserError

SOURCES = ('pyproject.toml', 'requirements.txt', 'README.md', 'LICENSE')


def installed_files():
    """The files of the package in this clone."""
    found = (ROOT / 'convnext_jax').rglob('*')
    return {str(path.relative_to(ROOT)) for path in found if path.is_file() and '__pycache__' not in path.parts}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """The wheel, built offline from a copy of the clone, so that files of an earlier build are not included."""
    versions = {name: importlib.metadata.version(name) for name in ('pip', 'setuptools') if find_spec(name)}
    if int(versions.get('setuptools', '0').split('.')[0]) < 77 or 'pip' not in versions:
        pytest.skip('pip and setuptools 77 or newer build the wheel: not installed')
    source, target = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('dist')
    shutil.copytree(ROOT / 'convnext_jax', source / 'convnext_jax', ignore=shutil.ignore_patterns('__pycache__'))
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, '-m', 'pip', 'wheel', '--no-index', '--no-deps', '--no-build-isolation', '--quiet']
    subprocess.run([*pip, f'--wheel-dir={target}', str(source)], check=True, capture_output=True)
    (path,) = target.iterdir()
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    """The demo's images and the GPU's description would be missing: setuptools includes data only if configured."""
    assert wheel.name == f'convnext_jax-{__version__}-py3-none-any.whl'
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if '.dist-info/' not in name}
        metadata = file.read(f'convnext_jax-{__version__}.dist-info/METADATA').decode()
        entry_points = file.read(f'convnext_jax-{__version__}.dist-info/entry_points.txt').decode()
    assert names == installed_files()
    assert {'convnext_jax/configs/imagenet1k.py', 'convnext_jax/py.typed'} <= names
    assert 'convnext-jax = convnext_jax.__main__:script' in entry_points
    for line in ('License-Expression: Apache-2.0', 'Requires-Python: >=3.11', 'Classifier: Typing :: Typed'):
        assert line in metadata
    assert re.search(r'^Requires-Dist: jax>=', metadata, re.MULTILINE)


@pytest.mark.slow
def test_the_wheel_finds_its_recipes_and_its_data(wheel, tmp_path):
    """The installed command could not be used outside a clone. The error shows that it has opened the demo's images."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / 'site')
    command = [sys.executable, '-P', '-m', 'convnext_jax', 'train', '--config=fashion_mnist', '--workdir=run']
    done = subprocess.run(
        [*command, '--config.batch_size=5001'],
        cwd=tmp_path,
        env=os.environ | ONE_DEVICE | {'PYTHONPATH': str(tmp_path / 'site')},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count('\n')) == (2, 1), done.stderr
    assert re.match('error: .*5,?000.*lower it', done.stderr)


def test_configs_in_a_clone_are_the_recipes_of_the_package():
    """A change to a recipe in a clone would have no effect on the command."""
    assert {path.name for path in (ROOT / 'configs').glob('[a-z]*.py')} == {path.name for path in RECIPES.values()}
    assert all((ROOT / 'configs' / path.name).samefile(path) for path in RECIPES.values())


@pytest.mark.parametrize('flag', [['--config=imagenet1k:tiny'], ['--config', 'imagenet1k:tiny']])
def test_a_recipe_is_found_by_its_name_from_any_folder(flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape('data.dir is not set')):
        package_command.main(['convnext_jax', 'train', *flag, f'--workdir={tmp_path / "run"}'])


@pytest.mark.parametrize('command', ['train', 'plan'])
def test_an_unknown_recipe_is_refused_with_those_there_are(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['convnext-jax', command, '--config=imagenet:tiny', '--workdir=run'])
    with pytest.raises(SystemExit) as end:
        run(package_command.main)
    assert end.value.code == 2
    recipes = ', '.join(RECIPES)
    line = (
        f"error: --config: there is no recipe 'imagenet'; choose one of {recipes}, or give the path of a config file\n"
    )
    assert {'fcmae', 'imagenet1k'} < set(RECIPES)
    assert capsys.readouterr().err == line


def test_help_lists_every_command(capsys):
    package_command.main(['convnext-jax', '--help'])
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()[2:] if not line.startswith(' ')}
    assert listed == set(package_command.COMMANDS)
