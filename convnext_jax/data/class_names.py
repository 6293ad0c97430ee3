"""The matching of classes between data sets and models by class name."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from convnext_jax.errors import UserError

WORDNET_ID = re.compile(r'n\d{8}')  # ImageNet's classes in TFDS and in its folders
NUMBER = re.compile(r'(?:LABEL_|class )?(\d{1,9})')  # placeholders: LABEL_3 from Hugging Face, 3 from tar shards
MAX_LISTED = 5


def normalize(name: str) -> str:
    """The name in Unicode's composed form (NFC): macOS file systems store 'é' as two characters."""
    return unicodedata.normalize('NFC', name)


def same_names(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two lists have equal names in the same order, compared as by `normalize`."""
    return list(map(normalize, names)) == list(map(normalize, others))


def match_names(names: Sequence[str], known: Sequence[str], owner: str) -> list[int]:
    """The position in the list `known` of each of the `names`.

    Args:
        names: the names to find.
        known: the list in which to find them.
        owner: what the list belongs to, for error messages: 'the model', or a split.

    Raises:
        UserError: a name is missing in `known`; or the lists differ, and one of the `names` occurs several times.
    """
    if same_names(names, known):
        return list(range(len(names)))
    positions = _positions(known)
    unknown = [name for name in names if normalize(name) not in positions]
    if unknown:
        raise UserError(f'{owner} lacks these classes: {_listed(unknown)}')
    counts = Counter(map(normalize, names))
    repeated = [name for name, count in counts.items() if count > 1 or len(positions[name]) > 1]
    if repeated:
        raise UserError(f'several classes are called {_listed(repeated)}: class names must be unique to be matched')
    return [positions[normalize(name)][0] for name in names]


def outputs_of_classes(
    data_names: Sequence[str], model_names: Sequence[str] | None, outputs: int
) -> tuple[list[int], str]:
    """The index of the model's output for each class of a data set.

    Classes are matched by name. They are matched by position instead if the model or the data set has no names, or if
    the data set has ImageNet's WordNet ids and the model has ImageNet's English names, which all libraries list in the
    order of the ids.

    Args:
        data_names: class names of the data set.
        model_names: names of the model's first outputs; None if unknown.
        outputs: number of outputs of the model.

    Returns:
        The output of each class, and a message for the user if classes were matched by position, else ''.

    Raises:
        UserError: as for `match_names`, or the model has fewer outputs than the data set has classes.
    """
    if model_names is not None and not _trust_positions(data_names, model_names):
        return match_names(data_names, model_names, 'the model'), ''
    if len(data_names) > outputs:
        raise UserError(f'the data has {len(data_names)} classes, but the model has only {outputs} outputs')
    return list(range(len(data_names))), (
        f'classes are matched by position, class 0 ({data_names[0]}) to output 0, because '
        f'{_why(data_names, model_names)} '
        f'(classes of the data: {len(data_names)}, outputs of the model: {outputs})'
    )


def kept_outputs(
    new_names: Sequence[str], new_outputs: int, old_names: Sequence[str] | None, old_outputs: int
) -> tuple[list[int], str]:
    """The outputs of a trained head that a new head keeps; classes are matched by name if names are known.

    Args:
        new_names: names of the new head's first outputs.
        new_outputs: number of outputs of the new head.
        old_names: names of the trained head's first outputs; None if unknown.
        old_outputs: number of outputs of the trained head.

    Returns:
        For each output of the new head, the index of the trained output, or −1 if it must be newly initialised; and a
        message for the user, '' if the two heads have equal classes.
    """
    if old_names is not None and new_outputs == old_outputs and same_names(new_names, old_names):
        return list(range(new_outputs)), ''
    if old_names is None or _trust_positions(new_names, old_names):
        if new_outputs != old_outputs:
            return [-1] * new_outputs, (
                f'the head is newly initialised: {new_outputs} classes here, {old_outputs} in the weights'
            )
        return list(range(new_outputs)), (
            f'the head is kept, and classes are matched by position, because {_why(new_names, old_names)} '
            '(--config.init.head=new initialises a new head)'
        )
    positions = _positions(old_names)
    names = [normalize(name) for name in new_names]
    counts = Counter(names)  # classes that share a name cannot be matched
    kept = [positions[name][0] if len(positions.get(name, ())) == counts[name] == 1 else -1 for name in names]
    kept += [-1] * (new_outputs - len(kept))
    new = [name for name, output in zip(new_names, kept, strict=False) if output < 0]
    if len(new) == len(new_names):
        return kept, 'the head is newly initialised: the weights have none of these classes'
    unnamed = new_outputs - len(new_names)
    new_parts = [_listed(new)] * bool(new) + [f'{unnamed} outputs without a class'] * bool(unnamed)
    rest = f'; newly initialised: {", ".join(new_parts)}' if new_parts else ''
    return kept, f'the head keeps the outputs of {len(new_names) - len(new)} of {len(new_names)} classes{rest}'


def _positions(names: Sequence[str]) -> dict[str, list[int]]:
    positions: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        positions.setdefault(normalize(name), []).append(position)
    return positions


def _trust_positions(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether the two lists can be matched only by position."""
    if not _positions(names).keys().isdisjoint(_positions(others)):
        return False
    if all(map(str.isdecimal, names)) and not _are_placeholders(names):
        return False  # names '1', '2', … at positions 0, 1, …: the others' LABEL_2 may mean the name or the position
    return _are_placeholders(names) or _are_placeholders(others) or _wordnet_and_words(names, others)


def _are_placeholders(names: Sequence[str]) -> bool:
    """Whether each name only repeats its position, as 'LABEL_3' at position 3."""
    numbers = [NUMBER.fullmatch(name) for name in names]
    return all(number and int(number[1]) == position for position, number in enumerate(numbers))


def _wordnet_and_words(data_names: Sequence[str], model_names: Sequence[str]) -> bool:
    ids = all(map(WORDNET_ID.fullmatch, data_names))
    return ids and len(data_names) == len(model_names) and not any(map(WORDNET_ID.fullmatch, model_names))


def _why(data_names: Sequence[str], model_names: Sequence[str] | None) -> str:
    if model_names is None:
        return 'the weights have no class names'
    if _are_placeholders(model_names):
        return f'the weights name their classes {model_names[0]}, …'
    return f'the data names its classes {data_names[0]}, …, the weights {model_names[0]}, …'


def _listed(names: Sequence[str]) -> str:
    more = f' and {len(names) - MAX_LISTED} more' if len(names) > MAX_LISTED else ''
    return ', '.join(names[:MAX_LISTED]) + more
