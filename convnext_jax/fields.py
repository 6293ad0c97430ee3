"""A group of config fields: their defaults, their ranges, and which of them may change when a run resumes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields that all experiments have, or those of one task. Names are in dotted form.

    Attributes:
        defaults: sets each field of a config to its default; sections may be there already.
        positive: must be above 0.
        not_negative: must be at least 0.
        below_one: must be in [0, 1).
        at_most_one: must be at most 1.
        choices: field → allowed values.
        fixed: fields or sections that a run may not change when it resumes: the rest of its steps would not be the ones
            that were started.
        free: fields among these that it may change: they change no step, or only its rounding.
        evaluation: fields that an evaluation of a run's checkpoint reads, and that may therefore differ from the run's.
    """

    defaults: Callable[[ConfigDict], None]
    positive: tuple[str, ...] = ()
    not_negative: tuple[str, ...] = ()
    below_one: tuple[str, ...] = ()
    at_most_one: tuple[str, ...] = ()
    choices: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()

    def problems(self, values: Mapping[str, Any]) -> list[str]:
        """A line for each value that is out of its range.

        Args:
            values: of all fields.
        """
        lines = [f'{field} must be above 0, not {values[field]}' for field in self.positive if not values[field] > 0]
        lines += [f'{field} must not be negative: {values[field]}' for field in self.not_negative if values[field] < 0]
        lines += [
            f'{field} must be in [0, 1), not {values[field]}' for field in self.below_one if not 0 <= values[field] < 1
        ]
        lines += [f'{field} must be at most 1, not {values[field]}' for field in self.at_most_one if values[field] > 1]
        lines += [
            f"{field} must be one of {', '.join(choices)}, not '{values[field]}'"
            for field, choices in self.choices.items()
            if values[field] not in choices
        ]
        return lines
