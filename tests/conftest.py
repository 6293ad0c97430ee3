"""Shared fixtures: eight simulated devices in the pytest process, small training runs, and commands in subprocesses."""

import contextlib
import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

# Tests spend most time compiling. All processes share one compilation cache. LLVM does not optimise and compiles one
# module; XLA of jaxlib 0.10 uses its older code for fusions, which compiles faster and which later versions lack.
OLDER_FUSIONS = '--xla_cpu_use_fusion_emitters=false ' if version('jaxlib').startswith('0.10.') else ''
XLA_FLAGS = (
    f'{OLDER_FUSIONS}--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 '
    '--xla_force_host_platform_device_count='
)
ONE_DEVICE = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'{XLA_FLAGS}1'}
os.environ |= {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{XLA_FLAGS}8',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    'JAX_TRACEBACK_IN_LOCATIONS_LIMIT': '0',  # a program compiles faster without the Python lines of its operations
}
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:  # pytest-xdist workers inherit this variable
    cache = tempfile.TemporaryDirectory(prefix='compiled')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = cache.name

# A shell script starts background jobs with SIGINT ignored. Without this, subprocesses of pytest would ignore it too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for train.py and eval.py

import jax  # noqa: E402 - reads the environment
from jaxtyping import config, install_import_hook  # noqa: E402

# Checks at run time the shapes and dtypes of all functions in modules that annotate them with jaxtyping.
CHECKED = [
    '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    for path in (ROOT / 'convnext_jax').rglob('*.py')
    if 'from jaxtyping import' in path.read_text(encoding='utf-8')
]
install_import_hook(CHECKED, 'shape_checks.check')

from small import small_variants  # noqa: E402

import train as train_command  # noqa: E402
from convnext_jax.models.variants import VARIANTS  # noqa: E402

STEPS = 24
TIMEOUT = 900
"""Timeout of a subprocess in seconds. Even on a busy machine, only a process that hangs takes longer."""
# A run that takes a few seconds, with ten batches per epoch and 40 images to evaluate.
SMALL_RUN = (
    '--config=configs/fashion_mnist.py',
    '--config.data.train_split=train[:160]',
    '--config.data.eval_split=test[:40]',
    '--config.batch_size=16',
    f'--config.steps={STEPS}',
    '--config.optimizer.warmup_steps=4',
    '--config.log_every_steps=4',
    '--config.eval_every_epochs=1',
    '--config.checkpoint_every_steps=4',
)
SMALL_TRAIN = ('tests/small.py', 'train.py', *SMALL_RUN)


def pytest_configure(config: pytest.Config) -> None:
    """Lets `pytest -m gpu` run on the GPU; all other tests run on CPU."""
    if config.getoption('markexpr') == 'gpu':
        del os.environ['JAX_PLATFORMS']
        jax.config.update('jax_platforms', None)  # JAX read the variable when it was imported


# pytest-xdist gives whole files to its workers in this order. One worker would idle if a long file came last, or if two
# of the first three files needed the finished run.
LONGEST_FILES = (
    'test_processes.py',
    'test_segmentation.py',
    'test_sharding.py',
    'test_loading.py',
    'test_loop.py',
    'test_throughput.py',
    'test_commands.py',
    'test_stop.py',
    'test_task.py',
    'test_fcmae.py',
    'test_statistics.py',
    'test_compare.py',
    'test_export.py',
    'test_output.py',
    'test_cpu_settings.py',
    'test_reference.py',
    'test_pretrained.py',
    'test_backbone.py',
    'test_checkpoint.py',
    'test_trace.py',
    'test_parity.py',
    'test_trunk.py',
    'test_depthwise.py',
    'test_masked.py',
    'test_licence_in_commands.py',
    'test_step.py',
    'test_notebook.py',
)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Runs the longest files first, marks slow tests and judges, and skips downloads without `-m hub`."""
    names = {name: number for number, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: names.get(item.path.name, len(names)))
    for item in items:
        if {'commands', 'finished_run', 'one_device', 'runs'} & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
        if item.path.parent.name == 'judges':
            item.add_marker(pytest.mark.judge)
        if item.get_closest_marker('hub') and config.getoption('markexpr') != 'hub':
            item.add_marker(pytest.mark.skip(reason='needs the Hugging Face hub: pytest -m hub'))
        if MISSING and item.get_closest_marker('judge'):
            item.add_marker(pytest.mark.skip(reason=f'{", ".join(MISSING)} not installed'))


MISSING = [name for name in ('cv2', 'timm', 'torch', 'transformers') if importlib.util.find_spec(name) is None]


class NotInstalled(pytest.Module):
    """A file of `tests/judges`, skipped because the libraries it imports are not installed."""

    def collect(self):
        pytest.skip(f'{", ".join(MISSING)} not installed: `make test-judges` installs them')


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return (
        NotInstalled.from_parent(parent, path=module_path) if MISSING and module_path.parent.name == 'judges' else None
    )


# A short run that starts from another run, with two more outputs, another resolution, and a learning rate so low that
# the weights hardly change.
FINE_TUNING_STEPS = 8
FINE_TUNING = (
    f'--config.steps={FINE_TUNING_STEPS}',
    '--config.model.num_classes=12',
    '--config.data.image_size=36',
    '--config.optimizer.learning_rate=1e-12',
    '--config.optimizer.min_learning_rate=1e-12',
)


class Commands:
    """Runs the project's commands in subprocesses that see one device."""

    def start(self, *arguments: object) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | ONE_DEVICE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object, status: int = 0) -> subprocess.CompletedProcess:
        """Runs a command to its end and asserts its exit status."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        finally:
            if process.poll() is None:
                kill([*descendants(process.pid), process.pid])
        assert process.returncode == status, f'exit status {process.returncode}, expected {status}\n{out}\n{err}'
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def train(self, workdir: Path, *overrides: str, status: int = 0) -> subprocess.CompletedProcess:
        return self.run(*SMALL_TRAIN, f'--workdir={workdir}', *overrides, status=status)


def strict_json(text: str) -> object:
    """Parses JSON as strictly as other programs do: NaN and Infinity fail the test."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))


