"""Facts about the data of a run: every checkpoint stores them, and a run that resumes compares them."""

import itertools
import unicodedata

from convnext_jax.data.dataset import Dataset
from convnext_jax.errors import UserError


def data_facts(train_set: Dataset, eval_set: Dataset) -> dict:
    """The number of images of both splits, and `Dataset.facts` of the training split."""
    images = {'training images': len(train_set), 'evaluation images': len(eval_set)}
    return {**images, **train_set.facts}


def evaluation_change(stored: dict, current: dict) -> list[str]:
    """A message if a run resumes with another number of evaluation images, which is allowed."""
    old, new = stored['evaluation images'], current['evaluation images']
    return [] if old == new else [f'changed since the run began: evaluation images were {old}, are now {new}']


def check_same_data(stored: dict, current: dict) -> None:
    """Checks that a run resumes with the training data that it was started with.

    Args:
        stored: the facts in the checkpoint.
        current: `data_facts` of the data that are open now.

    Raises:
        UserError: any other fact differs. The message lists up to five differences.
    """
    facts = [fact for fact in {**stored, **current} if fact != 'evaluation images']
    differences = [line for fact in facts for line in _differences(fact, stored.get(fact), current.get(fact))]
    if differences:
        raise UserError(
            f'the run began on another data set: {"; ".join(differences[:5])}; restore the old data set, or use '
            'another workdir'
        )


def _differences(fact: str, old: object, new: object) -> list[str]:
    """A message for each difference between two values of a fact, which are JSON values."""
    if isinstance(old, list) and isinstance(new, list):
        pairs = enumerate(itertools.zip_longest(old, new))
        return [line for index, (a, b) in pairs for line in _differences(f'{fact} [{index}]', a, b)]
    if isinstance(old, str) and isinstance(new, str):  # macOS file systems store 'é' as two code points
        same = unicodedata.normalize('NFC', old) == unicodedata.normalize('NFC', new)
    else:
        same = old == new
    return [] if same else [f'{fact}: {old!r} became {new!r}']
