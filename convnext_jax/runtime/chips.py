"""Accelerators: what their vendors say of them, and the names under which JAX knows them."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, which is one device of JAX.

    Attributes:
        memory: GiB of HBM.
        bfloat16: peak of its matrix units, TFLOP/s, dense.
        float32: the same of float32 arrays at JAX's default precision: TPUs multiply them in bfloat16, and GPUs in
            TensorFloat-32.
        kind: pattern of JAX's `device_kind`.
        clock: GHz, for the compiler's cycles; None where it counts none.
        link: GB/s that all its links to the others carry one way; None where there is no clock to compare with.
    """

    memory: float
    bfloat16: float
    float32: float
    kind: str
    clock: float | None = None
    link: float | None = None

    def peak(self, dtype: str) -> float:
        """FLOP/s of matrix products of arrays of this type; GPUs are as fast in float16 as in bfloat16."""
        return 1e12 * (self.float32 if dtype == 'float32' else self.bfloat16)


# Memory, peaks and links: cloud.google.com/tpu/docs/v4, v5e, v5p and v6e; nvidia.com's data sheets of the A100 and of
# the H100 SXM (its PCIe and NVL cards have other clocks, and no row here), which give twice the peak, with sparsity.
# Precision by default: docs.jax.dev/en/latest/201/precision.html. Kinds: as jax/_src/pallas/mosaic/tpu_info.py reads
# them. Google gives no clocks: they follow from the documented peak and matrix units, four of 256×256 taken for v6e.
CHIPS = {
    'v4': Chip(memory=32, bfloat16=275, float32=275, kind='TPU v4'),
    'v5e': Chip(memory=16, bfloat16=197, float32=197, kind='TPU v5 lite|TPU v5e', clock=1.5, link=200),
    'v5p': Chip(memory=95, bfloat16=459, float32=459, kind='TPU v5p?', clock=1.75, link=600),
    'v6e': Chip(memory=32, bfloat16=918, float32=918, kind='TPU v6 lite|TPU v6e', clock=1.75, link=400),
    'a100-40': Chip(memory=40, bfloat16=312, float32=156, kind='NVIDIA A100-(SXM4|PCIE)-40GB'),
    'a100-80': Chip(memory=80, bfloat16=312, float32=156, kind='NVIDIA A100(-SXM4-80GB| 80GB PCIe)'),
    'h100': Chip(memory=80, bfloat16=989, float32=494, kind='NVIDIA H100 80GB HBM3'),
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip that JAX calls so, or None if the table has no such chip: a CPU, say."""
    return next((chip for chip in CHIPS.values() if re.fullmatch(chip.kind, device_kind)), None)
