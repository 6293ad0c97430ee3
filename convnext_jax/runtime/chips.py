"""A table of accelerators: memory, peak speed and link bandwidth, as documented by their vendors."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, which is one JAX device.

    Attributes:
        memory: memory of the device in GiB.
        bfloat16: dense peak of matrix products of bfloat16 arrays, in TFLOP/s.
        float32: dense peak of matrix products of float32 arrays at JAX's default precision, in TFLOP/s. TPUs multiply
            them in bfloat16, and GPUs in TensorFloat-32.
        kind: regular expression for `jax.Device.device_kind`.
        clock: clock frequency in GHz, to convert the compiler's estimated cycles to seconds; None if the compiler does
            not estimate cycles.
        link: total bandwidth of the links to other chips in one direction, in GB/s; None if `clock` is None.
    """

    memory: float
    bfloat16: float
    float32: float
    kind: str
    clock: float | None = None
    link: float | None = None

    def peak(self, dtype: str) -> float:
        """The peak in FLOP/s for arrays of this dtype. float16 is as fast as bfloat16."""
        return 1e12 * (self.float32 if dtype == 'float32' else self.bfloat16)


# Sources. Memory, peaks and links: cloud.google.com/tpu/docs/v4, v5e, v5p and v6e; NVIDIA's data sheets of the A100 and
# the H100 SXM, whose peaks with sparsity are halved here. The H100 PCIe and NVL have other clocks and are not listed.
# Default precision: docs.jax.dev/en/latest/201/precision.html. Kinds: jax/_src/pallas/mosaic/tpu_info.py. Google does
# not document the clocks: they are the documented peaks divided by the FLOPs per cycle of the matrix units, with four
# units of 256×256 assumed for v6e.
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
    """The chip with this `jax.Device.device_kind`, or None if the table does not have it, as for a CPU."""
    return next((chip for chip in CHIPS.values() if re.fullmatch(chip.kind, device_kind)), None)
