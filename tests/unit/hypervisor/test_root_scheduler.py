# SPDX-License-Identifier: Apache-2.0
"""What wakes a sleeping processor, read from its local APIC; runs of pages. (DISPATCH_VP itself: tests/kvm.)"""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import pytest

from rootvisor.hypervisor import deposit_watch, root_scheduler
from rootvisor.tlfs import messages

MASKED, ONE_SHOT, PERIODIC, DEADLINE = 1 << 16, 0, 1 << 17, 2 << 17


@pytest.mark.parametrize("vector", [0x10, 0x1F, 0x20, 0x31, 0x7F, 0x80, 0xFE, 0xFF])
def test_highest_vector_of_a_256_bit_register(vector: int) -> None:
    lapic = bytearray(1024)
    for number in {0x10, vector}:
        at = 0x200 + (number >> 5) * 0x10
        struct.pack_into("<I", lapic, at, struct.unpack_from("<I", lapic, at)[0] | 1 << (number & 31))
    assert root_scheduler._highest(lapic, 0x200) == vector
    assert root_scheduler._highest(lapic, 0x100) == 0


def timer(
    entry: int, initial: int = 0, current: int = 0, divide: int = 0xB, deadline: int = 0
) -> float | None:
    lapic = bytearray(1024)
    for at, value in ((0x320, entry), (0x380, initial), (0x390, current), (0x3E0, divide)):
        struct.pack_into("<I", lapic, at, value)
    vcpu = SimpleNamespace(try_msr=lambda _: deadline, get_msr=lambda _: 1_000_000, tsc_khz=lambda: 1_000_000)
    vp: Any = SimpleNamespace(vcpu=vcpu, partition=SimpleNamespace(apic_hz=1_000_000_000))
    return root_scheduler._timer_due(vp, lapic)


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [
        ((0x40 | MASKED, 1000, 500), None),
        ((0x40 | ONE_SHOT, 0, 0), None),
        ((0x40 | ONE_SHOT, 2_000_000, 1_000_000), 0.001),
        ((0x40 | ONE_SHOT, 2_000_000, 0), 0.0),
        ((0x40 | PERIODIC, 2_000_000, 1_000_000, 0x0), 0.002),
        ((0x40 | PERIODIC, 2_000_000, 1_000_000, 0xA), 0.128),
        ((0x40 | DEADLINE, 0, 0, 0xB, 0), None),
        ((0x40 | DEADLINE, 0, 0, 0xB, 3_000_000), 0.002),
        ((0x40 | DEADLINE, 0, 0, 0xB, 1_000_000), 0.0),
    ],
)
def test_timer_is_due(arguments: tuple[int, ...], seconds: float | None) -> None:
    assert timer(*arguments) == (None if seconds is None else pytest.approx(seconds))


def test_timer_that_is_overdue() -> None:
    due = timer(0x40 | DEADLINE, 0, 0, 0xB, 1)
    assert due is not None and due < 0


def test_scheduler_message_names_one_vp() -> None:
    payload = messages.scheduler_pair(0x1122334455, 7)
    assert len(payload) == 240
    assert payload[4] == 1
    assert struct.unpack_from("<Q", payload, 8) == (0x1122334455,)
    assert struct.unpack_from("<I", payload, 160) == (7,)


def test_runs_of_pages() -> None:
    assert deposit_watch._runs([9, 3, 4, 5, 7]) == [(3, 3), (7, 1), (9, 1)]
    assert deposit_watch._runs([]) == []
