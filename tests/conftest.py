"""Eight simulated devices for the tests in this process, and a way to run the commands as a user does."""

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
from pathlib import Path

import pytest

# Most of the tests' time is compiling: with fewer of LLVM's passes, and all processes share a cache.
DEVICES = '--xla_backend_optimization_level=0 --xla_force_host_platform_device_count='
ONE_DEVICE = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'{DEVICES}1'}
os.environ |= {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{DEVICES}8',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
}
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:  # pytest-xdist's workers have the environment of their parent
    cache = tempfile.TemporaryDirectory(prefix='compiled')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = cache.name

# In the background of a script the tests start with SIGINT ignored, and so would every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for train.py and eval.py

import jax  # noqa: E402 - reads the environment
from small import small_variants  # noqa: E402

import train as train_command  # noqa: E402
from convnext_jax.models.variants import VARIANTS  # noqa: E402

STEPS = 24
LONGEST = 900
"""Seconds that a process may take on a busy machine: more is a hang."""
# Seconds of training: ten batches an epoch, and 40 images to evaluate.
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
    """`pytest -m gpu` runs on the GPU, everything else on CPU."""
    if config.getoption('markexpr') == 'gpu':
        del os.environ['JAX_PLATFORMS']


# pytest-xdist gives whole files to its workers in this order: a long one at the end would leave a worker waiting, as
# would two at the beginning that need the finished run.
LONGEST_FILES = (
    'test_processes.py',
    'test_sharding.py',
    'test_loop.py',
    'test_commands.py',
    'test_compare.py',
    'test_throughput.py',
    'test_step.py',
    'test_stop.py',
    'test_task.py',
    'test_reference.py',
    'test_backbone.py',
    'test_pretrained.py',
    'test_parity.py',
    'test_loading.py',
)


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts commands or trains is slow, besides what is marked as slow where it stands."""
    names = {name: number for number, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: names.get(item.path.name, len(names)))
    for item in items:
        if {'commands', 'finished_run', 'one_device', 'runs'} & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


MISSING = [name for name in ('torch', 'timm', 'transformers') if importlib.util.find_spec(name) is None]


class NotInstalled(pytest.Module):
    """A file of `tests/judges` that cannot be imported."""

    def collect(self):
        pytest.skip(f'{", ".join(MISSING)} not installed: make test-judges does it')


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return (
        NotInstalled.from_parent(parent, path=module_path) if MISSING and module_path.parent.name == 'judges' else None
    )


# A short run that starts from another one: two outputs more, another resolution, rates that leave the weights alone.
FINE_TUNING_STEPS = 8
FINE_TUNING = (
    f'--config.steps={FINE_TUNING_STEPS}',
    '--config.model.num_classes=12',
    '--config.data.image_size=36',
    '--config.optimizer.learning_rate=1e-12',
    '--config.optimizer.min_learning_rate=1e-12',
)


class Commands:
    """Starts the project's commands in processes of their own, on one device."""

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
        """Runs to the end, and insists on the exit status."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=LONGEST)
        finally:
            if process.poll() is None:
                kill([*processes_below(process.pid), process.pid])
        assert process.returncode == status, f'status {process.returncode}, not {status}\n{out}\n{err}'
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def train(self, workdir: Path, *overrides: str, status: int = 0) -> subprocess.CompletedProcess:
        return self.run(*SMALL_TRAIN, f'--workdir={workdir}', *overrides, status=status)


def strict_json(text: str) -> object:
    """The value of a JSON text, read as other programs read it: without NaN and Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))


def fingerprints(workdir: Path, step: int = STEPS) -> dict:
    """Of every array of the checkpoint: parameters, optimizer, moving average and counters."""
    return json.loads((workdir / 'checkpoints' / str(step) / 'manifest' / 'metadata').read_text())['arrays']


def processes_below(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have started (Linux)."""
    found = []
    for children in Path(f'/proc/{pid}/task').glob('*/children'):  # the children of each thread
        with contextlib.suppress(OSError):  # the thread has ended
            for child in map(int, children.read_text().split()):
                found += [child, *processes_below(child)]
    return found


def is_resource_tracker(pid: int) -> bool:
    """Whether it is the process that `multiprocessing` starts once for all tests; it ends with the tests' process."""
    try:
        return b'multiprocessing.resource_tracker' in Path(f'/proc/{pid}/cmdline').read_bytes()
    except OSError:
        return False  # it has ended


def kill(pids: list[int]) -> None:
    """Kills processes, some of which may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Kills the processes that a test has started and left, in sessions of their own too, also after a failure."""
    before = set(processes_below(os.getpid()))
    yield
    kill([pid for pid in processes_below(os.getpid()) if pid not in before and not is_resource_tracker(pid)])


@pytest.fixture(scope='session')
def commands() -> Commands:
    return Commands()


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process's commands see one of its devices, as those do that are started: the same programs and bits."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, 'devices', lambda *_: first)


def shrink_models(patch: pytest.MonkeyPatch, **sizes: tuple[int, ...]) -> None:
    """Replaces the atto models of this process by small ones."""
    for name, variant in small_variants(**sizes).items():
        patch.setitem(VARIANTS, name, variant)


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The atto models of this process have two stages of one narrow block."""
    shrink_models(monkeypatch)


@pytest.fixture
def train_here(one_device: None, small_models: None, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """`Commands.train` in this process: gives what it printed, and raises its errors."""

    def train(workdir: Path, *overrides: str) -> str:
        capsys.readouterr()
        train_command.main(['train.py', *SMALL_RUN, f'--workdir={workdir}', *overrides])
        return capsys.readouterr().out

    return train


@pytest.fixture(scope='session')
def small_run(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a small run that nothing interrupted.

    The first worker of pytest-xdist that asks for it trains it, and the others wait.
    """
    folder = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        folder = folder.parent  # the workers have it in common
    with open(folder / 'finished.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / 'finished.done').exists():
            commands.train(folder / 'finished')
            (folder / 'finished.done').touch()
    return folder / 'finished'


@pytest.fixture
def finished_run(small_run: Path, small_models: None) -> Path:
    """The workdir of a finished run, whose model this process knows; tests copy it before they change it."""
    return small_run
