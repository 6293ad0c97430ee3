"""Counts the cycles of Pallas kernels on TPU, for which the HLO has no estimate.

With the flags of `listing_flags`, libtpu writes the instructions of each kernel to a file, the listing. A TPU issues
one bundle of instructions per cycle, so the cycles of a kernel are the number of its bundles, each multiplied by the
trip counts of the loops around it. Waiting for memory is not counted: a kernel copies its next block while it computes.
"""

import re
from pathlib import Path

LISTING = re.compile(r'\d+-(?P<name>.*)-\d+-final_bundles\.txt')
ADDRESS = re.compile(r'\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:')
REGION = re.compile(r'Start region (\d+)')
# A loop ends with two instructions: a comparison of the counter with the trip count, and a jump to the first region.
EXIT_TEST = re.compile(r'%(p\w+) = scmp\.ge\.s32\.totalorder (?:\(!?%p\w+\), )?%\w+, (\d+) /\* loop exit test')
GRID = 'iteration index, stage = 1'  # in the first line of the loop over the grid
JUMP_BACK = re.compile(r'sbr\.rel \(!%(p\w+)\) target = \$region(\d+)')
KERNEL = re.compile(r'%?(?P<name>[\w.-]+) = (?P<types>.*? custom-call\(.*?\)), custom_call_target="tpu_custom_call"')


def listing_flags(folder: Path) -> str:
    """Flags for LIBTPU_INIT_ARGS with which libtpu writes the instructions of all fusions and kernels to a folder."""
    label = 'final_bundles'
    return f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={label}'


def kernel_cycles(program: str, folder: Path) -> dict[str, int]:
    """Name of a Pallas kernel in the program → its cycles, if its instructions are in the folder.

    The compiler may compile several equal kernels once, and name the listing after one of them.

    Args:
        program: the program in HLO.
        folder: the folder of `listing_flags`.
    """
    kernels = {match['name']: re.sub(r'%[\w.-]+', '', match['types']) for match in KERNEL.finditer(program)}
    counted = {}
    for path in folder.glob('*-final_bundles.txt'):
        listing = LISTING.fullmatch(path.name)
        if listing and (name := listing['name']) in kernels:
            counted[kernels[name]] = count_cycles(path.read_text(encoding='utf-8', errors='replace'))
    return {name: counted[types] for name, types in kernels.items() if types in counted}


def count_cycles(listing: str) -> int:
    """The cycles of one kernel.

    The loop over the grid has two more iterations than the grid: one that only copies the first block into the chip's
    vector memory, and one that only copies the last result out.

    Args:
        listing: the instructions of the kernel, as libtpu writes them.
    """
    address, regions, trips, grids = 0, {}, {}, set()
    loops: list[tuple[int, int, int]] = []
    addresses = []
    for line in listing.splitlines():
        if found := ADDRESS.match(line):
            address = int(found[1], 16)
            addresses.append(address)
        regions |= dict.fromkeys(REGION.findall(line), address)
        if GRID in line:
            grids.add(address)
        trips |= {predicate: int(limit) for predicate, limit in EXIT_TEST.findall(line)}
        for predicate, region in JUMP_BACK.findall(line):
            if predicate in trips and region in regions:
                first = regions[region]
                loops.append((first, address, trips[predicate] - 2 * (first in grids)))
    cycles = 0
    for address in addresses:
        runs = 1
        for first, last, count in loops:
            if first <= address <= last:
                runs *= count
        cycles += runs
    return cycles
