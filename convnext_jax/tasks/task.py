"""The contract between a task and the code that trains any task: everything on the device is a pure function."""

import abc
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax
from flax import nnx
from ml_collections import ConfigDict

from convnext_jax.data.dataset import Dataset, Features

Batch = dict[str, jax.Array]
"""Examples stacked along the leading axis, by the name of their field."""


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


class Headline(NamedTuple):
    """The metric that stands for an evaluation in the log, the curves and the choice of the best checkpoint.

    Attributes:
        name: among the metrics of an evaluation, where higher is better: 'top1'.
        title: in words: 'top-1'.
        unit: behind its value: ' %', or ''.
    """

    name: str
    title: str
    unit: str = ''

    def describe(self, metrics: dict[str, float | None]) -> str:
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

    Args:
        config: of the experiment.
    """

    headline: ClassVar[Headline]

    def __init__(self, config: ConfigDict):
        self.config = config

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
    def open_split(self, name: str, split: str, facts: Mapping[str, object]) -> Dataset:
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

    @abc.abstractmethod
    def loss(self, model: nnx.Module, batch: Batch, keys: jax.Array) -> Loss:
        """Computes the loss of the examples that one device has.

        Args:
            model: the network with the parameters of this step.
            batch: what `augment` returned, this device's examples.
            keys: (N,) random keys, one for each example, for the network.
        """
