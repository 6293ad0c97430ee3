"""Accelerators to compile for: their devices as the compiler sees them."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path

import jax
from jax.experimental import topologies

from convnext_jax.errors import UserError, first_line
from convnext_jax.runtime.chips import CHIPS, Chip

H100 = Path(__file__).with_name('h100.txtpb')


@dataclasses.dataclass(frozen=True)
class Target:
    """So many chips of a kind, none of which need be there.

    Attributes:
        name: as the user gave it.
        compiler: package and version.
        options: of the compiler.
    """

    name: str
    chip: Chip
    devices: list[jax.Device]
    compiler: str
    options: dict[str, str | bool] = dataclasses.field(default_factory=dict)


def tpu_target(name: str) -> Target:
    """A TPU slice, as v5e:16x16.

    Raises:
        UserError: there is no such slice, or libtpu is not installed.
    """
    kind, _, shape = name.partition(':')
    if kind not in ('v5e', 'v5p', 'v6e') or not re.fullmatch(r'\d+(x\d+)+', shape):
        raise UserError(f"--topology is a slice of v5e, v5p or v6e, as v5e:16x16 or v5p:4x4x4, not '{name}'")
    if not importlib.util.find_spec('libtpu'):
        raise UserError(
            f"--topology needs libtpu, the TPU's compiler, and no TPU: pip install 'jax[tpu]=={jax.__version__}'"
        )
    # A chip of this machine is neither looked for nor taken, even if another process uses it. The next two say what
    # libtpu would ask the cloud for, and complain about.
    for variable, value in {
        'TPU_SKIP_MDS_QUERY': '1',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-1',
        'TPU_WORKER_HOSTNAMES': 'localhost',
    }.items():
        os.environ.setdefault(variable, value)
    try:
        devices = topologies.get_topology_desc(platform='tpu', topology_name=name).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f'--topology={name}: {first_line(error)}') from error
    return Target(name, CHIPS[kind], devices, f'libtpu {importlib.metadata.version("libtpu")}')


def gpu_target(name: str) -> Target:
    """The GPUs of one machine, as h100:8.

    Raises:
        UserError: it is no H100, or the compiler for it is not installed.
    """
    kind, _, count = name.partition(':')
    if kind != 'h100' or not re.fullmatch(r'[1-9]\d*', count):
        raise UserError(f"--gpu is so many H100 of one machine, as h100:8, not '{name}'")
    plugins = [name for name in ('jax_cuda13_plugin', 'jax_cuda12_plugin') if importlib.util.find_spec(name)]
    if not plugins:
        packages = f'jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}'
        raise UserError(f"--gpu needs the GPU's compiler, and no GPU: pip install --no-deps {packages}")
    devices = topologies.get_topology_desc(
        platform='cuda', topology=f'1x1x{count}', target_config=H100.read_text(encoding='utf-8')
    ).devices
    plugin = plugins[0].replace('_', '-')
    compiler = f'{plugin} {importlib.metadata.version(plugin)}'
    # On a GPU each matrix product is tried with Triton and with cuBLAS. Where nothing can be tried the compiler takes
    # Triton, with tiles that it then refuses for some shapes.
    return Target(name, CHIPS[kind], devices, compiler, {'xla_gpu_enable_triton_gemm': False})
