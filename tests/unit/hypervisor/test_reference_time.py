# SPDX-License-Identifier: Apache-2.0
"""The clock's arithmetic: what a guest computes from the page is what the MSR says."""

from __future__ import annotations

import struct

import pytest

from rootvisor.hypervisor.reference_time import ReferenceTime


@pytest.mark.parametrize("hz", [1_000_000_000, 2_494_141_000, 3_000_000_001, 10_000_001, 999_999_937])
def test_page_and_msr_agree_to_the_tick(hz: int) -> None:
    clock = ReferenceTime(hz, 123_456_789_012)
    page = memoryview(bytearray(4096))
    clock.write_page(page)
    sequence, scale, offset = struct.unpack_from("<IxxxxQq", page)
    assert sequence not in (0, 0xFFFFFFFF)
    for tsc in (123_456_789_012, 123_456_789_012 + hz, 123_456_789_012 + hz * 3600 * 24 * 365):
        assert clock.at(tsc) == (tsc * scale >> 64) + offset


def test_time_begins_at_zero_and_counts_100_ns() -> None:
    clock = ReferenceTime(2_000_000_000, 5_000)
    assert clock.at(5_000) == 0
    assert abs(clock.at(5_000 + 2_000_000_000) - 10_000_000) <= 1
    assert clock.at(0) == 0, "never negative"
