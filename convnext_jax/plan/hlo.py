"""Parses the HLO text of a compiled program: run counts, estimated cycles and collectives of its instructions."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

COMPUTATION = re.compile(r'(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$')
INSTRUCTION = re.compile(r'\s+(ROOT )?%?(?P<name>[\w.-]+) = (?P<result>.*?) (?P<opcode>[a-z][a-z0-9-]*)\(')
CALLED = re.compile(r'\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)')
BRANCHES = re.compile(r'\bbranch_computations=\{([^}]*)\}')
# Three formats of a collective's groups of devices: {{0,1},{2,3}}; [groups,size]<=…; mesh axes, whole or in part.
GROUP = re.compile(r'\breplica_groups=\{\{([\d,]+)\}')
GROUPS_BY_NUMBER = re.compile(r'\breplica_groups=\[\d+,(\d+)\]<=')
GROUPS_BY_AXES = re.compile(r'\breplica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}')
ARRAY = re.compile(r'\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]')
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of the program.

    Attributes:
        name: name of the instruction in the program.
        opcode: such as 'fusion'. An asynchronous operation has two instructions, such as 'all-reduce-start' and
            'all-reduce-done'.
        result: type of the result, such as 'bf16[64,56,56,96]{3,2,1,0}', or a tuple of types in parentheses.
        operation: the JAX operation that it was compiled from.
        runs: number of times it runs in one training step.
        cycles: the compiler's estimate for one run; 0 if there is none.
        group: number of chips in each group of a collective; None for all chips, and for other instructions.
        chain: number of a collective that a TPU overlaps with fusions. Each of these fusions contains the collective
            with the same number.
    """

    name: str
    opcode: str
    result: str
    operation: str
    runs: int
    cycles: int
    group: int | None
    chain: str | None

    def bytes_by_type(self) -> dict[str, int]:
        """Element type → bytes of the result with this type."""
        sizes: dict[str, int] = {}
        for dtype, bits, shape in ARRAY.findall(self.result):
            elements = math.prod(int(side) for side in filter(None, shape.split(',')))
            sizes[dtype] = sizes.get(dtype, 0) + elements * int(bits or 8) // 8
        return sizes


@dataclasses.dataclass
class Collectives:
    """The total of all collectives of one kind, element type and group size.

    Attributes:
        runs: number of runs in one training step.
        size: bytes of their results on each device.
    """

    runs: int = 0
    size: int = 0


Computations = dict[str, list[re.Match[str]]]
"""Name of a computation → the matches of `INSTRUCTION` on its lines."""

Found = dict[tuple[str, str, int], Collectives]
"""Collectives by kind, element type and group size."""


def read_program(text: str, kernel_cycles: Mapping[str, int] | None = None) -> list[Instruction]:
    """Reads all instructions that the program runs, also in loops, calls and conditionals.

    The trip count of a loop is read from its annotation, or else it is the only constant in the loop's condition. A
    loop without a static trip count counts as one iteration. All branches of a conditional count.

    Args:
        text: the program in HLO.
        kernel_cycles: name of a Pallas kernel → its cycles, because the program contains no estimate of them.
    """
    computations: Computations = {}
    entry = ''
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            instructions = computations.setdefault(header['name'], [])
            entry = header['name'] if header['entry'] else entry
        elif instruction := INSTRUCTION.match(line):
            instructions.append(instruction)
    program, kernel_cycles = _run(computations, entry, 1), kernel_cycles or {}
    return [dataclasses.replace(i, cycles=kernel_cycles.get(i.name, i.cycles)) for i in program]


def _run(computations: Computations, name: str, runs: int) -> Iterator[Instruction]:
    groups: dict[str, int | None] = {}
    for instruction in computations[name]:
        line, opcode = instruction.string, instruction['opcode']
        began = _first(r'-done\(%?([\w.-]+)', line)
        group = groups[instruction['name']] = groups.get(began) if began else _group_size(line)
        yield Instruction(
            name=instruction['name'],
            opcode=opcode,
            result=instruction['result'],
            operation=_first(r'op_name="([^"]*)"', line) or '',
            runs=runs,
            cycles=int(_first(r'"estimated_cycles":"(\d+)"', line) or 0),
            group=group,
            chain=_first(r'\bchain_id="(\d+)"', line),
        )
        if opcode.endswith(('-done', '-update')):  # they name the computation that was counted at -start
            continue
        times = _trip_count(line, computations) if opcode == 'while' else 1
        branches = re.findall(r'[\w.-]+', _first(BRANCHES, line) or '')
        for called in CALLED.findall(line) + branches:
            yield from _run(computations, called, runs * times)


def _group_size(line: str) -> int | None:
    if members := _first(GROUP, line):
        return len(members.split(','))
    if size := _first(GROUPS_BY_NUMBER, line):
        return int(size)
    if by_axes := GROUPS_BY_AXES.search(line):
        lengths = dict(re.findall(r"'(\w+)'=(\d+)", by_axes[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", by_axes[2])
        return math.prod(int(part or lengths[axis]) for axis, part in axes)
    return None


def _trip_count(line: str, computations: Computations) -> int:
    known = _first(r'"known_trip_count":\{"n":"(\d+)"', line)
    name = _first(r'\bcondition=%?([\w.-]+)', line) or ''
    condition = '\n'.join(instruction.string for instruction in computations[name])
    limits = [known] if known else re.findall(r'= [su]32\[\]\S* constant\((\d+)\)', condition)
    return int(limits[0]) if len(limits) == 1 else 1


def _first(pattern: str | re.Pattern, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def collectives(program: list[Instruction], chips: int) -> Found:
    """Sums up the collectives of a program. A collective that is overlapped with several fusions counts once.

    Args:
        program: from `read_program`.
        chips: number of chips that run the program.
    """
    found: Found = {}
    chains: set[str] = set()
    for instruction in program:
        kind = instruction.opcode.removesuffix('-done')
        if kind in COLLECTIVES and instruction.chain not in chains:
            if instruction.chain:
                chains.add(instruction.chain)
            for dtype, size in instruction.bytes_by_type().items():
                total = found.setdefault((kind, dtype, instruction.group or chips), Collectives())
                total.runs += instruction.runs
                total.size += instruction.runs * size
    return found


def bytes_sent(found: Found) -> float:
    """The minimum number of bytes that each chip sends in one training step, for any algorithm of the collectives.

    An all-reduce over n chips, for example, sends at least 2 (n − 1) / n times the bytes of its result.

    Args:
        found: from `collectives`.
    """

    def sent_per_byte(kind: str, chips: int) -> float:
        others = (chips - 1) / chips
        return {
            'all-reduce': 2 * others,
            'all-gather': others,
            'reduce-scatter': chips - 1,
            'all-to-all': others,
            'collective-permute': 1,
        }[kind]

    return sum(sent_per_byte(kind, chips) * total.size for (kind, _, chips), total in found.items())
