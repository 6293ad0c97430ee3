"""The files that tools and services read: an error in them would only appear on other machines, without a message."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import convnext_jax

ROOT = Path(__file__).parent.parent
YAML_FILES = sorted(
    [*ROOT.glob('.github/**/*.yml'), ROOT / '.pre-commit-config.yaml', ROOT / 'CITATION.cff', ROOT / 'launch/gke.yaml'],
)


def load(name):
    return yaml.safe_load((ROOT / name).read_text(encoding='utf-8'))


@pytest.mark.parametrize('path', YAML_FILES, ids=lambda path: path.name)
def test_yaml_is_well_formed(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding='utf-8')), dict)


@pytest.mark.skipif(not shutil.which('shellcheck'), reason='not installed: shellcheck')
def test_shellcheck_finds_nothing_in_the_scripts():
    """A launcher would fail in a case that nobody tried, such as a name with a space."""
    done = subprocess.run(
        ['shellcheck', *ROOT.glob('launch/*.sh'), ROOT / '.ci' / 'run'], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_version_is_the_same_everywhere():
    """Citations and bug reports would name a wrong version."""
    assert load('CITATION.cff')['version'] == convnext_jax.__version__
    changes = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert re.findall(r'^## (\d\S*)', changes, re.MULTILINE)[0] == convnext_jax.__version__


def test_workflows_and_hooks_run_targets_and_tools_that_exist():
    """A renamed target of the Makefile would break every check of a pull request."""
    targets = set(re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    jobs = [job for name in ('quick', 'full') for job in load(f'.github/workflows/{name}.yml')['jobs'].values()]
    commands = [step['run'] for job in jobs for step in job['steps'] if 'run' in step]
    made = {command.split()[1] for command in commands if command.startswith('make ')}
    assert made == {'check', 'lint', 'test', 'test-judges'}
    assert made <= targets
    tools = {Path(hook['entry'].split()[0]).name for hook in load('.pre-commit-config.yaml')['repos'][0]['hooks']}
    assert tools == {'ruff', 'ty'}


def test_every_requirement_has_a_lower_bound_that_can_be_installed_exactly():
    """The workflow replaces >= with ==, so it cannot test a lower bound that is not the version of a release."""
    lines = [line.split('#')[0].strip() for line in (ROOT / 'requirements.txt').read_text().splitlines()]
    odd = [line for line in lines if line and not re.fullmatch(r'[\w.-]+(\[\w+\])?>=\d[\d.]*(; .*)?', line)]
    assert odd == []


def test_the_python_versions_agree():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    oldest = project['requires-python'].removeprefix('>=')
    named = [c.rpartition(' ')[2] for c in project['classifiers'] if re.search(r':: 3\.\d+$', c)]
    tested = {
        row['python'] for row in load('.github/workflows/full.yml')['jobs']['test']['strategy']['matrix']['include']
    }
    assert named[0] == oldest
    assert tested == {named[0], named[-1]}
