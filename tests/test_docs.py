"""The commands and the Python examples of README.md and docs/ work as they are printed.

A block after the line `<!-- needs: X -->` needs more than a clone and its requirements; its commands are only parsed. A
block after `<!-- from: FILE -->` must be a part of that file.
"""

import argparse
import importlib
import pkgutil
import re
import shlex
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import shrink_models
from PIL import Image

import benchmarks.compare.__main__ as compare_command
import convnext_jax as cx
import convnext_jax.__main__ as package_command
from configs import imagenet1k
from convnext_jax import command_line
from convnext_jax.commands import eval as eval_command
from convnext_jax.commands import train as train_command
from convnext_jax.config import check_values
from convnext_jax.export import export_stablehlo
from convnext_jax.interop import read_pretrained
from convnext_jax.models import get_variant

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
BLOCK = re.compile(r'^(?:<!-- (needs|from): (.+) -->\n)?```(\w*)\n((?:.*\n)*?)```$', re.MULTILINE)
BLOCKS = [(page, *found) for page in PAGES for found in BLOCK.findall(page.read_text(encoding='utf-8'))]
SHAPES = {
    'README.md': {'images': (2, 64, 96, 3), 'maps': (2, 2, 3, 16), 'pyramid': (2, 4, 6, 16)},
    'weights.md': {'pyramid': (2, 4, 6, 16)},
}
"""Page → variable in its examples → shape of the array, or of the feature map stage4."""
HUB_ID = 'facebook/convnext-tiny-224'
UPERNET_ID = 'openmmlab/upernet-convnext-tiny'


def blocks_of(language):
    return [
        pytest.param(page, marker, value, text, id=f'{page.stem}-{number}')
        for number, (page, marker, value, block_language, text) in enumerate(BLOCKS)
        if block_language == language
    ]


class Parsed(Exception):
    """Raised after a command has checked its arguments, before it does any work."""


def stop(values):
    if 'config' in values and values['config'].value is not None:
        check_values(values['config'].value)
    raise Parsed


def parse_and_stop(values, *arguments, **keywords):
    command_line.parse(values, *arguments, **keywords)
    stop(values)


PARSE = argparse.ArgumentParser.parse_known_args


def parse_args_and_stop(parser):
    _, unknown = PARSE(parser)
    assert not unknown
    raise Parsed


def parse_known_args_and_stop(parser):
    PARSE(parser)
    raise Parsed


@pytest.fixture
def only_parsing(monkeypatch):
    """The commands check their arguments in this process, and stop there."""
    monkeypatch.chdir(ROOT)
    for command in (train_command, eval_command):
        monkeypatch.setattr(command, 'all_processes', stop)
    for command in (package_command, compare_command):
        monkeypatch.setattr(command, 'parse', parse_and_stop)
    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_args_and_stop)
    monkeypatch.setattr(argparse.ArgumentParser, 'parse_known_args', parse_known_args_and_stop)
    monkeypatch.setattr(eval_command, 'read_config', lambda _: imagenet1k.get_config())


def commands_of(block):
    """The words of each command, without variables before it and comments behind it."""
    for line in block.replace('\\\n', ' ').splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r'[A-Z_]+=', words[0]):
            words = words[1:]
        if words:
            yield words


def check_command(words, monkeypatch):
    match words:
        case ['launch/cpu.sh', *command] | ['python', 'launch/local.py', _, '--', *command]:
            check_command(command if command[0] == 'python' else ['python', *command], monkeypatch)
        case ['mpirun', '-n', _, '--mca', _, _, *command]:
            check_command(command, monkeypatch)
        case ['launch/tpu_pod.sh', _, *arguments] | ['sbatch', _, 'launch/slurm.sh', *arguments]:
            check_command(['python', 'train.py', *arguments], monkeypatch)
        case ['python', 'train.py', *arguments]:
            with pytest.raises(Parsed):
                train_command.main(['train.py', *arguments])
        case ['python', 'eval.py', *arguments]:
            with pytest.raises(Parsed):
                eval_command.main(['eval.py', *arguments])
        case ['python', '-m', 'convnext_jax', *arguments] | ['convnext-jax', *arguments]:
            with pytest.raises(Parsed):
                package_command.main(['convnext_jax', *arguments])
        case ['python', '-m', 'pytest', *arguments]:
            assert all((ROOT / argument).exists() for argument in arguments if '/' in argument)
        case ['python', '-m', 'benchmarks.compare', *arguments]:
            with pytest.raises(Parsed):
                compare_command.main(['compare', *arguments])
        case ['python', '-m', name, *arguments]:
            name += '.__main__' if (ROOT / name.replace('.', '/')).is_dir() else ''
            monkeypatch.setattr(sys, 'argv', [name, *arguments])
            with pytest.raises(Parsed):
                importlib.import_module(name).main()
        case ['kubectl', 'apply', '-f', file]:
            assert (ROOT / file).is_file()
        case ['make', *targets]:
            makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
            assert all(re.search(f'^{target}:', makefile, re.MULTILINE) for target in targets)
        case ['pip', 'install', what]:
            extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
            assert what in ('.', *(f'.[{extra}]' for extra in extras)) or what.startswith('jax[tpu]==')
        case _:
            pytest.fail(f'no test knows the command {shlex.join(words)}')


