"""The interface between a task and the data loader: the examples of one split as arrays."""

import abc
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Example = dict[str, np.ndarray | np.generic]
"""One example: name → array, with the names, shapes and dtypes of `Dataset.features`."""

Batch = dict[str, jax.Array]
"""Examples of a global batch on the devices: name → array with a leading batch axis."""

HostBatch = dict[str, np.ndarray]
"""One process's share of a global batch, in host memory: name → array with a leading batch axis."""

Features = dict[str, jax.ShapeDtypeStruct]
"""Name → shape and dtype of each array of one example."""


class Dataset(abc.ABC):
    """The examples of one split. Decoding processes receive a pickled copy.

    Attributes:
        features: name → shape and dtype of the arrays of an example. A feature `weight`, () float32, is the weight of
            the example in evaluation metrics, 1 by default; 0 ignores the example.
        facts: name → JSON value; a run resumes only if these values have not changed.
        random: whether `load` depends on `draw`. If not, a small split is loaded once and kept in memory.
        about: a short description for the first lines of a run, such as '10 classes'.
    """

    features: Features
    facts: Mapping[str, Any] = {}
    random: bool = False
    about: str = ''

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of examples."""

    @abc.abstractmethod
    def load(self, index: int, draw: tuple[int, ...] = ()) -> Example:
        """Loads one example.

        Args:
            index: index of the example, at least 0 and below the length of the data set.
            draw: non-negative integers that seed all random choices: the seed of the run, the epoch, the index, and
                which copy of the example in its batch this is.

        Raises:
            UserError: the example cannot be read.
        """

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """The location of an example, for messages; the example is not read."""

    def check(self, index: int) -> None:
        """Raises UserError if an example cannot be read. Override it if a check is cheaper than `load`."""
        self.load(index, (0, 0, index, 0))
