# SPDX-License-Identifier: Apache-2.0
"""Logical processors, VPs, and their start as both kernels do it (contract/root-partition section 5)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import msrs, status
from tests.kvm.guest import Guest


@pytest.fixture
def guest(usable_kvm: None) -> Iterator[Guest]:
    """Three VPs, of which only the first is announced."""
    with Guest(vps=3) as made:
        made.enable_hypercalls()
        yield made


def add_lp(guest: Guest, lp: int, apic: int, junk: int = 0) -> int:
    data = hv.ADD_LOGICAL_PROCESSOR_INPUT.pack(lp, apic, junk, junk)
    answer = guest.call(hv.ADD_LOGICAL_PROCESSOR, data, output=64)
    if answer.status == 0:
        assert answer.output == bytes(56) + b"\xee" * 8
    return answer.status


def create_vp(guest: Guest, vp: int, lp: int, partition: int = hv.SELF, junk: int = 0) -> int:
    return guest.call(hv.CREATE_VP, hv.CREATE_VP_INPUT.pack(partition, vp, 0, junk, junk, lp)).status


def run_time(guest: Guest, lp: int) -> tuple[int, tuple[int, ...]]:
    answer = guest.call(hv.GET_LOGICAL_PROCESSOR_RUN_TIME, struct.pack("<I", lp), output=32)
    return answer.status, struct.unpack("<4Q", answer.output)


def test_bring_up_in_the_order_of_kernel_7_3(guest: Guest) -> None:
    assert run_time(guest, 1)[0] == status.INVALID_LP_INDEX
    assert [add_lp(guest, n, n) for n in (1, 2)] == [0, 0]
    assert guest.call(hv.NOTIFY_PARTITION_EVENT, hv.NOTIFY_PARTITION_EVENT_INPUT.pack(4, 0)).status == 0
    assert [create_vp(guest, n, n) for n in (1, 2)] == [0, 0]
    for vp in (1, 2):
        guest.start_vp(vp)
        assert guest.rdmsr(msrs.VP_INDEX, vp) == vp
        assert guest.rdmsr(msrs.VP_ASSIST_PAGE, vp) >> 12
        assert guest.call(hv.GET_PARTITION_ID, vp=vp).status == 0


def test_vp_starts_again_after_off_line(guest: Guest) -> None:
    add_lp(guest, 1, 1)
    create_vp(guest, 1, 1)
    for _ in range(2):
        guest.start_vp(1)
        assert guest.rdmsr(msrs.VP_INDEX, 1) == 1


def test_add_lp_accepts_old_bytes(guest: Guest) -> None:
    assert add_lp(guest, 1, 1, junk=0xDEADBEEF) == 0
    assert create_vp(guest, 1, 1, junk=0xDEADBEEF_DEADBEEF) == 0


@pytest.mark.parametrize("lp", [0, 64, 65, 0xFFFFFFFF])
def test_add_lp_index_known_or_out_of_range(guest: Guest, lp: int) -> None:
    assert add_lp(guest, lp, 1) == status.INVALID_LP_INDEX


def test_add_lp_twice(guest: Guest) -> None:
    assert add_lp(guest, 1, 1) == 0
    assert add_lp(guest, 1, 1) == status.INVALID_LP_INDEX


@pytest.mark.parametrize("apic", [0, 3, 255, 0xFFFFFFFF])
def test_add_lp_apic_unknown_or_taken(guest: Guest, apic: int) -> None:
    assert add_lp(guest, 1, apic) == status.INVALID_PARAMETER


@pytest.mark.parametrize("vp", [0, 3, 0xFFFFFFFF])
def test_create_vp_index_known_or_out_of_range(guest: Guest, vp: int) -> None:
    add_lp(guest, 1, 1)
    assert create_vp(guest, vp, 1) == status.INVALID_VP_INDEX


def test_create_vp_twice(guest: Guest) -> None:
    add_lp(guest, 1, 1)
    assert create_vp(guest, 1, 1) == 0
    assert create_vp(guest, 1, 1) == status.INVALID_VP_INDEX


def test_create_vp_before_its_lp(guest: Guest) -> None:
    assert create_vp(guest, 1, 1) == status.INVALID_LP_INDEX


def test_create_vp_on_the_lp_of_another_processor(guest: Guest) -> None:
    add_lp(guest, 1, 1)
    assert create_vp(guest, 2, 1) == status.INVALID_LP_INDEX


def test_create_vp_in_another_partition(guest: Guest) -> None:
    add_lp(guest, 1, 1)
    assert create_vp(guest, 1, 1, partition=7) == status.INVALID_PARTITION_ID
    assert create_vp(guest, 1, 1, partition=1) == 0


def test_run_time_grows(guest: Guest) -> None:
    state, first = run_time(guest, 0)
    state2, second = run_time(guest, 0)
    assert (state, state2) == (0, 0)
    assert second[0] > first[0]
    assert second[1] >= first[1] > 0
    assert first[2] == 0


def test_run_time_of_an_lp_whose_vp_never_ran(guest: Guest) -> None:
    add_lp(guest, 2, 2)
    assert run_time(guest, 2)[0] == 0


@pytest.mark.parametrize("event", [2, 4])
def test_event_known(guest: Guest, event: int) -> None:
    assert guest.call(hv.NOTIFY_PARTITION_EVENT, struct.pack("<II", event, 0)).status == 0


@pytest.mark.parametrize("event", [0, 1, 3, 5, 0xFFFFFFFF])
def test_event_unknown(guest: Guest, event: int) -> None:
    answer = guest.call(hv.NOTIFY_PARTITION_EVENT, struct.pack("<II", event, 0))
    assert answer.status == status.INVALID_PARAMETER


def test_system_properties(guest: Guest) -> None:
    scheduler = guest.call(hv.GET_SYSTEM_PROPERTY, struct.pack("<IIQ", 15, 0, 0), output=8)
    assert (scheduler.status, scheduler.output) == (0, struct.pack("<Q", 3))
    crash_area = guest.call(hv.GET_SYSTEM_PROPERTY, struct.pack("<IIQ", 47, 0, 0))
    assert crash_area.status == status.UNKNOWN_PROPERTY
    unknown = guest.call(hv.SET_SYSTEM_PROPERTY, hv.SET_SYSTEM_PROPERTY_INPUT.pack(1, 0, bytes(64)))
    assert unknown.status == status.UNKNOWN_PROPERTY


def test_vmm_capabilities(guest: Guest) -> None:
    data = hv.GET_PARTITION_PROPERTY_EX_INPUT.pack(hv.SELF, hv.PARTITION_PROPERTY_VMM_CAPABILITIES, 0)
    answer = guest.call(hv.GET_PARTITION_PROPERTY_EX, data, output=4072)
    assert answer.status == 0
    assert answer.output == struct.pack("<HHIQ", 1, 0, 0, 1 << 4).ljust(4072, b"\0")  # assignable features
    data = hv.GET_PARTITION_PROPERTY_EX_INPUT.pack(hv.SELF, 0x1234, 0)
    assert guest.call(hv.GET_PARTITION_PROPERTY_EX, data).status == status.UNKNOWN_PROPERTY


@pytest.mark.parametrize(("vps", "policy"), [(1, os.SCHED_BATCH), (2, os.SCHED_OTHER)])
def test_only_vp_of_a_root_does_not_preempt_who_wakes_it_up(usable_kvm: None, vps: int, policy: int) -> None:
    with Guest(vps=vps) as made:
        made.rdmsr(msrs.VP_INDEX)
        assert [os.sched_getscheduler(vp.thread_id) for vp in made.partition.vps] == [policy] * vps
