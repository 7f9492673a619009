# SPDX-License-Identifier: Apache-2.0
"""The real-time clock and the ACPI timer."""

from __future__ import annotations

import marshal

import pytest

from rootvisor.chips import clock
from rootvisor.chips.clock import PM_TIMER_HZ, PmTimer, RealTimeClock


def register(rtc: RealTimeClock, index: int) -> int:
    rtc.write(0, 1, index)
    return rtc.read(1, 1)


def test_time_in_bcd_and_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "time", lambda: 1_795_388_399)  # 2026-11-22 22:59:59 UTC, a Sunday
    rtc = RealTimeClock()
    assert [register(rtc, n) for n in (0x32, 9, 8, 7, 6, 4, 2, 0)] == [
        0x20, 0x26, 0x11, 0x22, 1, 0x22, 0x59, 0x59,
    ]  # fmt: skip
    rtc.write(0, 1, 11)
    rtc.write(1, 1, 6)
    assert [register(rtc, n) for n in (0x32, 9, 8, 7, 4, 2, 0)] == [20, 26, 11, 22, 22, 59, 59]


def test_status_registers() -> None:
    rtc = RealTimeClock()
    assert register(rtc, 10) & 0x80 == 0, "no update in progress"
    assert register(rtc, 13) == 0x80, "the battery is good"
    rtc.write(0, 1, 13)
    rtc.write(1, 1, 0)
    assert register(rtc, 13) == 0x80


def test_odd_accesses() -> None:
    rtc = RealTimeClock()
    assert (rtc.read(0, 1), rtc.read(1, 2)) == (0xFF, 0xFFFF)
    rtc.write(0, 2, 0x1234)
    rtc.write(0, 1, 0xFF)
    rtc.write(1, 1, 0xAA)
    assert register(rtc, 0x7F) == 0xAA


def test_pm_timer_counts_and_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = PmTimer()
    monkeypatch.setattr(clock, "monotonic_ns", lambda: 1_000_000_000)
    assert timer.read(0, 4) == PM_TIMER_HZ
    assert timer.read(1, 1) == PM_TIMER_HZ >> 8 & 0xFF
    monkeypatch.setattr(clock, "monotonic_ns", lambda: 2_000_000_000_000)
    assert timer.read(0, 4) == PM_TIMER_HZ * 2000 & 0xFFFFFFFF


def test_pm_timer_goes_on_where_it_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = PmTimer()
    monkeypatch.setattr(clock, "monotonic_ns", lambda: 1_000_000_000)
    state = marshal.loads(marshal.dumps(timer.save()))
    monkeypatch.setattr(clock, "monotonic_ns", lambda: 77_000_000_000)
    other = PmTimer()
    other.restore(state)
    assert other.read(0, 4) == PM_TIMER_HZ
    monkeypatch.setattr(clock, "monotonic_ns", lambda: 78_000_000_000)
    assert other.read(0, 4) == 2 * PM_TIMER_HZ
    other.restore(state)
    assert other.read(0, 4) == PM_TIMER_HZ


def test_clock_registers_are_saved() -> None:
    rtc = RealTimeClock()
    register(rtc, 0x50)
    rtc.write(1, 1, 0x5A)
    state = marshal.loads(marshal.dumps(rtc.save()))
    other = RealTimeClock()
    other.restore(state)
    assert other.read(1, 1) == 0x5A
    assert other.save() == state
    for wrong in ({}, {"index": 0, "ram": b"short"}, {"index": 0, "ram": 128}):
        with pytest.raises((ValueError, KeyError, TypeError)):
            other.restore(wrong)
    assert other.save() == state
