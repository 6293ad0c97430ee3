"""Compiles the training step of a config for chips that do not have to be attached."""

import dataclasses
import time
from typing import Any

import jax
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from convnext_jax.errors import first_line
from convnext_jax.plan.kernels import kernel_cycles
from convnext_jax.plan.targets import Target
from convnext_jax.tasks import make_task
from convnext_jax.training.durations import make_durations
from convnext_jax.training.program import Program
from convnext_jax.training.sharding import make_mesh

IMAGENET_IMAGES = 1_281_167
"""Number of training images in ImageNet-1k. It determines the number of steps, which is a constant in the program."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of each chip during a training step, in bytes.

    Attributes:
        arguments: the state and the batch. The next state reuses the memory of the donated state.
        results: outputs that do not reuse the memory of an argument.
        temporaries: peak of intermediate arrays.
        program: the compiled code.
    """

    arguments: int
    results: int
    temporaries: int
    program: int

    @property
    def total(self) -> int:
        return self.arguments + self.results + self.temporaries + self.program


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The result of compiling a training step.

    Attributes:
        images: number of images per chip in one accumulation step.
        seconds: duration of the compilation.
        memory: memory that the program needs.
        text: the program in HLO.
        kernel_cycles: name of a Pallas kernel → its cycles; {} if the target has no folder for listings.
    """

    images: int
    seconds: float
    memory: Memory
    text: str
    kernel_cycles: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DoesNotFit:
    """A training step that needs more than the memory of a chip.

    Attributes:
        images, seconds: as for `Compiled`.
        error: the error of the compiler.
    """

    images: int
    seconds: float
    error: str


def compile_step(config: ConfigDict, target: Target, images: int) -> Compiled | DoesNotFit:
    """Compiles the training step.

    Args:
        config: the config of the experiment; its batch_size is not used.
        target: the chips.
        images: number of images per chip in one accumulation step.

    Raises:
        UserError: as for `make_durations`, `make_mesh` and `Task.build`.
    """
    config = config.copy_and_resolve_references()
    config.batch_size = images * len(target.devices) * config.accumulation_steps
    make_task(config).assume_data()
    mesh = make_mesh(**config.mesh, devices=target.devices)
    program = Program(config, make_durations(config, IMAGENET_IMAGES), mesh)
    if target.listings:
        for path in target.listings.iterdir():  # listings of the previous program
            path.unlink()
    began = time.perf_counter()
    try:
        # Pallas kernels read the GPU model from the surrounding mesh, because no GPU is attached.
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=mesh.abstract_mesh.abstract_device)):
            compiled = program.compile(program.abstract_state, program.abstract_batch, target.options)
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return DoesNotFit(images, time.perf_counter() - began, first_line(error))
    stats: Any = compiled.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        results=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        program=stats.generated_code_size_in_bytes,
    )
    seconds, text = time.perf_counter() - began, compiled.as_text() or ''
    cycles = kernel_cycles(text, target.listings) if target.listings else {}
    return Compiled(images, seconds, memory, text, cycles)
