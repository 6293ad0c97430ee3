"""Evaluation of a split. Every example counts once, for any batch size and any number of devices."""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from convnext_jax.models import Weights, with_parameters
from convnext_jax.tasks import Batch, Evaluator, Measured, Task

REPLICATED = P()
FIGURE_EXAMPLES = 16
"""Maximum number of examples that a task gets for its figures, from the first batch of an evaluation."""

EvalStep = Callable[[Weights, Batch], tuple[Measured, jax.Array]]


def make_eval_step(
    evaluator: Evaluator, model: nnx.Module, mesh: Mesh | None = None, specs: dict[str, P] | P = REPLICATED
) -> EvalStep:
    """Builds the evaluation step.

    Jit it with replicated outputs, so that every process receives the results of all examples. On a mesh, the step runs
    in `jax.shard_map`, because `jax.jit` cannot partition Pallas kernels.

    Args:
        evaluator: the evaluator of the split.
        model: the architecture. Its arrays are not used.
        mesh: the device mesh; None for a program that `jax.jit` may partition.
        specs: PartitionSpec of each weight on the mesh.

    Returns:
        A function of weights and a batch that returns the measurements of the batch, and `batch['weight']` (N,).
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
    """Builds the function that draws the figures of an evaluation.

    Every device draws all figures from replicated weights, because `jax.jit` cannot partition Pallas kernels.

    Args:
        task: draws the figures.
        model: the architecture. Its arrays are not used.
        mesh: the device mesh.

    Returns:
        A function of weights and the first batch of an evaluation. It returns name → (H, W, 3) uint8, drawn from the
        first `FIGURE_EXAMPLES` examples of the batch.
    """

    def draw(weights: Weights, batch: Batch) -> dict[str, jax.Array]:
        return task.figures(with_parameters(model, weights), batch)

    on_every_device = jax.shard_map(draw, mesh=mesh, in_specs=REPLICATED, out_specs=REPLICATED, check_vma=False)
    return lambda weights, batch: on_every_device(weights, jax.tree.map(lambda x: x[:FIGURE_EXAMPLES], batch))


def evaluate(
    eval_step: EvalStep, weights: dict[str, Weights], batches: Iterable[Batch]
) -> tuple[int, dict[str, Measured]]:
    """Evaluates several sets of weights in one pass over the data.

    Args:
        eval_step: from `make_eval_step`, jitted.
        weights: prefix → weights, for example {'': raw, 'ema_': ema}.
        batches: all batches of the split.

    Returns:
        The number of examples, and prefix → measurements over the whole split; (0, {}) if there was no batch. Sums are
        float64 (exact for counts). Results of single examples are in the order of the split, without padding.
    """
    images, totals = 0, {name: _Total() for name in weights}
    pending = None
    for batch in batches:
        dispatched = {name: eval_step(values, batch) for name, values in weights.items()}
        if pending:  # fetch the previous results while the device computes this batch
            images += _add(totals, pending)
        pending = dispatched
    if not pending:
        return 0, {}
    images += _add(totals, pending)
    return images, {name: total.measured() for name, total in totals.items()}


class _Total:
    """Accumulates measurements over batches."""

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
    """Adds the results of one batch, and returns its number of examples without padding."""
    counted = 0
    for name, (measured, weight) in jax.device_get(results).items():
        kept = weight > 0
        totals[name].add(measured, kept)
        counted = int(kept.sum())
    return counted


def compute_metrics(evaluator: Evaluator, images: int, measured: dict[str, Measured]) -> dict[str, float]:
    """The metrics of a split by name.

    Args:
        evaluator: the evaluator of the split.
        images, measured: from `evaluate`.

    Returns:
        Name → value: `images`, and the metrics of each set of weights, with its prefix; {} if nothing was measured.
    """
    metrics = {f'{name}{key}': x for name, part in measured.items() for key, x in evaluator.summary(part).items()}
    return {'images': images} | metrics if measured else {}
