"""The bytes of collectives that the table of docs/clusters.md shows."""

import pytest

from benchmarks.scaling import NETWORK, Traffic, share, traffic
from convnext_jax.plan.hlo import Collectives, bytes_sent


def test_the_bytes_are_those_that_plan_computes():
    """The table would promise another scaling than `plan` reports for the same collectives."""
    all_reduce = {('all-reduce', 'f32', 8): Collectives(1, 4 * 1000)}
    assert traffic(1000, 0, chips=8, slices=1, fsdp=1) == Traffic(bytes_sent(all_reduce), 0)
    fsdp = {
        ('all-gather', 'bf16', 4): Collectives(2, 2 * 2 * 1000),
        ('reduce-scatter', 'f32', 4): Collectives(1, 4 * 1000 // 4),
        ('all-reduce', 'f32', 2): Collectives(1, 4 * 1000 // 4),
        ('all-reduce', 'f32', 8): Collectives(1, 4 * 100),
    }
    assert traffic(100, 1000, chips=8, slices=1, fsdp=4).inside == pytest.approx(bytes_sent(fsdp))


def test_each_chip_sends_its_part_of_the_sums_to_the_other_slice():
    """Two slices would seem as fast as one, or slower by the number of chips."""
    sent = traffic(1000, 0, chips=16, slices=2, fsdp=1)
    assert sent == Traffic(traffic(1000, 0, chips=8, slices=1, fsdp=1).inside, 4 * 1000 / 8)
    assert share(Traffic(0, NETWORK), chips=16, slices=2, milliseconds=1000) == pytest.approx(0.5)
