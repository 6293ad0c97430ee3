"""The weights that timm publishes: the table `published.csv`, which `python -m tests.judges.published` writes."""

import csv
import functools
from importlib import resources
from typing import NamedTuple


class PublishedWeights(NamedTuple):
    """One set of weights on the hub.

    Attributes:
        model: name of the architecture.
        tag: the training data and recipe; the hub id is 'timm/MODEL.TAG'.
        classes: outputs of the head; 0 if there is no head.
        size: side of the images in training, in pixels.
        test_size: side of the images for the best accuracy; equal to `size` if timm names none.
        top1: accuracy on ImageNet-1k in percent at `size`; None if it was not measured.
        test_top1: the same at `test_size`.
        licence: identifier of the licence.
    """

    model: str
    tag: str
    classes: int
    size: int
    test_size: int
    top1: float | None
    test_top1: float | None
    licence: str

    @property
    def hub_id(self) -> str:
        """The id that `load_pretrained` accepts."""
        return f'timm/{self.model}.{self.tag}'

    @property
    def best_top1(self) -> float | None:
        """The higher of the two accuracies; None if none was measured."""
        return max((top1 for top1 in (self.top1, self.test_top1) if top1 is not None), default=None)


@functools.cache
def published_weights() -> tuple[PublishedWeights, ...]:
    """All weights of the table, sorted by model and tag."""
    text = resources.files('convnext_jax.interop').joinpath('published.csv').read_text(encoding='utf-8')
    return tuple(_from_row(row) for row in csv.DictReader(text.splitlines()))


def _from_row(row: dict[str, str]) -> PublishedWeights:
    numbers = {name: int(row[name]) for name in ('classes', 'size', 'test_size')}
    accuracies = {name: float(row[name]) if row[name] else None for name in ('top1', 'test_top1')}
    return PublishedWeights(model=row['model'], tag=row['tag'], licence=row['licence'], **numbers, **accuracies)
