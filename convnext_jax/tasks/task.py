"""Task, the interface between a task and the training code. Everything that runs on the device is a pure function."""

import abc
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8
from ml_collections import ConfigDict

from convnext_jax.data.dataset import Batch, Dataset, Features
from convnext_jax.errors import UserError
from convnext_jax.fields import Fields
from convnext_jax.interop import ImageProcessor, Pretrained, PretrainedModel, as_classifier
from convnext_jax.models import Execution, Variant, Weights, get_variant


class Loss(NamedTuple):
    """The loss of a part of a batch, as sums that can be added over devices and accumulation steps.

    The loss of a training step is the sum of all `total` divided by the sum of all `weight`.

    Attributes:
        total: float32 scalar, weighted sum of the losses.
        weight: float32 scalar, sum of the weights, for example the number of examples, labelled pixels, masked patches
            or boxes.
        terms: name → float32 scalar: further sums to log, each divided by `weight`.
    """

    total: Float[Array, '']
    weight: Float[Array, '']
    terms: dict[str, Float[Array, '']] = {}  # noqa: RUF012 - never modified


class LoadedWeights(NamedTuple):
    """Trained weights from which a run starts.

    Attributes:
        weights: name → array.
        facts: `Dataset.facts` of the data that the weights were trained on; {} if unknown.
        where: path or hub id of the weights, for messages.
        pretrained: everything that was read from a file of another library; None for the checkpoint of a run.
    """

    weights: Weights
    facts: Mapping[str, Any]
    where: str
    pretrained: PretrainedModel | None = None

    def as_classifier(self) -> Pretrained | None:
        """`pretrained`, if the weights belong to a classifier or an encoder.

        Raises:
            UserError: they belong to a UPerNet.
        """
        if any(name.startswith('backbone.') for name in self.weights):
            raise UserError(f'{self.where} has the weights of a UPerNet: only the task segmentation can start from it')
        return as_classifier(self.pretrained) if self.pretrained else None


class Measured(NamedTuple):
    """Measurements of an evaluation, on a batch or over a whole split.

    Attributes:
        sums: name → array that is added over batches, such as a count or a confusion matrix; float64 for a whole split.
        examples: name → (N, …) array with a result for each example, such as features. Over a split, the results are in
            the order of the split, without padding.
    """

    sums: Mapping[str, jax.Array | np.ndarray] = {}
    examples: Mapping[str, jax.Array | np.ndarray] = {}


class Evaluator(abc.ABC):
    """Computes the metrics of a split."""

    @abc.abstractmethod
    def measure(self, model: nnx.Module, batch: Batch) -> Measured:
        """Measures a batch on the device. The caller jits it.

        Args:
            model: the network, for inference.
            batch: from the data pipeline, with `weight` (N,) float32, which is 0 for padding.
        """

    @abc.abstractmethod
    def summary(self, measured: Measured) -> dict[str, float]:
        """Computes the metrics of a split on the host: the headline of the task, `loss` if there is one, and others.

        Args:
            measured: the measurements over the whole split.
        """

    def table(self, measured: Measured) -> list[dict[str, object]]:
        """Rows of a table with detailed results, such as one row for each class. All rows have the same columns.

        Args:
            measured: the measurements over the whole split.
        """
        return []


class Headline(NamedTuple):
    """The main metric of a task, for the log, the curves and the choice of the best checkpoint.

    Attributes:
        name: key in the metrics of an evaluation, such as 'top1'.
        title: name in logs and figures, such as 'top-1'.
        unit: appended to the value, such as ' %' or ''.
        lowest: whether lower values are better, as for a loss.
        digits: number of decimal places of the value as text.
    """

    name: str
    title: str
    unit: str = ''
    lowest: bool = False
    digits: int = 2

    def describe(self, metrics: Mapping[str, float | None]) -> str:
        """The value of the metric as text, for the raw weights and, if there is one, for the moving average.

        Args:
            metrics: the metrics of an evaluation. None stands for a value that is not finite.
        """

        def value(name: str) -> str:
            return 'not finite' if metrics[name] is None else f'{metrics[name]:.{self.digits}f}{self.unit}'

        average = f'ema_{self.name}'
        return f'{self.title} {value(self.name)}' + (f', EMA {value(average)}' if average in metrics else '')


class Evaluation(NamedTuple):
    """A data set that a run evaluates, with its evaluator.

    Attributes:
        dataset: the examples.
        evaluator: computes the metrics.
        headline: the metric to log and to draw.
    """

    dataset: Dataset
    evaluator: Evaluator
    headline: Headline


class LabelledData(NamedTuple):
    """Data with labels on which probes evaluate the features of a network.

    Attributes:
        name, directory: as for `open_source`.
        train_split: name of the split from which a probe learns the classes.
        eval_split: name of the split that it classifies.
    """

    name: str
    directory: str
    train_split: str
    eval_split: str