@pytest.mark.parametrize(('page', 'marker', 'value', 'text'), blocks_of('sh'))
def test_commands_parse(page, marker, value, text, only_parsing, monkeypatch):
    """New users would copy a command with a flag or a config field that does not exist."""
    commands = list(commands_of(text))
    assert commands
    for words in commands:
        check_command(words, monkeypatch)


@pytest.mark.parametrize(
    'line',
    [
        'python train.py --config=configs/none.py --workdir=runs/x',
        'python train.py --config=configs/fashion_mnist.py --config.epoch=1 --workdir=runs/x',
        'python train.py --config=configs/fashion_mnist.py --config.seed=-1 --workdir=runs/x',
        'python eval.py --workdir=runs/x --config.optimizer.beta1=0.5',
        'python -m convnext_jax predict --weights=x',
        'python -m benchmarks.loop --turns=5',
        'make nothing',
        'pip install .[quantum]',
    ],
)
def test_a_wrong_command_is_found(line, only_parsing, monkeypatch):
    """The test above would accept any command."""
    with pytest.raises((cx.errors.UserError, AssertionError, SystemExit)):
        check_command(shlex.split(line), monkeypatch)


@pytest.fixture(scope='module')
def files_of_examples(tmp_path_factory):
    """A folder with the files that the examples read. The atto models are small, and one replaces one of the hub."""
    with pytest.MonkeyPatch.context() as patch:
        shrink_models(patch, depths=(1, 1, 1, 1), widths=(8, 8, 8, 16))
        yield write_files(tmp_path_factory)


def write_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('examples')
    Image.new('RGB', (320, 240), 'red').save(folder / 'photo.jpg')
    model = cx.create_model('convnext_atto', key=jax.random.key(0))
    (folder / HUB_ID).parent.mkdir()
    cx.save_pretrained(model, folder / HUB_ID, class_names=[f'class {number}' for number in range(1000)])
    export_stablehlo(read_pretrained(folder / HUB_ID), folder / 'exported')
    upernet = cx.UPerNet(get_variant('convnext_atto'), channels=8, auxiliary_channels=8, key=jax.random.key(0))
    (folder / UPERNET_ID).parent.mkdir()
    cx.save_pretrained(upernet, folder / UPERNET_ID)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(('page', 'marker', 'value', 'text'), blocks_of('python'))
def test_python_examples_run(page, marker, value, text, files_of_examples, tmp_path, monkeypatch):
    """Users would copy an example that raises an error."""
    if marker == 'from':
        assert text in (ROOT / value).read_text(encoding='utf-8'), f'{value} has changed: copy it into {page.name}'
        return
    for file in files_of_examples.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(text, names)
    for name, shape in SHAPES.get(page.name, {}).items():
        if name in names:
            shapes = jax.tree.map(jnp.shape, names[name])
            assert (shapes['stage4'] if isinstance(shapes, dict) else shapes) == shape


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_every_block_is_tested_and_every_file_is_there(page):
    """A block without a language would not be tested, and a link would lead to a missing file."""
    text = page.read_text(encoding='utf-8')
    blocks = BLOCK.findall(text)
    assert text.count('```') == 2 * len(blocks)
    assert {language for _, _, language, _ in blocks} <= {'sh', 'python', 'text'}
    for name in re.findall(r'\b(?:benchmarks|configs|convnext_jax|docs|launch|tests)/[\w/]+\.\w+', text):
        assert (ROOT / name).is_file(), name
    for link in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', text):
        assert (page.parent / link).is_file(), link


def test_the_layout_names_every_module():
    """The list of modules in the documentation would be incomplete or outdated."""
    layout = (ROOT / 'docs' / 'architecture.md').read_text(encoding='utf-8')
    files = [path for path in (ROOT / 'convnext_jax').rglob('*.py') if path.parent.name != 'configs']
    modules = {path.name for path in files} - {'__init__.py'}
    assert modules - set(re.findall(r'\w+\.py', layout)) == set()


def test_every_page_is_in_the_navigation():
    """Readers of the HTML pages would not find a page that is missing in the navigation."""
    pages = {str(page.relative_to(ROOT / 'docs')) for page in (ROOT / 'docs').rglob('*.md')}
    listed = re.findall(r': ([\w/-]+\.md)$', (ROOT / 'mkdocs.yml').read_text(encoding='utf-8'), re.MULTILINE)
    assert sorted(listed) == sorted(pages)


def test_the_api_pages_name_what_there_is():
    """A name that was changed in the package would end `make docs`, which the tests do not run."""
    text = ''.join(page.read_text(encoding='utf-8') for page in (ROOT / 'docs' / 'api').iterdir())
    names = re.findall(r'^::: ([\w.]+)$', text, re.MULTILINE)
    assert {f'convnext_jax.{name}' for name in set(cx.__all__) - {'errors', 'interop', 'models'}} <= set(names)
    for name in names:
        pkgutil.resolve_name(name)
