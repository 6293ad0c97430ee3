"""Labels and heads are matched by class name, and by position only where there are no names, with a word."""

import unicodedata

import pytest

from convnext_jax.data.class_names import kept_outputs, match_names, outputs_of_classes
from convnext_jax.errors import UserError

UNNAMED = 'the weights have no class names'
KEPT = 'the head is kept, and classes are matched by position: {} (--config.init.head=new starts a new one)'
NEW = 'the head is newly initialised: '
SYNSETS = ['n01440764', 'n01443537', 'n01484850']
WORDS = ['tench, Tinca tinca', 'goldfish, Carassius auratus', 'great white shark']


@pytest.mark.parametrize(
    ('data', 'model', 'expected'),
    [
        (['ant', 'bee'], ['ant', 'bee'], [0, 1]),
        (['bee', 'cat'], ['ant', 'bee', 'cat'], [1, 2]),
        (['ant', 'bee'], ['bee', 'ant'], [1, 0]),
        (['1', '2'], ['0', '1', '2'], [1, 2]),  # digits are names where both have them
        (['crane', 'crane'], ['crane', 'crane'], [0, 1]),  # ImageNet's two, where the lists agree
        ([unicodedata.normalize('NFD', 'żubr')], ['ant', 'żubr'], [1]),  # a folder copied from a Mac
        (SYNSETS[1:], SYNSETS, [1, 2]),
    ],
)
def test_outputs_follow_names(data, model, expected):
    """By position a data set that lacks a class, or lists its classes in another order, is scored wrongly."""
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
def test_positions_are_trusted_with_a_word_where_there_are_no_names(data, model, why):
    """Published ImageNet weights have words or no names for classes that data sets call by WordNet ids."""
    outputs, note = outputs_of_classes(data, model, 3)
    assert outputs == [0, 1, 2]
    assert note == (
        f'classes are matched by position, class 0 ({data[0]}) to output 0: {why} '
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
        (['ant', 'bee', 'cat'], None, 2, 'the data has 3 classes, and the model 2 outputs'),
        (SYNSETS[1:], WORDS, 3, 'the model lacks these classes: n01443537'),
        (
            ['0', '1', '10', '11'],
            [f'LABEL_{i}' for i in range(4)],
            4,
            'the model lacks',
        ),  # LABEL_10?
        (WORDS, SYNSETS, 3, 'the model lacks'),  # words in the order of the alphabet, perhaps
    ],
)
def test_classes_that_cannot_be_matched_are_refused(data, model, outputs, message):
    """A guess would be a wrong accuracy with exit status 0."""
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
            'the head keeps 2 of 3 classes by their names; newly initialised: dog',
        ),
        (['cat', 'ant'], ['ant', 'bee', 'cat'], [2, 0], 'the head keeps 2 of 2 classes by their names'),
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
def test_a_row_of_the_head_follows_its_name(new, old, kept, note):
    """Rows of other classes start from a loss far above ln(classes), and nobody sees why."""
    assert kept_outputs(new, len(new), old, 2 if old is None else len(old)) == (kept, note)


def test_outputs_beyond_the_names_are_newly_initialised():
    kept, note = kept_outputs(['ant', 'dog'], 4, ['ant', 'bee'], 2)
    assert kept == [0, -1, -1, -1]
    assert note == 'the head keeps 1 of 2 classes by their names; newly initialised: dog, 2 outputs without a class'
    assert kept_outputs(['ant', 'bee'], 3, ['ant', 'bee'], 3)[0] == [0, 1, 2]
