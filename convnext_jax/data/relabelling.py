"""The classes of a source: a check of their number, and new labels that match a model or another split."""

import contextlib
import dataclasses
from collections.abc import Generator, Sequence

from convnext_jax.data.class_names import match_names, outputs_of_classes
from convnext_jax.data.sources import EncodedImage, FolderSource, Source, open_source
from convnext_jax.errors import UserError


def check_has_classes(source: Source, name: str) -> None:
    """Checks that a training split has several classes; with one class the loss would be 0 from the first step.

    Args:
        source: the training split.
        name: its location, for the error message.

    Raises:
        UserError: the split has only one class.
    """
    if len(source.class_names) == 1:
        only, below = source.class_names[0], _folders_hint(source)
        raise UserError(f"{name} has one class, '{only}': a classifier needs two or more{below}")


def with_classes_of_model(source: Source, class_names: Sequence[str] | None, outputs: int) -> tuple[Source, str]:
    """A split with the labels and class names of a model, matched by class name as in `outputs_of_classes`.

    Args:
        source: the split.
        class_names: names of the model's first outputs; None if unknown.
        outputs: number of outputs of the model.

    Returns:
        The relabelled split, and a message for the user if classes were matched by position, else ''.

    Raises:
        UserError: as for `outputs_of_classes`.
    """
    with _with_folders_hint(source):
        labels, note = outputs_of_classes(source.class_names, class_names, outputs)
    return _relabelled(source, labels, class_names or source.class_names), note


def with_classes_of_split(source: Source, other: Source, split: str) -> Source:
    """A split with the labels and class names of another split, matched by class name.

    Args:
        source: the split.
        other: the other split.
        split: name of the other split, for messages.

    Raises:
        UserError: a class is missing in the other split.
    """
    with _with_folders_hint(source):
        labels = match_names(source.class_names, other.class_names, f'split {split}')
    return _relabelled(source, labels, other.class_names)


def open_labelled_splits(name: str, directory: str, train_split: str, eval_split: str) -> tuple[Source, Source, int]:
    """Opens a training split and an evaluation split, both with the labels and class names of the training split.

    Args:
        name, directory: as for `open_source`.
        train_split, eval_split: names of the splits.

    Returns:
        Both splits, and the number of classes that the evaluation split lacks.

    Raises:
        UserError: as for `open_source`; the training split has only one class, or several labels per image; or the
            evaluation split has classes that the training split lacks.
    """
    train, evaluation = (open_source(name, directory, split) for split in (train_split, eval_split))
    missing = len(train.class_names) - len(evaluation.class_names)
    if train.multi_label:
        raise UserError(
            f'{name} has images with several labels or none, and can only be used for evaluation: choose another '
            'data.name'
        )
    check_has_classes(train, f'split {train_split}')
    try:
        return train, with_classes_of_split(evaluation, train, train_split), missing
    except UserError as error:
        raise UserError(f'split {eval_split} does not fit the training split: {error}') from error


@contextlib.contextmanager
def _with_folders_hint(source: Source) -> Generator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f'{error}{_folders_hint(source)}') from error


def _folders_hint(source: Source) -> str:
    return source.subfolders_hint() if isinstance(source, FolderSource) else ''


def _relabelled(source: Source, labels: list[int], class_names: Sequence[str]) -> Source:
    unchanged = labels == list(range(len(class_names)))
    return source if unchanged else Relabelled(source, labels, class_names)


class Relabelled:
    """A source with new labels.

    Args:
        source: the original source.
        labels: the new label of each class of the source.
        class_names: the names of the new labels.
    """

    def __init__(self, source: Source, labels: Sequence[int], class_names: Sequence[str]):
        self._source, self._labels = source, list(labels)
        self.class_names, self.multi_label = list(class_names), source.multi_label
        self.eval_classes = (
            None if source.eval_classes is None else tuple(sorted(self._labels[label] for label in source.eval_classes))
        )

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def __getitem__(self, index: int) -> EncodedImage:
        example = self._source[index]
        label = example.label
        new = tuple(self._labels[each] for each in label) if isinstance(label, tuple) else self._labels[label]
        return dataclasses.replace(example, label=new)
