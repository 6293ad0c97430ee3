"""Reading a compiled program's text. program.hlo is written in the form of XLA's TPU and GPU compilers, and short."""

from pathlib import Path

import pytest

from convnext_jax.plan.hlo import Collectives, bytes_sent, collectives, read_program

PROGRAM = Path(__file__).with_name('program.hlo').read_text()


@pytest.fixture(scope='module')
def program():
    return {instruction.name: instruction for instruction in read_program(PROGRAM)}


@pytest.mark.parametrize(
    ('name', 'runs', 'cycles'),
    [
        ('light', 1, 40),
        ('heavy', 9, 1000),  # as the condition's constant says
        ('copy.1', 27, 10),  # as backend_config says, inside the other loop
        ('log.1', 1, 5),  # as long as the data wants
        ('log.2', 1, 6),
        ('all-reduce.1', 9, 0),
    ],
)
def test_loops_and_branches_are_applied(program, name, runs, cycles):
    """A scan's body counted once would make 27 blocks cost what one does."""
    assert (program[name].runs, program[name].cycles) == (runs, cycles)


def test_an_instruction_says_where_it_comes_from(program):
    heavy = program['heavy']
    assert (heavy.opcode, heavy.operation) == ('fusion', 'jit(train_step)/while/body/exp')
    assert heavy.bytes_by_type() == {'bf16': 16, 'f32': 32}


def test_collectives_count_once_with_type_and_bytes():
    """A pair of start and done counted twice would double the communication; its start's type holds the operand too."""
    assert collectives(read_program(PROGRAM), chips=16) == {
        ('all-reduce', 'bf16', 2): Collectives(runs=9, size=9 * 2 * (320 + 7 * 7 * 320)),  # groups written out
        ('all-gather', 'f32', 4): Collectives(runs=2, size=64 + 128),  # by their number and size; beside fusions
        ('reduce-scatter', 'f32', 8): Collectives(runs=1, size=8),  # by axes of a mesh, one of them in part
        ('all-reduce', 'f32', 16): Collectives(runs=1, size=32),  # all in one
    }


def test_what_a_chip_sends_depends_on_how_many_take_part():
    """A chip sends 2 (n − 1) / n of a sum's bytes, however large the pod around these n is."""
    found = {('all-reduce', 'f32', 4): Collectives(3, 400), ('all-gather', 'bf16', 4): Collectives(1, 200)}
    assert bytes_sent(found) == 2 * 300 + 150
    assert bytes_sent({('reduce-scatter', 'f32', 16): Collectives(1, 10)}) == 150
    assert bytes_sent({('all-reduce', 'f32', 1): Collectives(3, 400)}) == 0
