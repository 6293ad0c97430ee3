"""The table of implementations, and the class with which the command runs each of them in its own process."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.compare.baselines.workload import Workload
from convnext_jax.runtime.cpu_settings import missing_settings

ROOT = Path(__file__).parents[2]
MODULES = 'benchmarks.compare.baselines'
RUN = (sys.executable, '-m', f'{MODULES}.run')
ROUND_SECONDS = 3.0
# No caches, so that every start compiles. No preallocation of memory, because the processes share a device.
ENVIRONMENT = {
    'JAX_ENABLE_COMPILATION_CACHE': 'false',
    'TORCHINDUCTOR_FORCE_DISABLE_CACHES': '1',
    'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
}


class Implementation(NamedTuple):
    """How an implementation is run.

    Attributes:
        module: module with the function `build`.
        packages: packages that it needs.
        runs_timm_models: whether it runs the models timm:NAME.
    """

    module: str
    packages: tuple[str, ...]
    runs_timm_models: bool = False


OURS = 'convnext_jax'
BASELINES = {
    'timm': Implementation(f'{MODULES}.on_torch', ('torch', 'timm'), runs_timm_models=True),
    'transformers': Implementation(f'{MODULES}.on_torch', ('torch', 'transformers')),
    'compile': Implementation(f'{MODULES}.on_torch', ('torch', 'timm'), runs_timm_models=True),
    'compile_max': Implementation(f'{MODULES}.on_torch', ('torch', 'timm'), runs_timm_models=True),
    'flax': Implementation(f'{MODULES}.plain_flax', ('flax',)),
    'keras': Implementation(f'{MODULES}.with_keras', ('keras',)),
}
DEFAULT_BASELINES = [name for name in BASELINES if name != 'compile_max']  # compile_max tunes kernels for many minutes
IMPLEMENTATIONS = {OURS: Implementation(f'{MODULES}.ours', ())} | BASELINES


class BaselineFailed(Exception):
    """An implementation cannot be measured; the message is one line."""


class BaselineProcess:
    """One implementation, a baseline or ours, in its own process. Use as a context manager.

    The started process ends when the command ends, even if the command is killed.

    Args:
        workload: the computation.
        parameters: number of parameters that the model must have.

    Attributes:
        device: 'cpu', or the name of the accelerator.
        compile_seconds: time of the first step minus the time of a warm step.
        peak_memory: peak memory over set-up and three steps, in bytes: on CPU the resident memory of the process, on an
            accelerator the memory of arrays; None if unknown.
        images_per_second: one value for each round.
        matmul_side: rows and columns of the matrices for `matmul_flops`.
        matmul_flops: FLOP/s of the fastest of a few matrix products, one value for each round.
        copy_bandwidth: bytes/s, read plus written, of the fastest of a few large copies, one value for each round.

    Raises:
        BaselineFailed: the set-up failed, or the model has another number of parameters.
    """

    def __init__(self, workload: Workload, parameters: int):
        self._batch = workload.batch
        self._process = subprocess.Popen(
            [*RUN, IMPLEMENTATIONS[workload.implementation].module],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | ENVIRONMENT | (missing_settings() if workload.implementation == OURS else {}),
            text=True,
            start_new_session=True,  # Ctrl-C goes only to the command, which then ends the process
        )
        self.images_per_second: list[float] = []
        self.matmul_side: int | None = None
        self.matmul_flops: list[float] = []
        self.copy_bandwidth: list[float] = []
        try:
            ready = self._ask(dataclasses.asdict(workload))
            if ready['parameters'] != parameters:
                raise BaselineFailed(f'its {workload.model} has {ready["parameters"]:,} parameters, not {parameters:,}')
        except BaseException:
            self.end()
            raise
        self.device: str = ready['device']
        self.peak_memory: int | None = ready['peak_memory']
        self.compile_seconds = max(ready['first_step'] - ready['warm_step'], 0.0)
        self._steps = max(round(ROUND_SECONDS / ready['warm_step']), 1)

    def run_round(self) -> None:
        """Times about `ROUND_SECONDS` of steps, at least one step, after one untimed step.

        Raises:
            BaselineFailed: a step failed, or the process ended.
        """
        answer = self._ask(self._steps)
        self.images_per_second.append(self._steps * self._batch / answer['seconds'])
        self.matmul_side = answer['matmul_side']
        self.matmul_flops.append(answer['matmul_flops'])
        self.copy_bandwidth.append(answer['copy_bandwidth'])

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> 'BaselineProcess':
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _ask(self, question: dict | int) -> dict:
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ''
        if not line:
            raise BaselineFailed(f'its process ended: {_describe_status(self._process.wait())}')
        answer = json.loads(line)
        if 'error' in answer:
            raise BaselineFailed(answer['error'])
        return answer


def _describe_status(status: int) -> str:
    return f'exit status {status}' if status >= 0 else signal.Signals(-status).name
