"""The benchmark's processes, seen from the command."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from convnext_jax.benchmark.contenders.contender import MATMUL_SIDE, Task
from convnext_jax.cpu_settings import missing_settings

RUN = Path(__file__).parent / 'contenders' / 'run.py'
TURN_SECONDS = 3.0
# Compile times are those of a first start, and no process takes a device's whole memory for itself.
ENVIRONMENT = {
    'JAX_ENABLE_COMPILATION_CACHE': 'false',
    'TORCHINDUCTOR_FORCE_DISABLE_CACHES': '1',
    'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
}


class Kind(NamedTuple):
    """Attributes: the module under contenders/, and the packages that must be installed."""

    module: str
    needs: tuple[str, ...]


OURS = 'convnext_jax'
PEERS = {
    'timm': Kind('on_torch', ('torch', 'timm')),
    'transformers': Kind('on_torch', ('torch', 'transformers')),
    'compile': Kind('on_torch', ('torch', 'timm')),
    'flax': Kind('plain_flax', ('flax',)),
    'keras': Kind('with_keras', ('keras',)),
}
CONTENDERS = {OURS: Kind('ours', ())} | PEERS


class Lost(Exception):
    """A contender cannot go on; says why in one line."""


class Entrant:
    """A contender in a process of its own, which ends with this one, however that ends. Use as a context manager.

    Attributes:
        device: 'cpu', or the accelerator's name.
        compile_seconds: those of its first step, less a warm step's.
        peak_memory: bytes of the process's resident memory, from its start over three steps; None if it is not known.
        images_per_second: of each turn.
        matmul_flops: FLOP/s of the best of a few matrix products, at the end of each turn.

    Args:
        task: what it is told.
        parameters: how many its model must have.

    Raises:
        Lost: it could not be set up, or its model is another one.
    """

    def __init__(self, task: Task, parameters: int):
        self._batch = task.batch
        self._process = subprocess.Popen(
            [sys.executable, str(RUN), CONTENDERS[task.contender].module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | ENVIRONMENT | (missing_settings() if task.contender == OURS else {}),
            text=True,
            start_new_session=True,  # Ctrl-C is the command's to answer
        )
        self.images_per_second: list[float] = []
        self.matmul_flops: list[float] = []
        try:
            ready = self._ask(dataclasses.asdict(task))
            if ready['parameters'] != parameters:
                raise Lost(f'its {task.model} has {ready["parameters"]:,} parameters, and not {parameters:,}')
        except BaseException:
            self.end()
            raise
        self.device: str = ready['device']
        self.peak_memory: int | None = ready['peak_memory']
        self.compile_seconds = max(ready['first_step'] - ready['warm_step'], 0.0)
        self._steps = max(round(TURN_SECONDS / ready['warm_step']), 1)

    def turn(self) -> None:
        """Runs as many steps as took TURN_SECONDS when it was set up, at least one, and one before that.

        Raises:
            Lost: it could not.
        """
        answer = self._ask(self._steps)
        self.images_per_second.append(self._steps * self._batch / answer['seconds'])
        self.matmul_flops.append(2 * MATMUL_SIDE**3 / answer['matmul'])

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> 'Entrant':
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
            raise Lost(f'its process ended: {_how(self._process.wait())}')
        answer = json.loads(line)
        if 'error' in answer:
            raise Lost(answer['error'])
        return answer


def _how(status: int) -> str:
    return f'exit status {status}' if status >= 0 else signal.Signals(-status).name
