"""Fault injection: train.py under kills, damaged files, full disks, damaged images, NaN and clock jumps.

    python -m benchmarks.faults [--kills=50] [--seed=0] [--only=kill,damage] [--folder=DIR]

A case passes if the run finishes and all its arrays are bit-identical to the arrays of an uninterrupted run. It also
passes if the run stops with a one-line error and intact checkpoints, and finishes with bit-identical arrays when the
same command runs again without the fault. All finished checkpoints are restored and compared. The command prints one
line for each case, and exits with status 1 if a case fails. Cases that need more permissions (a small tmpfs needs root)
are skipped, and the reason is printed.
"""

import argparse
import collections
import contextlib
import random
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.faults import damage, disk, kills, within
from benchmarks.faults.runs import Lab


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument('--kills', type=int, default=50, help='number of kills')
    arguments.add_argument('--seed', type=int, default=0, help='seed of the random times, files and bits')
    arguments.add_argument('--only', default='', help='kinds of faults, for example kill or damage,disk')
    arguments.add_argument('--folder', type=Path, help='folder for the runs; by default a temporary folder')
    options = arguments.parse_args()
    kinds = {
        'kill': lambda lab, rng: kills.cases(lab, rng, options.kills),
        'damage': damage.cases,
        'disk': disk.full_disk,
        'read-only': disk.read_only,
        'images': within.images,
        'nan': within.not_finite,
        'clock': within.clock,
    }
    chosen = options.only.split(',') if options.only else list(kinds)
    if unknown := set(chosen) - set(kinds):
        arguments.error(f'--only: unknown {", ".join(sorted(unknown))}; choose from {", ".join(kinds)}')
    count = collections.Counter()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='faults')))
        lab = Lab(folder.absolute())
        for kind in chosen:
            began = time.monotonic()
            for case in kinds[kind](lab, random.Random(f'{options.seed} {kind}')):
                count[case.verdict] += 1
                print(f'{case.verdict:4}  {kind:9}  {case.moment}  →  {"; ".join(case.happened)}', flush=True)
            print(f'      {kind}: {time.monotonic() - began:.0f} s', flush=True)
    print(', '.join(f'{number} {verdict}' for verdict, number in count.items()))
    return 1 if count['FAIL'] else 0


if __name__ == '__main__':
    sys.exit(main())
