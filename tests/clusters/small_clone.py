"""A folder like a clone of the repository. Its train.py trains a small model, slowly enough to be interrupted."""

import sys
from pathlib import Path

from conftest import ROOT

TRAIN = f"""
import os, runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
from convnext_jax.monitoring.throughput import StepTimer
dispatched = StepTimer.dispatched
process = os.environ.get('SLURM_PROCID') or os.environ.get('OMPI_COMM_WORLD_RANK')
seconds = float(os.environ.get('STEP_SECONDS', 0)) if process == (os.environ.get('SLOW_PROCESS') or process) else 0
def slow(*arguments):
    time.sleep(seconds)
    dispatched(*arguments)
StepTimer.dispatched = slow
sys.argv = ['small.py', {str(ROOT / 'train.py')!r}, *sys.argv[1:]]
runpy.run_path({str(ROOT / 'tests/small.py')!r}, run_name='__main__')
"""


def make_small_clone(folder: Path) -> Path:
    """Links a virtual environment and the recipes in a folder, writes a train.py, and returns the folder.

    Each step of this train.py waits for STEP_SECONDS, on the process SLOW_PROCESS or by default on all processes.
    """
    (folder / '.venv').symlink_to(sys.prefix)
    (folder / 'configs').symlink_to(ROOT / 'configs')
    (folder / 'train.py').write_text(TRAIN)
    return folder