def fingerprints(workdir: Path, step: int = STEPS) -> dict:
    """The fingerprint of every array in a checkpoint: parameters, optimizer, moving average and counters."""
    return json.loads((workdir / 'checkpoints' / str(step) / 'manifest' / 'metadata').read_text())['arrays']


def descendants(pid: int) -> list[int]:
    """The child processes of a process, their children, and so on (Linux)."""
    found = []
    for children in Path(f'/proc/{pid}/task').glob('*/children'):  # one file per thread
        with contextlib.suppress(OSError):  # the thread has ended
            for child in map(int, children.read_text().split()):
                found += [child, *descendants(child)]
    return found


def is_resource_tracker(pid: int) -> bool:
    """Whether this is the process that `multiprocessing` starts once for all tests; it ends with pytest."""
    try:
        return b'multiprocessing.resource_tracker' in Path(f'/proc/{pid}/cmdline').read_bytes()
    except OSError:
        return False  # it has ended


def kill(pids: list[int]) -> None:
    """Kills processes, and ignores those that have ended already."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Kills the processes that a test left running, even if the test failed or they run in their own session."""
    before = set(descendants(os.getpid()))
    yield
    kill([pid for pid in descendants(os.getpid()) if pid not in before and not is_resource_tracker(pid)])


@pytest.fixture(scope='session')
def commands() -> Commands:
    return Commands()


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands called in this process see one device, as in a subprocess, so that both give bit-identical results."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, 'devices', lambda *_: first)


@pytest.fixture
def no_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switches the checks of shapes and dtypes off, so that a test gets the error that a user would get."""
    monkeypatch.setattr(config, 'jaxtyping_disable', True)


def shrink_models(patch: pytest.MonkeyPatch, **sizes: tuple[int, ...]) -> None:
    """Replaces the atto models with small models in this process."""
    for name, variant in small_variants(**sizes).items():
        patch.setitem(VARIANTS, name, variant)


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the atto models in this process with models that have two stages of one narrow block each."""
    shrink_models(monkeypatch)


@pytest.fixture
def train_here(one_device: None, small_models: None, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """`Commands.train` in this process: returns stdout and raises the errors of the command."""

    def train(workdir: Path, *overrides: str) -> str:
        capsys.readouterr()
        train_command.main(['train.py', *SMALL_RUN, f'--workdir={workdir}', *overrides])
        return capsys.readouterr().out

    return train


@pytest.fixture(scope='session')
def small_run(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a small run that was never interrupted.

    The first pytest-xdist worker that needs the run trains it, and the other workers wait.
    """
    folder = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        folder = folder.parent  # all workers share it
    with open(folder / 'finished.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / 'finished.done').exists():
            commands.train(folder / 'finished')
            (folder / 'finished.done').touch()
    return folder / 'finished'


@pytest.fixture
def finished_run(small_run: Path, small_models: None) -> Path:
    """The workdir of a finished run, with its model registered in this process. Tests copy it before they change it."""
    return small_run
