"""Parsing of HLO text. program.hlo is a short program in the formats of XLA's TPU and GPU compilers."""

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
        ('heavy', 9, 1000),  # trip count from the constant in the condition
        ('copy.1', 27, 10),  # trip count from backend_config, nested in the other loop
        ('log.1', 1, 5),  # no static trip count
        ('log.2', 1, 6),
        ('all-reduce.1', 9, 0),
    ],
)
def test_loops_and_branches_are_applied(program, name, runs, cycles):
    """The body of a scan counts once, and 27 blocks seem to cost as much as one."""
    assert (program[name].runs, program[name].cycles) == (runs, cycles)


def test_an_instruction_has_its_jax_operation_and_result_bytes(program):
    """The user cannot find the expensive line of the model."""
    heavy = program['heavy']
    assert (heavy.opcode, heavy.operation) == ('fusion', 'jit(train_step)/while/body/exp')
    assert heavy.bytes_by_type() == {'bf16': 16, 'f32': 32}


def test_collectives_count_once_with_type_and_bytes():
    """The communication is doubled, because both -start and -done count, or the operand in the type of -start."""
    assert collectives(read_program(PROGRAM), chips=16) == {
        ('all-reduce', 'bf16', 2): Collectives(runs=9, size=9 * 2 * (320 + 7 * 7 * 320)),  # explicit groups
        ('all-gather', 'f32', 4): Collectives(runs=2, size=64 + 128),  # groups by number and size; overlapped
        ('reduce-scatter', 'f32', 8): Collectives(runs=1, size=8),  # groups by mesh axes, one of them in part
        ('all-reduce', 'f32', 16): Collectives(runs=1, size=32),  # one group of all chips
    }


def test_what_a_chip_sends_depends_on_how_many_take_part():
    """The communication of FSDP in small groups is overestimated: n chips send 2 (n − 1) / n, in a pod of any size."""
    found = {('all-reduce', 'f32', 4): Collectives(3, 400), ('all-gather', 'bf16', 4): Collectives(1, 200)}
    assert bytes_sent(found) == 2 * 300 + 150
    assert bytes_sent({('reduce-scatter', 'f32', 16): Collectives(1, 10)}) == 150
    assert bytes_sent({('all-reduce', 'f32', 1): Collectives(3, 400)}) == 0
