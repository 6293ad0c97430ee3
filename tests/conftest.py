"""Eight simulated devices for the tests in this process, and a way to run the commands as a user does."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Most of the tests' time is compiling: with fewer of LLVM's passes, and all processes share a cache.
DEVICES = '--xla_backend_optimization_level=1 --xla_force_host_platform_device_count='
ONE_DEVICE = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'{DEVICES}1'}
os.environ |= {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'{DEVICES}8', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5'}
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = tempfile.TemporaryDirectory(prefix='compiled')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = cache.name

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for train.py and eval.py
STEPS = 24
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
        out, err = process.communicate(timeout=300)
        assert process.returncode == status, f'status {process.returncode}, not {status}\n{out}\n{err}'
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def train(self, workdir: Path, *overrides: str, status: int = 0) -> subprocess.CompletedProcess:
        return self.run('train.py', *SMALL_RUN, f'--workdir={workdir}', *overrides, status=status)


def fingerprints(workdir: Path, step: int = STEPS) -> dict:
    """Of every array of the checkpoint: parameters, optimizer, moving average and counters."""
    return json.loads((workdir / 'checkpoints' / str(step) / 'manifest' / 'metadata').read_text())['arrays']


@pytest.fixture(scope='session')
def commands() -> Commands:
    return Commands()


@pytest.fixture(scope='session')
def finished_run(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a small run that nothing interrupted; tests copy it before they change it."""
    workdir = tmp_path_factory.mktemp('finished') / 'run'
    commands.train(workdir)
    return workdir
