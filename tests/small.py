"""Runs a command with atto models of two stages: `python tests/small.py train.py …`, `… -m convnext_jax predict …`.

The training step of these models compiles in a third of the time that a model of four stages needs.
"""

import gc
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from convnext_jax.models.variants import VARIANTS, Variant  # noqa: E402 - needs sys.path


def small_variants(depths: tuple[int, ...] = (1, 1), widths: tuple[int, ...] = (8, 16)) -> dict[str, Variant]:
    """Name of an atto model of V1 or V2 → the small architecture that replaces it."""
    return {
        'convnext_atto': Variant(depths, widths),
        'convnextv2_atto': Variant(depths, widths, grn=True, layer_scale_init=0),
    }


# Tracing a model creates many objects that stay alive. Python would search them again and again for garbage.
gc.set_threshold(100_000)

if __name__ == '__main__':
    VARIANTS.update(small_variants())
    sys.argv = sys.argv[1:]
    if sys.argv[0] == '-m':
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name='__main__')