class Task(abc.ABC):
    """A task that a run learns, such as classification.

    Attributes:
        headline: the main metric.
        fields: the config fields of the task, in addition to the fields that all tasks have.

    Args:
        config: the config of the experiment.
    """

    headline: ClassVar[Headline]
    fields: ClassVar[Fields]

    def __init__(self, config: ConfigDict):
        self.config = config

    def problems(self) -> list[str]:
        """A message for each invalid value in the config, in addition to the checks of `fields`."""
        return []

    @property
    @abc.abstractmethod
    def features(self) -> Features:
        """Name → shape and dtype of the arrays of a training example. They follow from the config, without data."""

    @abc.abstractmethod
    def open(self) -> tuple[Dataset, Dataset]:
        """Opens the training and the evaluation split, and sets the config fields that follow from the data.

        Raises:
            UserError: a split does not exist, or the splits do not fit each other or the config.
        """

    @abc.abstractmethod
    def open_split(self, name: str, split: str, facts: Mapping[str, Any]) -> Dataset:
        """Opens a split for the evaluation of a trained network.

        Args:
            name: the name of the data set in `config.data.dir`.
            split: the name of the split.
            facts: `Dataset.facts` of the data that the network was trained on; {} if unknown.

        Raises:
            UserError: the split does not exist, or does not fit the network.
        """

    def warn_of_overrides(self, changed: ConfigDict) -> None:  # noqa: B027 - few tasks need it
        """Warns of changes that give the labels another meaning than in training.

        Args:
            changed: the config of the run with the overrides of an evaluation.
        """

    def open_evaluations(self) -> Sequence[Evaluation]:
        """Opens the data sets that a run evaluates in addition to its evaluation split, at the same steps.

        Their metrics are recorded together with the metrics of the evaluation split, so their names must differ.

        Raises:
            UserError: a data set does not exist, or does not fit the config.
        """
        return ()

    def augment(self, batch: Batch, keys: Key[Array, ' n']) -> Batch:
        """Augments examples. Each device calls it with its own part of the batch.

        Args:
            batch: from the data pipeline.
            keys: (N,) random keys, one for each example. The result for an example must depend on the example and its
                key only.
        """
        return batch

    def mix(self, batch: Batch, key: Key[Array, ''], epoch: Float[Array, '']) -> Batch:
        """Combines examples of the global batch. The result is the argument of `loss`.

        Args:
            batch: the augmented batch.
            key: random key.
            epoch: float32 scalar, number of epochs so far.
        """
        return batch

    def assume_data(self) -> None:  # noqa: B027 - few tasks need it
        """Sets the config fields that `open` would set, so that a program can be compiled without data."""

    def variant(self) -> Variant:
        """The architecture of the trunk, from `config.model`.

        Raises:
            UserError: the model name is unknown.
        """
        model = self.config.model
        layer_scale_init = None if model.layer_scale_init < 0 else model.layer_scale_init
        return get_variant(model.name).replace(patch_size=model.patch_size or None, layer_scale_init=layer_scale_init)

    def execution(self) -> Execution:
        """How the network is computed, from `config.model`."""
        model = self.config.model
        return Execution(model.dtype, remat=model.remat, unroll=model.unroll, pallas=model.pallas)

    @abc.abstractmethod
    def build(self, key: Key[Array, '']) -> nnx.Module:
        """Builds the network with random parameters.

        Args:
            key: random key for the parameters.

        Returns:
            The network. Its attribute `variant` is a `Variant`, the architecture of its trunk.

        Raises:
            UserError: values of the config do not fit the network.
        """

    @property
    @abc.abstractmethod
    def multiply_adds(self) -> int:
        """The number of multiply-adds of the forward pass for one example."""

    def initial_weights(
        self, initial: Weights, trained: LoadedWeights, facts: Mapping[str, Any]
    ) -> tuple[Weights, list[str]]:
        """Chooses the initial weights of a run that starts from trained weights.

        Args:
            initial: newly initialised parameters and statistics.
            trained: the weights to start from.
            facts: `Dataset.facts` of the training split.

        Returns:
            Weights with the names and shapes of `initial`, and messages for the user.

        Raises:
            UserError: the trained weights are for another task.
        """
        return trained.weights, list(trained.pretrained.notes) if trained.pretrained else []

    def pretrained(self, model: nnx.Module, facts: Mapping[str, Any]) -> PretrainedModel:
        """A trained network in the form that the commands predict, convert and export need.

        Args:
            model: the network.
            facts: `Dataset.facts` of the data that it was trained on.

        Raises:
            UserError: these commands do not support the task.
        """
        raise UserError(f'this command does not support the task {self.config.task}')

    @property
    def processor(self) -> ImageProcessor:
        """The preprocessing of images in an evaluation.

        Raises:
            UserError: the task has none.
        """
        raise UserError(f'the task {self.config.task} has no preprocessing of images')

    @property
    def labelled_data(self) -> LabelledData:
        """The data with labels on which probes evaluate features: by default the splits of the run."""
        data = self.config.data
        return LabelledData(data.name, data.dir, data.train_split, data.eval_split)

    def config_for(self, pretrained: PretrainedModel, where: str) -> ConfigDict:
        """The config for an evaluation of weights of another library.

        Args:
            pretrained: the weights, with their preprocessing if it is known.
            where: path or hub id of the weights, for messages.

        Raises:
            UserError: the weights are for another task.
        """
        raise UserError(f'the task {self.config.task} cannot evaluate {where}: evaluate a run with --workdir')

    @abc.abstractmethod
    def evaluator(self, dataset: Dataset) -> Evaluator:
        """The evaluator for a split that `open` or `open_split` returned."""

    def figures(self, model: nnx.Module, batch: Batch) -> dict[str, UInt8[Array, 'h w 3']]:
        """Draws figures at each evaluation, on the devices. The caller jits it.

        Args:
            model: the network, for inference, with the moving average of its weights if there is one.
            batch: the first examples of the evaluation split.

        Returns:
            Name → (H, W, 3) uint8.
        """
        return {}

    @abc.abstractmethod
    def loss(self, model: nnx.Module, batch: Batch, keys: Key[Array, ' n']) -> Loss:
        """Computes the loss of the examples on one device.

        Args:
            model: the network with the parameters and statistics of this step. If the call updates its statistics,
                the next step gets their mean over the devices.
            batch: this device's part of the result of `mix`.
            keys: (N,) random keys for the network, one for each example.
        """


def warn_on_main_process(line: str) -> None:
    """Warns on process 0 only, at the line that called the caller."""
    if jax.process_index() == 0:
        warnings.warn(line, stacklevel=3)
