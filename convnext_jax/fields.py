"""Fields: the defaults and valid ranges of a group of config fields, and which of them may change on resume."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Fields:
    """The config fields that all tasks share, or the fields of one task. Names are dotted, such as 'data.name'.

    Attributes:
        defaults: sets every field of a config to its default. Sections of the config may exist already.
        positive: fields whose value must be above 0.
        not_negative: fields whose value must be at least 0.
        below_one: fields whose value must be in [0, 1).
        at_most_one: fields whose value must be at most 1.
        choices: field → allowed values.
        fixed: fields or whole sections that must not change when a run resumes, because they affect the training steps.
        free: exceptions from `fixed`: fields that do not affect the training steps, or only their rounding.
        paths: fields with a local path, which is made absolute so that a run can resume from any working directory.
        evaluation: fields that an evaluation reads. `eval.py --workdir` may override them.
    """

    defaults: Callable[[ConfigDict], None]
    positive: tuple[str, ...] = ()
    not_negative: tuple[str, ...] = ()
    below_one: tuple[str, ...] = ()
    at_most_one: tuple[str, ...] = ()
    choices: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()

    def problems(self, values: Mapping[str, Any]) -> list[str]:
        """A message for each value that is out of range.

        Args:
            values: dotted name → value, for all fields.
        """
        lines = [f'{field} must be above 0, not {values[field]}' for field in self.positive if not values[field] > 0]
        lines += [
            f'{field} must be at least 0, not {values[field]}' for field in self.not_negative if values[field] < 0
        ]
        lines += [
            f'{field} must be in [0, 1), not {values[field]}' for field in self.below_one if not 0 <= values[field] < 1
        ]
        lines += [f'{field} must be at most 1, not {values[field]}' for field in self.at_most_one if values[field] > 1]
        lines += [
            f"{field} must be one of {', '.join(choice or repr('') for choice in choices)}, not '{values[field]}'"
            for field, choices in self.choices.items()
            if values[field] not in choices
        ]
        return lines
