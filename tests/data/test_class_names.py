"""The matching of classes by name; without names, by position and with a message."""

import unicodedata

import pytest

from convnext_jax.data.class_names import kept_outputs, match_names, outputs_of_classes
from convnext_jax.errors import UserError

UNNAMED = 'the weights have no class names'
KEPT = (
    'the head is kept, and classes are matched by position, because {} (--config.init.head=new initialises a new head)'
)
NEW = 'the head is newly initialised: '
SYNSETS = ['n01440764', 'n01443537', 'n01484850']
WORDS = ['tench, Tinca tinca', 'goldfish, Carassius auratus', 'great white shark']


@pytest.mark.parametrize(
    ('data', 'model', 'expected'),
    [
        (['ant', 'bee'], ['ant', 'bee'], [0, 1]),
        (['bee', 'cat'], ['ant', 'bee', 'cat'], [1, 2]),
        (['ant', 'bee'], ['bee', 'ant'], [1, 0]),
        (['1', '2'], ['0', '1', '2'], [1, 2]),  # numbers are names if both lists have numbers
        (
            ['crane', 'crane'],
            ['crane', 'crane'],
            [0, 1],
        ),  # ImageNet has two classes with this name; equal lists need no matching
        ([unicodedata.normalize('NFD', 'żubr')], ['ant', 'żubr'], [1]),  # a folder copied from a Mac
        (SYNSETS[1:], SYNSETS, [1, 2]),
    ],
)
def test_outputs_follow_names(data, model, expected):
    """Matched by position, a data set that lacks a class or has another order would get a wrong accuracy."""
    assert outputs_of_classes(data, model, len(model)) == (expected, '')
    assert match_names(data, model, 'train') == expected


@pytest.mark.parametrize(
    ('data', 'model', 'why'),
    [
        (['ant', 'bee', 'cat'], None, UNNAMED),
        (['ant', 'bee', 'cat'], ['LABEL_0', 'LABEL_1', 'LABEL_2'], 'the weights name their classes LABEL_0, …'),
        (['0', '1', '2'], ['ant', 'bee', 'cat'], 'the data names its classes 0, …, the weights ant, …'),
        (SYNSETS, WORDS, 'the data names its classes n01440764, …, the weights tench, Tinca tinca, …'),
    ],
)
def test_classes_without_names_are_matched_by_position_with_a_message(data, model, why):
    """Published ImageNet weights, with English names or none, could not be used with data sets with WordNet ids."""
    outputs, note = outputs_of_classes(data, model, 3)
    assert outputs == [0, 1, 2]
    assert note == (
        f'classes are matched by position, class 0 ({data[0]}) to output 0, because {why} '
        '(classes of the data: 3, outputs of the model: 3)'
    )
    kept, note = kept_outputs(data, 3, model, 3)
    assert (kept, note) == ([0, 1, 2], KEPT.format(why))


@pytest.mark.parametrize(
    ('data', 'model', 'outputs', 'message'),
    [
        (['ant', 'dog'], ['ant', 'bee'], 2, 'the model lacks these classes: dog'),
        (list('abcdefgh'), list('stuvwxyz'), 8, 'the model lacks these classes: a, b, c, d, e and 3 more'),
        (['0', '1', '5'], ['0', '1', '2'], 3, 'the model lacks these classes: 5'),
        (['crane'], ['crane', 'heron', 'crane'], 3, 'several classes are called crane'),
        (['ant', 'bee', 'cat'], None, 2, 'the data has 3 classes, but the model has only 2 outputs'),
        (SYNSETS[1:], WORDS, 3, 'the model lacks these classes: n01443537'),
        (
            ['0', '1', '10', '11'],
            [f'LABEL_{i}' for i in range(4)],
            4,
            'the model lacks',
        ),  # '10' might be LABEL_10 or LABEL_2
        (WORDS, SYNSETS, 3, 'the model lacks'),  # the words may be in alphabetical order
    ],
)
def test_classes_that_cannot_be_matched_are_refused(data, model, outputs, message):
    """A guess would silently give a wrong accuracy."""
    with pytest.raises(UserError, match=f'^{message}'):
        outputs_of_classes(data, model, outputs)


@pytest.mark.parametrize(
    ('new', 'old', 'kept', 'note'),
    [
        (['ant', 'bee'], ['ant', 'bee'], [0, 1], ''),
        (
            ['bee', 'cat', 'dog'],
            ['ant', 'bee', 'cat'],
            [1, 2, -1],
            'the head keeps the outputs of 2 of 3 classes; newly initialised: dog',
        ),
        (['cat', 'ant'], ['ant', 'bee', 'cat'], [2, 0], 'the head keeps the outputs of 2 of 2 classes'),
        (
            ['dog', 'elk'],
            ['ant', 'bee'],
            [-1, -1],
            NEW + 'the weights have none of these classes',
        ),
        (['ant', 'bee'], ['0', '1', '2'], [-1, -1], NEW + '2 classes here, 3 in the weights'),
        (
            ['ant', 'bee'],
            None,
            [0, 1],
            KEPT.format(UNNAMED),
        ),
        (
            ['crane', 'ant'],
            ['crane', 'crane'],
            [-1, -1],
            NEW + 'the weights have none of these classes',
        ),
    ],
)
def test_the_head_keeps_the_outputs_of_known_classes(new, old, kept, note):
    """With the weights of other classes, training would start from a loss far above ln(classes)."""
    assert kept_outputs(new, len(new), old, 2 if old is None else len(old)) == (kept, note)


def test_outputs_without_names_are_newly_initialised():
    """They would get the weights of unrelated classes."""
    kept, note = kept_outputs(['ant', 'dog'], 4, ['ant', 'bee'], 2)
    assert kept == [0, -1, -1, -1]
    assert note == 'the head keeps the outputs of 1 of 2 classes; newly initialised: dog, 2 outputs without a class'
    assert kept_outputs(['ant', 'bee'], 3, ['ant', 'bee'], 3)[0] == [0, 1, 2]
