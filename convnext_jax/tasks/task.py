"""The contract between a task and the code that trains any task: everything on the device is a pure function."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from convnext_jax.data.dataset import Batch, Dataset, Features
from convnext_jax.errors import UserError
from convnext_jax.fields import Fields
from convnext_jax.interop import Pretrained
from convnext_jax.models import Weights


class Loss(NamedTuple):
    """The loss of some examples as sums, so that devices, accumulation steps and padding combine exactly.

    The loss of a step is the sum of all totals divided by the sum of all weights.

    Attributes:
        total: float32 scalar, the weighted sum of the losses.
        weight: float32 scalar, the sum of the weights: how many examples, labelled pixels, masked patches or boxes.
        terms: name → float32 scalar: further sums over the same weight, for the log alone.
    """

    total: jax.Array
    weight: jax.Array
    terms: dict[str, jax.Array] = {}  # noqa: RUF012 - nobody changes it


class LoadedWeights(NamedTuple):
    """Trained weights that a run starts from.

    Attributes:
        weights: name → array.
        facts: `Dataset.facts` of the data they were trained on; {} if unknown.
        where: they are, for messages.
        pretrained: the file of another library, read; None for a run of this package.
    """

    weights: Weights
    facts: Mapping[str, Any]
    where: str
    pretrained: Pretrained | None = None


class Measured(NamedTuple):
    """What an evaluation measures on a batch, or over all batches of a split.

    Attributes:
        sums: name → array that adds up over batches: counts, a confusion matrix. Over a split they are float64.
        examples: name → (N, …) results of each example: detections, features. Over a split they are in its order, and
            rows that only filled up a batch are left out.
    """

    sums: Mapping[str, jax.Array | np.ndarray] = {}
    examples: Mapping[str, jax.Array | np.ndarray] = {}


class Evaluator(abc.ABC):
    """How a split is evaluated."""

    @abc.abstractmethod
    def measure(self, model: nnx.Module, batch: Batch) -> Measured:
        """Measures a batch on the devices; jitted by the caller.

        Args:
            model: the network, in inference.
            batch: as the data pipeline gives it, with `weight`, which is 0 where a row only fills up the batch.
        """

    @abc.abstractmethod
    def summary(self, measured: Measured) -> dict[str, float]:
        """The metrics of a split, on the host; the task's headline among them, and `loss` if there is one."""

    def table(self, measured: Measured) -> list[dict[str, object]]:
        """The rows of a table with finer results, such as one for each class; all with the same columns."""
        return []


class Headline(NamedTuple):
    """The metric that stands for an evaluation in the log, the curves and the choice of the best checkpoint.

    Attributes:
        name: among the metrics of an evaluation: 'top1'.
        title: in words: 'top-1'.
        unit: behind its value: ' %', or ''.
        lowest: whether the lowest value is the best, as of a loss.
    """

    name: str
    title: str
    unit: str = ''
    lowest: bool = False

    def describe(self, metrics: Mapping[str, float | None]) -> str:
        """Gives the metric's value, and the moving average's value if there is one, in words.

        Args:
            metrics: of an evaluation; None, as in records, stands for a value that is not finite.
        """

        def value(name: str) -> str:
            return 'not finite' if metrics[name] is None else f'{metrics[name]:.2f}{self.unit}'

        average = f'ema_{self.name}'
        return f'{self.title} {value(self.name)}' + (f', EMA {value(average)}' if average in metrics else '')


