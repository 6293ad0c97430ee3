"""Target: accelerators to compile for, with the device descriptions that the compiler needs."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path

import jax
from jax.experimental import topologies

from convnext_jax.errors import UserError, first_line
from convnext_jax.plan.kernels import listing_flags
from convnext_jax.runtime.chips import CHIPS, Chip

H100 = Path(__file__).with_name('h100.txtpb')


@dataclasses.dataclass(frozen=True)
class Target:
    """A number of chips of one kind, which do not have to be attached.

    Attributes:
        name: the name that the user gave, such as 'v5e:4x4'.
        chip: memory and speed of a chip.
        devices: descriptions of the devices.
        compiler: package and version of the compiler.
        options: compiler options.
        listings: folder into which the compiler writes the instructions of fusions and kernels, or None.
    """

    name: str
    chip: Chip
    devices: list[jax.Device]
    compiler: str
    options: dict[str, str | bool] = dataclasses.field(default_factory=dict)
    listings: Path | None = None


def tpu_target(name: str, listings: Path | None = None) -> Target:
    """The target for a TPU slice.

    Args:
        name: KIND:SHAPE, such as 'v5e:16x16'.
        listings: empty folder for the instructions, from which `kernel_cycles` counts the cycles of Pallas kernels.
            libtpu reads the name of the folder once per process, so all targets need the same one.

    Raises:
        UserError: there is no such slice, or libtpu is not installed.
    """
    kind, _, shape = name.partition(':')
    if kind not in ('v5e', 'v5p', 'v6e') or not re.fullmatch(r'\d+(x\d+)+', shape):
        raise UserError(
            f"--topology needs a slice of v5e, v5p or v6e, for example v5e:16x16 or v5p:4x4x4, not '{name}'"
        )
    if not importlib.util.find_spec('libtpu'):
        raise UserError(
            f"--topology needs the TPU compiler libtpu (but no TPU): pip install 'jax[tpu]=={jax.__version__}'"
        )
    # The first two keep libtpu from searching for TPUs of this machine and from locking them. The other two are values
    # that libtpu otherwise requests from the cloud metadata server, with a warning if it cannot.
    for variable, value in {
        'TPU_SKIP_MDS_QUERY': '1',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-1',
        'TPU_WORKER_HOSTNAMES': 'localhost',
    }.items():
        os.environ.setdefault(variable, value)
    if listings:
        os.environ['LIBTPU_INIT_ARGS'] = f'{os.environ.get("LIBTPU_INIT_ARGS", "")} {listing_flags(listings)}'
    try:
        devices = topologies.get_topology_desc(platform='tpu', topology_name=name).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f'--topology={name}: {first_line(error)}') from error
    compiler = f'libtpu {importlib.metadata.version("libtpu")}'
    return Target(name, CHIPS[kind], devices, compiler, listings=listings)


def gpu_target(name: str) -> Target:
    """The target for the GPUs of one machine.

    Args:
        name: KIND:COUNT, such as 'h100:8'.

    Raises:
        UserError: the kind is not 'h100', or the compiler for GPUs is not installed.
    """
    kind, _, count = name.partition(':')
    if kind != 'h100' or not re.fullmatch(r'[1-9]\d*', count):
        raise UserError(f"--gpu needs h100:COUNT, for example h100:8, not '{name}'")
    plugins = [name for name in ('jax_cuda13_plugin', 'jax_cuda12_plugin') if importlib.util.find_spec(name)]
    if not plugins:
        packages = f'jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}'
        raise UserError(f'--gpu needs the GPU compiler (but no GPU): pip install --no-deps {packages}')
    devices = topologies.get_topology_desc(
        platform='cuda', topology=f'1x1x{count}', target_config=H100.read_text(encoding='utf-8')
    ).devices
    plugin = plugins[0].replace('_', '-')
    compiler = f'{plugin} {importlib.metadata.version(plugin)}'
    # With a GPU, the compiler times each matrix product with Triton and with cuBLAS. Without one, it uses Triton, with
    # tile sizes that fail to compile for some shapes.
    return Target(name, CHIPS[kind], devices, compiler, {'xla_gpu_enable_triton_gemm': False})
