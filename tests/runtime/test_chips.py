"""The table of accelerators: the chip that each device kind of JAX names, and its peak FLOP/s."""

import pytest

from convnext_jax.runtime.chips import find_chip


@pytest.mark.parametrize(
    ('device_kind', 'bfloat16', 'float32'),
    [
        ('TPU v4', 275e12, 275e12),
        ('TPU v5 lite', 197e12, 197e12),
        ('TPU v5e', 197e12, 197e12),
        ('TPU v5', 459e12, 459e12),
        ('TPU v5p', 459e12, 459e12),
        ('TPU v6 lite', 918e12, 918e12),
        ('NVIDIA A100-SXM4-40GB', 312e12, 156e12),
        ('NVIDIA A100-PCIE-40GB', 312e12, 156e12),
        ('NVIDIA A100-SXM4-80GB', 312e12, 156e12),
        ('NVIDIA A100 80GB PCIe', 312e12, 156e12),
        ('NVIDIA H100 80GB HBM3', 989e12, 494e12),
    ],
)
def test_a_chip_is_found_by_its_device_kind(device_kind, bfloat16, float32):
    """A v5p that is taken for a v5e would report more than twice its real utilisation."""
    chip = find_chip(device_kind)
    assert (chip.peak('bfloat16'), chip.peak('float32')) == (bfloat16, float32)
    assert chip.peak('float16') == bfloat16


@pytest.mark.parametrize(
    'device_kind', ['cpu', 'TPU v4 lite', 'TPU v3', 'NVIDIA H100 PCIe', 'NVIDIA H100 NVL', 'TPU7x']
)
def test_an_unknown_device_kind_has_no_chip(device_kind):
    """A run would report a wrong utilisation instead of none."""
    assert find_chip(device_kind) is None
