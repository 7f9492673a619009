# SPDX-License-Identifier: Apache-2.0
"""How a partition ends: sleep state, reset, crash report, triple fault."""

from __future__ import annotations

import struct

import pytest

from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import msrs, status
from tests.kvm import guest as g
from tests.kvm.guest import Ended, Guest


def ends(guest: Guest, op: g.Op, vp: int = 0) -> tuple[str, str]:
    with pytest.raises(Ended):
        guest.run([op], vp)
    return guest.wait_ended()


def test_sleep_state_5_does_not_return(guest: Guest) -> None:
    """Kernel 7.3: SET_SYSTEM_PROPERTY announces the types, then ENTER_SLEEP_STATE."""
    value = struct.pack("<IBB", 5, 5, 0).ljust(64, b"\0")
    announced = guest.call(hv.SET_SYSTEM_PROPERTY, hv.SET_SYSTEM_PROPERTY_INPUT.pack(3, 0, value))
    assert announced.status == 0
    assert guest.hypervisor.sleep_state == (5, 5, 0)
    guest.ram[g.INPUT : g.INPUT + 4] = struct.pack("<I", 5)
    how, _ = ends(guest, g.Op(g.HYPERCALL, rcx=hv.ENTER_SLEEP_STATE, rdx=g.INPUT))
    assert how == "poweroff"


@pytest.mark.parametrize("state", [0, 1, 3, 4, 6, 0xFFFFFFFF])
def test_other_sleep_states_are_refused(guest: Guest, state: int) -> None:
    answer = guest.call(hv.ENTER_SLEEP_STATE, struct.pack("<I", state))
    assert answer.status == status.INVALID_PARAMETER
    value = struct.pack("<IBB", state, 5, 0).ljust(64, b"\0")
    announced = guest.call(hv.SET_SYSTEM_PROPERTY, hv.SET_SYSTEM_PROPERTY_INPUT.pack(3, 0, value))
    assert announced.status == status.INVALID_PARAMETER


def test_reset_msr(guest: Guest) -> None:
    assert ends(guest, g.Op(g.WRMSR, rcx=msrs.RESET, rax=1))[0] == "reset"


def test_reset_from_another_vp_stops_all(guest2: Guest) -> None:
    assert ends(guest2, g.Op(g.WRMSR, rcx=msrs.RESET, rax=1), vp=1)[0] == "reset"


def test_crash_with_parameters(guest: Guest) -> None:
    for number, value in enumerate((0xD1E, 2, 3, 4, 5)):
        guest.wrmsr(msrs.CRASH_P0 + number, value)
    how, detail = ends(guest, g.Op(g.WRMSR, rcx=msrs.CRASH_CTL, rax=msrs.CRASH_NOTIFY))
    assert how == "crash"
    assert detail.startswith("P0=0xd1e P1=0x2")


@pytest.mark.parametrize(
    ("gpa", "length", "wanted"),
    [
        (g.SPARE, 12, b"Kernel panic"),
        (g.SPARE, 1 << 60, b"Kernel panic"),
        (g.RAM, 12, b"(the report"),
        ((1 << 64) - 1, (1 << 64) - 1, b"(the report"),
    ],
)
def test_crash_with_a_message(guest: Guest, gpa: int, length: int, wanted: bytes) -> None:
    guest.ram[g.SPARE : g.SPARE + 12] = b"Kernel panic"
    guest.wrmsr(msrs.CRASH_P0 + 3, gpa)
    guest.wrmsr(msrs.CRASH_P0 + 4, length)
    how, _ = ends(guest, g.Op(g.WRMSR, rcx=msrs.CRASH_CTL, rax=msrs.CRASH_NOTIFY | msrs.CRASH_MESSAGE))
    assert how == "crash"
    assert guest.partition.crash_report.startswith(wanted)
    assert len(guest.partition.crash_report) <= 4096


def test_triple_fault(guest: Guest) -> None:
    assert ends(guest, g.Op(g.TRIPLE_FAULT))[0] == "triple-fault"


def test_first_end_counts(guest: Guest) -> None:
    assert ends(guest, g.Op(g.WRMSR, rcx=msrs.RESET, rax=1))[0] == "reset"
    guest.partition.end("poweroff")
    assert guest.partition.ended == "reset"