class Task(abc.ABC):
    """What a run learns.

    Attributes:
        headline: the metric that stands for an evaluation.
        fields: the config fields of the task, besides those that all experiments have.

    Args:
        config: of the experiment.
    """

    headline: ClassVar[Headline]
    fields: ClassVar[Fields]

    def __init__(self, config: ConfigDict):
        self.config = config

    def problems(self) -> list[str]:
        """A line for each value of the config that is wrong, besides those that `fields` refuses."""
        return []

    @property
    @abc.abstractmethod
    def features(self) -> Features:
        """The arrays of a training example. They follow from the config alone: no data is needed."""

    @abc.abstractmethod
    def open(self) -> tuple[Dataset, Dataset]:
        """Opens the training and the evaluation split, and sets the config fields that follow from the data.

        Raises:
            UserError: a split is not there, or the two do not fit each other or the config.
        """

    @abc.abstractmethod
    def open_split(self, name: str, split: str, facts: Mapping[str, Any]) -> Dataset:
        """Opens a split to evaluate a trained network on.

        Args:
            name: of the data set, in the config's `data.dir`.
            split: of the data set.
            facts: `Dataset.facts` of the data that the network was trained on; {} if unknown.

        Raises:
            UserError: the split is not there, or the network does not fit it.
        """

    def augment(self, batch: Batch, keys: jax.Array, batch_key: jax.Array, epoch: jax.Array) -> Batch:
        """Prepares the global batch on the devices for `loss`.

        Args:
            batch: as the data pipeline gives it.
            keys: (N,) random keys, one for each example: what an example draws depends on its key alone.
            batch_key: for what is drawn once for the batch.
            epoch: float32 scalar, passes over the training split so far.
        """
        return batch

    def assume_data(self) -> None:  # noqa: B027 - few tasks need it
        """Sets the config fields that `open` would set, for a program without data."""

    @abc.abstractmethod
    def build(self, key: jax.Array) -> nnx.Module:
        """Builds the network with new parameters. Its `variant` is the architecture of its trunk.

        Args:
            key: random key of the parameters.

        Raises:
            UserError: the config does not describe a network.
        """

    @property
    @abc.abstractmethod
    def multiply_adds(self) -> int:
        """Multiply-adds of the network's forward pass on one example."""

    def adopt(self, initial: Weights, trained: LoadedWeights, facts: Mapping[str, Any]) -> tuple[Weights, list[str]]:
        """Chooses the first parameters of a run that starts from trained weights.

        Args:
            initial: the new parameters and statistics of the network.
            trained: the weights to start from.
            facts: `Dataset.facts` of the training split.

        Returns:
            The parameters, which must have the names and shapes of the initial ones; and lines for the user.

        Raises:
            UserError: the weights are not for this task.
        """
        return trained.weights, []

    def pretrained(self, model: nnx.Module, facts: Mapping[str, Any]) -> Pretrained:
        """A trained network as the commands that predict, convert and export take it.

        Args:
            model: the network.
            facts: `Dataset.facts` of the data it was trained on.

        Raises:
            UserError: these commands are not for this task.
        """
        raise UserError(f'a network of the task {self.config.task} cannot be used here')

    def config_for(self, pretrained: Pretrained, where: str) -> ConfigDict:
        """The config with which another library's weights are evaluated.

        Args:
            pretrained: the weights.
            where: they are, for messages.

        Raises:
            UserError: the weights are not for this task.
        """
        raise UserError(f'{where} cannot be evaluated by the task {self.config.task}')

    @abc.abstractmethod
    def evaluator(self, dataset: Dataset) -> Evaluator:
        """How a split is evaluated that `open` or `open_split` gave."""

    def figures(self, model: nnx.Module, batch: Batch) -> dict[str, jax.Array]:
        """Draws pictures at each evaluation, on the devices; jitted by the caller.

        Args:
            model: the network, in inference, with the moving average of its parameters if there is one.
            batch: the first examples of the evaluation split.

        Returns:
            Name → (H, W, 3) uint8.
        """
        return {}

    @abc.abstractmethod
    def loss(self, model: nnx.Module, batch: Batch, keys: jax.Array) -> Loss:
        """Computes the loss of the examples that one device has.

        Args:
            model: the network with the parameters and statistics of this step. The mean over the
                devices of the statistics that it holds afterwards goes into the next step.
            batch: what `augment` returned, this device's examples.
            keys: (N,) random keys, one for each example, for the network.
        """
