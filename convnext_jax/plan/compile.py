"""The training step of a config, compiled for chips that need not be there."""

import dataclasses
import time
from typing import Any

import jax
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from convnext_jax.errors import first_line
from convnext_jax.plan.targets import Target
from convnext_jax.tasks import make_task
from convnext_jax.training.durations import make_durations
from convnext_jax.training.program import Program
from convnext_jax.training.sharding import make_mesh

IMAGES = 1_281_167
"""Of ImageNet-1k: they set the number of steps, which the program holds, and which changes nothing of its size."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each chip while a step runs.

    Attributes:
        arguments: state and batch; the next state takes the place of the last.
        results: what has no place among the arguments.
        temporaries: at their peak.
        program: the code.
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
    """What the compiler made of the step.

    Attributes:
        images: on each chip at once.
        seconds: that it took.
        memory: None if the program does not fit.
        text: the program in HLO; the compiler's complaint if it does not fit.
    """

    images: int
    seconds: float
    memory: Memory | None
    text: str


def compile_step(config: ConfigDict, target: Target, images: int) -> Compiled:
    """Compiles the step for so many images on each chip at once.

    Raises:
        UserError: as `make_durations`, `make_mesh` and `Task.build`.
    """
    config = config.copy_and_resolve_references()
    config.batch_size = images * len(target.devices) * config.accumulation_steps
    make_task(config).assume_data()
    mesh = make_mesh(**config.mesh, devices=target.devices)
    program = Program(config, make_durations(config, IMAGES), mesh)
    began = time.perf_counter()
    try:
        # Pallas kernels are lowered for the GPU that the mesh around them describes: there is none here.
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=mesh.abstract_mesh.abstract_device)):
            compiled = program.compile(program.abstract_state, program.abstract_batch, target.options)
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return Compiled(images, time.perf_counter() - began, None, first_line(error))
    stats: Any = compiled.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        results=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        program=stats.generated_code_size_in_bytes,
    )
    return Compiled(images, time.perf_counter() - began, memory, compiled.as_text() or '')
