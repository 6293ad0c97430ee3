"""Share of a training step that collectives take on slices of TPU v5e, computed from published link speeds.

    python -m benchmarks.scaling

It prints one JSON object for each model, mesh and number of slices. The bytes follow from the parameters and their
sharding; `python -m convnext_jax plan` reports the same bytes for the compiled step. Nothing here is measured.

The gradient of replicated parameters is all-reduced in float32. With `mesh.fsdp`, kernels are all-gathered in bfloat16
in the forward and in the backward pass, and their gradients are reduce-scattered along `fsdp` and all-reduced along
`data` in float32. Between two slices, each chip exchanges its shard of the sums over its own slice.
"""

import dataclasses

import jax
import numpy as np

from convnext_jax.configs.imagenet1k import get_config
from convnext_jax.models import get_parameters, parameter_roles
from convnext_jax.output import show, to_json
from convnext_jax.runtime.chips import CHIPS
from convnext_jax.tasks import abstract_model, make_task
from convnext_jax.training.sharding import parameter_shardings

CHIPS_OF_A_JOB = (8, 16, 32, 64, 128, 256)
MILLISECONDS = {'tiny': 65, 'base': 157, 'large': 271}
"""Duration of a step without collectives, for 64 images on each chip: the estimates in docs/planning.md."""

TORUS = 256
"""Number of chips of a slice that is a torus, in which every chip has all four links. In a smaller slice, the chips at
the corners have only two links, which limits an all-reduce."""

NETWORK = 6.4e12 / 8 / 256
"""Bytes per second that each chip can send to other slices: 6.4 Tbit/s for 256 chips."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that each chip sends in one step.

    Attributes:
        inside: to other chips of its slice.
        between: to other slices.
    """

    inside: float
    between: float


def traffic(replicated: float, sharded: float, chips: int, slices: int, fsdp: int) -> Traffic:
    """The bytes of a step.

    Args:
        replicated, sharded: numbers of elements of the parameters that are replicated, and sharded along `fsdp`.
        chips: number of all chips.
        slices: number of slices.
        fsdp: `config.mesh.fsdp`.
    """
    inside = chips // slices
    along_data = inside // fsdp
    gathered = 2 * 2 * sharded * (fsdp - 1) / fsdp
    scattered = 4 * sharded * (fsdp - 1) / fsdp
    reduced = 2 * 4 * (replicated * (inside - 1) / inside + sharded / fsdp * (along_data - 1) / along_data)
    between = 2 * (slices - 1) / slices * 4 * (replicated + sharded) / inside
    return Traffic(gathered + scattered + reduced, between)


def share(sent: Traffic, chips: int, slices: int, milliseconds: float) -> float:
    """The share of the step that collectives take if they are not overlapped with computation."""
    link = CHIPS['v5e'].link
    assert link
    speed = 1e9 * (link if chips // slices == TORUS else link / 2)
    seconds = sent.inside / speed + sent.between / NETWORK
    return seconds / (seconds + milliseconds / 1000)


def sizes(variant: str, fsdp: int) -> tuple[float, float]:
    """Numbers of elements of the parameters that are replicated, and sharded along `fsdp`."""
    config = get_config(variant)
    make_task(config).assume_data()  # sets the number of classes
    model = abstract_model(config)
    mesh = jax.sharding.AbstractMesh((1, fsdp), ('data', 'fsdp'))
    parameters = get_parameters(model)
    shardings = parameter_shardings(mesh, parameter_roles(model), parameters)
    sharded = sum(np.prod(x.shape) for name, x in parameters.items() if not shardings[name].is_fully_replicated)
    return sum(np.prod(x.shape) for x in parameters.values()) - sharded, sharded


def main() -> None:
    for variant, milliseconds in MILLISECONDS.items():
        for fsdp, slices in ((1, 1), (1, 2), (4, 1), (4, 2)):
            row: dict[str, object] = {
                'model': f'ConvNeXt-{variant[0].upper()}',
                'mesh': 'data' if fsdp == 1 else f'data × fsdp={fsdp}',
                'collectives': 'all-reduce' if fsdp == 1 else 'all-gather, reduce-scatter, all-reduce',
                'slices': slices,
            }
            for chips in CHIPS_OF_A_JOB:
                images = 4096 // chips
                sent = traffic(*sizes(variant, fsdp), chips, slices, fsdp)
                row[f'inside_mb_{chips}'] = round(sent.inside / 1e6)
                row[f'between_mb_{chips}'] = round(sent.between / 1e6, 1)
                row[f'percent_{chips}'] = round(100 * share(sent, chips, slices, milliseconds), 1)
                if images < 64:
                    shorter = milliseconds * images / 64
                    row[f'percent_{chips}_of_4096_images'] = round(100 * share(sent, chips, slices, shorter), 1)
            show(to_json(row))


if __name__ == '__main__':
    main()
