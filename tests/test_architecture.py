"""The allowed import directions between the parts of the package, checked on the source of every module."""

import ast
import re
from pathlib import Path

import pytest

import convnext_jax

ROOT = Path(__file__).parent.parent
PACKAGE = 'convnext_jax'
# Part of the package → other parts that it may import. Parts that are not listed may import all parts except the
# commands.
ALLOWED = {
    'errors': set(),
    'paths': {'errors'},
    'output': {'errors'},
    'models': {'errors'},
    'data': {'paths', 'output', 'errors'},
    'probing': {'models', 'errors'},
    'tasks': {'models', 'data', 'interop', 'probing', 'fields', 'errors'},
    'interop': {'models', 'data', 'paths', 'output', 'errors'},
    'fields': set(),
    'config': {'tasks', 'fields', 'paths', 'errors'},
    'runtime': {'paths', 'output', 'errors'},
    'checkpoints': {'runtime', 'models', 'config', 'paths', 'output', 'errors'},
    'monitoring': {'runtime', 'checkpoints', 'tasks', 'data', 'paths', 'output', 'errors'},
    'training': {
        *('runtime', 'checkpoints', 'monitoring', 'tasks', 'models', 'data', 'interop', 'config'),
        *('paths', 'output', 'errors'),
    },
    'plan': {'training', 'tasks', 'config', 'runtime', 'output', 'errors'},
    'configs': {'config', 'models', 'errors'},
}
COMMANDS = {'command_line', 'commands', '__main__'}
SCRIPTS = {'train', 'eval'}
COMPARE = ROOT / 'benchmarks' / 'compare'
NOT_INSTALLED = {'benchmarks', 'configs', 'examples', 'tests'}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports(path):
    """The absolute names of everything that a file imports, at any level."""
    name, names = module_name(path), set()
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split('.')[: len(package.split('.')) - node.level + 1] if node.level else []
            base = '.'.join([*above, *([node.module] if node.module else [])])
            names |= {f'{base}.{alias.name}' for alias in node.names}
    return names


def part(name):
    """'convnext_jax.models.layers.GRN' → 'models'; a name defined in convnext_jax/__init__.py → 'front'."""
    inside = name.split('.')[1:]
    if not inside:
        return 'front'
    path = ROOT / PACKAGE / inside[0]
    return inside[0] if path.is_dir() or path.with_suffix('.py').is_file() else 'front'


FILES = sorted((ROOT / PACKAGE).rglob('*.py'))


def test_files_are_found_and_their_imports_are_read():
    """The other tests of this file pass without checking anything."""
    by_name = {module_name(path): imports(path) for path in FILES}
    assert {f'{PACKAGE}.models.layers', f'{PACKAGE}.data.pipeline', f'{PACKAGE}.training.loop'} <= by_name.keys()
    assert f'{PACKAGE}.models.with_parameters' in by_name[f'{PACKAGE}.training.evaluation']
    assert {part(name) for name in by_name[f'{PACKAGE}.training.evaluation'] if name.startswith(PACKAGE)} >= {
        'models',
        'tasks',
    }
    assert part(f'{PACKAGE}.create_model') == 'front'


@pytest.mark.parametrize('path', FILES, ids=module_name)
def test_imports_run_one_way(path):
    """A model cannot be used without the training code, or an import cycle breaks `import convnext_jax`."""
    own = part(module_name(path))
    used = {part(name) for name in imports(path) if name.split('.')[0] == PACKAGE} - {own}
    assert used <= ALLOWED.get(own, used), f'{own} may not import {used - ALLOWED.get(own, used)}'
    if own not in COMMANDS:
        assert not used & COMMANDS


def test_all_names_in_all_exist():
    """`cx.NAME` raises AttributeError for a documented name."""
    assert [name for name in convnext_jax.__all__ if not hasattr(convnext_jax, name)] == []
    assert convnext_jax.__version__


@pytest.mark.parametrize('path', sorted((ROOT / PACKAGE / 'training').rglob('*.py')), ids=module_name)
def test_training_imports_only_the_interface_of_tasks(path):
    """The training loop gets special cases for single tasks."""
    below = {name for name in imports(path) if name.startswith(f'{PACKAGE}.tasks.')}
    assert {name.count('.') for name in below} <= {2}, below
    assert not below & {module_name(file) for file in (ROOT / PACKAGE / 'tasks').glob('*.py')}


@pytest.mark.parametrize('path', FILES, ids=module_name)
def test_the_package_runs_without_the_repository(path):
    """The installed package, which contains neither tests nor benchmarks, fails at import."""
    assert not {name.split('.')[0] for name in imports(path)} & NOT_INSTALLED


GENERIC = [
    path
    for path in FILES
    if part(module_name(path)) in {'training', 'runtime', 'checkpoints', 'monitoring', 'plan', 'config', 'fields'}
]


@pytest.mark.parametrize('path', GENERIC, ids=module_name)
def test_generic_code_does_not_mention_classification(path):
    """The training loop works for classification only."""
    words = re.compile(r"class.?name|num_classes|one_hot|top.?1|['`]label", re.IGNORECASE)
    assert not words.findall(path.read_text(encoding='utf-8'))


@pytest.mark.parametrize('path', sorted(COMPARE.rglob('*.py')), ids=module_name)
def test_a_benchmarked_process_holds_one_library(path):
    """Two libraries in one process share memory and threads, which distorts the figures of both."""
    used = {name.split('.')[0] for name in imports(path)}
    if path.name not in ('on_torch.py', 'timm_models.py'):  # timm_models.py only counts, in the process of the command
        assert not used & {'torch', 'timm', 'transformers'}
    if path.parent.name == 'baselines':
        assert path.name == 'ours.py' or PACKAGE not in used
        beside = {name for name in imports(path) if name.startswith('benchmarks.')}
        assert all(name.startswith('benchmarks.compare.baselines.') for name in beside)


@pytest.mark.parametrize('path', [*FILES, *sorted(ROOT.glob('*.py'))], ids=module_name)
def test_nothing_imports_the_scripts(path):
    """A module that imports train.py or eval.py fails after installation, because the scripts are not installed."""
    assert not {name.split('.')[0] for name in imports(path)} & SCRIPTS
