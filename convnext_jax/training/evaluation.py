"""Evaluation of a whole split: every example counted once, whatever the batch size and the devices."""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from convnext_jax.models import Weights, with_parameters
from convnext_jax.tasks import Batch, Evaluator, Measured, Task

REPLICATED = P()
DRAWN = 16
"""Examples of the first batch that a task gets for its pictures."""

EvalStep = Callable[[Weights, Batch], tuple[Measured, jax.Array]]


def make_eval_step(
    evaluator: Evaluator, model: nnx.Module, mesh: Mesh | None = None, specs: dict[str, P] | P = REPLICATED
) -> EvalStep:
    """Builds the step from weights and a batch to what is measured on it, and the weights of its examples.

    To be jitted with replicated outputs, so that every process receives the results of all examples. Each device
    measures its own examples, because `jax.jit` cannot partition Pallas kernels.

    Args:
        evaluator: of the split.
        model: the architecture; its own weights are not used.
        mesh: of the devices; None for a program that `jax.jit` may partition.
        specs: how the weights are sharded over it.
    """

    def eval_step(weights: Weights, batch: Batch) -> tuple[Measured, jax.Array]:
        return evaluator.measure(with_parameters(model, weights), batch), batch['weight']

    if mesh is None or mesh.size == 1:
        return eval_step

    def on_device(weights: Weights, batch: Batch) -> tuple[Measured, jax.Array]:
        measured, weight = eval_step(weights, batch)
        return measured._replace(sums=jax.lax.psum(measured.sums, mesh.axis_names)), weight

    examples = P(mesh.axis_names)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs, examples),
        out_specs=(Measured._make((REPLICATED, examples)), examples),
        check_vma=False,  # the replication checker cannot see through custom derivatives
    )


def make_figures(task: Task, model: nnx.Module, mesh: Mesh) -> Callable[[Weights, Batch], dict[str, jax.Array]]:
    """Builds the function from weights and the first batch of an evaluation to pictures of at most `DRAWN` examples.

    Every device draws all of them, from replicated weights: `jax.jit` cannot partition Pallas kernels.

    Args:
        task: draws them.
        model: the architecture; its own weights are not used.
        mesh: of the devices.
    """

    def draw(weights: Weights, batch: Batch) -> dict[str, jax.Array]:
        return task.figures(with_parameters(model, weights), batch)

    on_every_device = jax.shard_map(draw, mesh=mesh, in_specs=REPLICATED, out_specs=REPLICATED, check_vma=False)
    return lambda weights, batch: on_every_device(weights, jax.tree.map(lambda x: x[:DRAWN], batch))


def evaluate(
    eval_step: EvalStep, weights: dict[str, Weights], batches: Iterable[Batch]
) -> tuple[int, dict[str, Measured]]:
    """Evaluates several sets of weights in one pass over the data.

    Args:
        eval_step: as `make_eval_step` builds it, jitted.
        weights: name → weights, as in {'': raw, 'ema_': ema}.
        batches: all of the split.

    Returns:
        The number of examples; and for each set of weights the sums over all batches in float64, and the results of
        all examples in order, without those of weight 0. Empty if there was no batch.
    """
    images, totals = 0, {name: _Total() for name in weights}
    under_way = None
    for batch in batches:
        dispatched = {name: eval_step(values, batch) for name, values in weights.items()}
        if under_way:  # fetched while the device works on this batch
            images += _add(totals, under_way)
        under_way = dispatched
    if not under_way:
        return 0, {}
    images += _add(totals, under_way)
    return images, {name: total.measured() for name, total in totals.items()}


class _Total:
    """What was measured over several batches."""

    def __init__(self):
        self._sums: dict[str, np.ndarray] = {}
        self._examples: list[dict[str, np.ndarray]] = []

    def add(self, measured: Measured, kept: np.ndarray) -> None:
        self._sums = {key: self._sums.get(key, 0) + np.asarray(x, np.float64) for key, x in measured.sums.items()}
        self._examples.append({key: np.asarray(x)[kept] for key, x in measured.examples.items()})

    def measured(self) -> Measured:
        names = self._examples[0].keys()
        return Measured(self._sums, {key: np.concatenate([part[key] for part in self._examples]) for key in names})


def _add(totals: dict[str, _Total], results: dict[str, tuple[Measured, jax.Array]]) -> int:
    """Adds the results of one batch, and returns how many examples it held."""
    counted = 0
    for name, (measured, weight) in jax.device_get(results).items():
        kept = weight > 0
        totals[name].add(measured, kept)
        counted = int(kept.sum())
    return counted


def metrics_of(evaluator: Evaluator, images: int, measured: dict[str, Measured]) -> dict[str, float]:
    """The evaluator's metrics under the name of each set of weights, and `images`; {} if nothing was measured."""
    metrics = {f'{name}{key}': x for name, part in measured.items() for key, x in evaluator.summary(part).items()}
    return {'images': images} | metrics if measured else {}
