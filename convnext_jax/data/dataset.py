"""A data set as a task gives it to the loader: a split, and how an example of it becomes arrays."""

import abc
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Example = dict[str, np.ndarray | np.generic]
"""One example: arrays by the names, shapes and types of `Dataset.features`."""

Batch = dict[str, jax.Array]
"""Examples stacked along the leading axis, on the devices, by the name of their field."""

HostBatch = dict[str, np.ndarray]
"""As `Batch`, in the memory of one process, which holds its rows alone."""

Features = dict[str, jax.ShapeDtypeStruct]
"""Name → shape and type of each array of one example."""


class Dataset(abc.ABC):
    """One split and how an example of it is loaded. Decoding processes receive a pickled copy.

    Attributes:
        features: the arrays of an example. In evaluation, `weight` () float32 among them counts an example with
            another weight than 1; 0 leaves it out.
        facts: name → JSON value; a run that resumes must find the same values.
        random: whether `load` depends on `draw`. If not, a small split is loaded once and kept in memory.
        about: a few words for the first lines of a run, such as '10 classes'.
    """

    features: Features
    facts: Mapping[str, Any] = {}
    random: bool = False
    about: str = ''

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def load(self, index: int, draw: tuple[int, ...] = ()) -> Example:
        """Loads one example.

        Args:
            index: from 0 to the length of the data set.
            draw: non-negative numbers that seed everything random: the seed of the run, the epoch, the index, and
                which copy of the example in its batch this is.

        Raises:
            UserError: the example cannot be read.
        """

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Says where an example is, for messages, without reading it."""

    def check(self, index: int) -> None:
        """Raises UserError if an example cannot be read. Override it where this is cheaper than to load it."""
        self.load(index, (0, 0, index, 0))
