"""Differences between the losses of one run on several topologies, with train.py and the same config and seed.

    python -m benchmarks.topologies [--steps=50] [--config.FIELD=VALUE …]

The topologies consist of simulated CPU devices: one device; one device with two accumulation steps, which shows the
effect of rounding alone; eight devices along `data`; 4 × 2 devices along `data` and `fsdp`; and each of these two
meshes of eight devices in two processes. The config is the demo with drop path, RandAugment, erasing, mixup and cutmix,
and with a learning rate of 1e-5: with 1.2e-2 as in the demo, rounding differences grow from 1e-7 to 7e-4 within 50
steps. The losses are read from metrics.jsonl. The command takes minutes, mostly for compiling.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from convnext_jax.monitoring.records import read_records

SETTINGS = (
    '--config=configs/fashion_mnist.py',
    '--config.model.drop_path_rate=0.2',
    '--config.augment.policy=rand-m9-mstd0.5-inc1',
    '--config.augment.erasing=0.25',
    '--config.mix.mixup=0.8',
    '--config.mix.cutmix=1.0',
    '--config.optimizer.warmup_steps=10',
    '--config.optimizer.learning_rate=1e-5',
    '--config.data.eval_split=test[:64]',
    '--config.log_every_steps=1',
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices and processes of a run.

    Attributes:
        devices: number of devices of each process.
        fsdp: `config.mesh.fsdp`.
        processes: number of processes.
        parts: `config.accumulation_steps`.
    """

    devices: int
    fsdp: int = 1
    processes: int = 1
    parts: int = 1


TOPOLOGIES = {
    '1 device': Topology(1),
    '1 device, two parts': Topology(1, parts=2),
    '8 devices': Topology(8),
    '4 × 2 (data × fsdp)': Topology(8, fsdp=2),
    '2 processes × 4': Topology(4, processes=2),
    '2 processes, 4 × 2': Topology(4, fsdp=2, processes=2),
}


def losses(topology: Topology, settings: list[str]) -> np.ndarray:
    """The training loss of each step."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': f'--xla_force_host_platform_device_count={topology.devices}',
        }
        launcher = ['launch/local.py', str(topology.processes), '--'] if topology.processes > 1 else []
        flags = [f'--config.mesh.fsdp={topology.fsdp}', f'--config.accumulation_steps={topology.parts}']
        subprocess.run(
            [sys.executable, *launcher, 'train.py', *settings, *flags, f'--workdir={folder}'],
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        records = read_records(Path(folder))
    return np.asarray([record['loss'] for record in records if record['split'] == 'train'])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=50)
    arguments, overrides = parser.parse_known_args()
    settings = [*SETTINGS, f'--config.steps={arguments.steps}', *overrides]
    first = None
    print(f'{"":22}{"first loss":>12}{"last loss":>12}   largest relative difference: steps 1–10, all steps')
    for name, topology in TOPOLOGIES.items():
        own = losses(topology, settings)
        first = own if first is None else first
        differences = np.abs(own / first - 1)
        largest = f'{differences[:10].max():.1e}, {differences.max():.1e}'
        print(f'{name:22}{own[0]:12.6f}{own[-1]:12.6f}   {largest}', flush=True)


if __name__ == '__main__':
    main()
