# SPDX-License-Identifier: Apache-2.0
"""Reference time: MSR and TSC page are one clock, on all VPs."""

from __future__ import annotations

import struct
import time

from rootvisor.tlfs import msrs
from tests.kvm import guest as g
from tests.kvm.guest import Guest


def page_time(guest: Guest, tsc: int) -> int:
    """What a guest computes from the TSC page."""
    page = guest.rdmsr(msrs.REFERENCE_TSC) & ~0xFFF
    scale: int
    offset: int
    sequence, scale, offset = struct.unpack_from("<IxxxxQq", guest.ram, page)
    assert sequence not in (0, 0xFFFFFFFF)
    return (tsc * scale >> 64) + offset


def test_page_is_there_before_anybody_enables_it(usable_kvm: None) -> None:
    with Guest() as guest:
        assert guest.rdmsr(msrs.REFERENCE_TSC) & 1 == 0
        assert page_time(guest, guest.one(g.RDTSC).rax) > 0


def test_msr_lies_between_two_readings_of_the_page(guest: Guest) -> None:
    ops = [g.Op(kind, rcx=msrs.TIME_REF_COUNT) for kind in (g.RDTSC, g.RDMSR, g.RDTSC)] * 20
    guest.run(ops)
    for before, middle, after in zip(ops[0::3], ops[1::3], ops[2::3], strict=True):
        assert page_time(guest, before.rax) <= middle.rax <= page_time(guest, after.rax)


def test_time_runs_at_10_mhz_from_zero(guest: Guest) -> None:
    def reading() -> tuple[float, int, float]:
        """The count between two readings of the host's clock, however long it took."""
        return time.monotonic(), guest.rdmsr(msrs.TIME_REF_COUNT), time.monotonic()

    early, first, late = reading()
    assert first < 600 * 10_000_000
    time.sleep(0.2)
    begin, second, end = reading()
    assert 0.98e7 * (begin - late) < second - first < 1.02e7 * (end - early)


def test_time_is_monotonic_across_vps(guest2: Guest) -> None:
    last = 0
    for n in range(20):
        now = guest2.rdmsr(msrs.TIME_REF_COUNT, vp=n % 2)
        assert now >= last
        last = now


def test_sequence_survives_enable_and_move(guest: Guest) -> None:
    home = guest.rdmsr(msrs.REFERENCE_TSC)
    for value in (home | 1, g.SPARE | 1, home | 1):
        guest.wrmsr(msrs.REFERENCE_TSC, value)
        assert page_time(guest, guest.one(g.RDTSC).rax) > 0


def test_scale_is_that_of_the_frequency(guest: Guest) -> None:
    page = guest.rdmsr(msrs.REFERENCE_TSC) & ~0xFFF
    scale = struct.unpack_from("<Q", guest.ram, page + 8)[0]
    assert scale == (10_000_000 << 64) // guest.rdmsr(msrs.TSC_FREQUENCY)
