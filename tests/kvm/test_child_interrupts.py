# SPDX-License-Identifier: Apache-2.0
"""Interrupts that the root asserts in a child: delivery modes, destinations, levels, ExtINT, LINT pins, SynIC."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from rootvisor.tlfs import hypercalls, intercepts, messages, msrs, partition_properties, registers, status
from rootvisor.tlfs import ports as tlfs
from tests.kvm.child import KEEP, OPERANDS, PAGES, READY, Child, Driver

LVT_LINT0 = 21  # index in the VP state's 44 words
SYNIC = (
    partition_properties.SYNTHETIC_HYPERVISOR_PRESENT
    | 2
    | partition_properties.SYNTHETIC_SYNIC
    | partition_properties.SYNTHETIC_HYPERCALL_MSRS
)


@pytest.fixture
def child(driver: Driver) -> Iterator[Child]:
    with Child(driver) as child:
        yield child


@pytest.fixture
def two(driver: Driver) -> Iterator[Child]:
    with Child(driver, vps=2) as child:
        yield child


def test_fixed_interrupt_wakes_a_halted_vp(driver: Driver, child: Child) -> None:
    child.ready()
    for number in range(1, 6):
        assert driver.interrupt(child, 0x40) == 0
        driver.wait_for(lambda: child.count(0x40) == number)  # noqa: B023
    assert child.vp().interrupts == 5


def test_interrupt_before_the_vp_runs_waits_in_its_apic(driver: Driver, child: Child) -> None:
    assert driver.interrupt(child, 0x41) == 0
    child.start(child.xapic_entry)
    driver.wait_for(lambda: child.word(READY))
    assert driver.interrupt(child, 0x42) == 0
    driver.wait_for(lambda: child.count(0x42) == 1)


def test_destinations_physical_logical_and_broadcast(driver: Driver, two: Child) -> None:
    for vp in (0, 1):
        two.ready(vp)
    cases = [
        (0x50, 0, 0, (1, 0)),
        (0x51, 1, 0, (0, 1)),
        (0x52, 0xFF, 0, (1, 1)),
        (0x53, 1, tlfs.INTERRUPT_LOGICAL, (1, 0)),  # x2APIC cluster 0: bit per VP
        (0x54, 2, tlfs.INTERRUPT_LOGICAL, (0, 1)),
        (0x55, 3, tlfs.INTERRUPT_LOGICAL, (1, 1)),
        (0x56, 0, 1 << 30, (1, 0)),  # what rust-vmm sets besides
    ]
    for vector, destination, control, taken in cases:
        assert driver.interrupt(two, vector, destination=destination, control=control) == 0
        driver.wait_for(lambda: two.count(vector) == sum(taken), f"for {vector:#x}")  # noqa: B023
    assert two.vp(1).interrupts == 1


def test_lowest_priority_is_taken_once(driver: Driver, two: Child) -> None:
    for vp in (0, 1):
        two.ready(vp)
    for number in range(1, 5):
        assert driver.interrupt(two, 0x60, tlfs.INTERRUPT_LOWEST_PRIORITY, 3, tlfs.INTERRUPT_LOGICAL) == 0
        driver.wait_for(lambda: two.count(0x60) >= number)  # noqa: B023
    assert two.count(0x60) == 4


def test_destination_without_vp_is_lost_without_a_status(driver: Driver, child: Child) -> None:
    child.ready()
    for destination in (1, 200, 0x1000, 0xFFFF_FFFE, 1 << 40):
        assert driver.interrupt(child, 0x40, destination=destination) == 0
    assert driver.interrupt(child, 0x44) == 0
    driver.wait_for(lambda: child.count(0x44))
    assert child.count(0x40) == 0


def test_nmi(driver: Driver, child: Child) -> None:
    child.memory[KEEP + 2] = 1
    child.ready()
    assert driver.interrupt(child, 0, tlfs.INTERRUPT_NMI) == 0
    driver.wait_for(lambda: child.count(2) == 1)


def test_init_and_sipi_start_a_vp(driver: Driver, two: Child) -> None:
    two.set({registers.INTERNAL_ACTIVITY_STATE: registers.ACTIVITY_STARTUP_SUSPEND}, 1)
    two.resume(1)
    two.memory[0x70000:0x70004] = b"\xe6\x80\xeb\xfc"  # out 0x80, al; jmp back
    assert driver.interrupt(two, 0, tlfs.INTERRUPT_INIT, 1) == 0
    assert driver.interrupt(two, 0x70, tlfs.INTERRUPT_SIPI, 1) == 0
    kind, payload = two.intercept(1)
    assert kind == intercepts.X64_IO_PORT_INTERCEPT
    assert struct.unpack_from("<H", payload, 20)[0] == 0x7000  # CS


@pytest.mark.parametrize(
    ("kind", "vector"),
    [
        (tlfs.INTERRUPT_FIXED, 0),
        (tlfs.INTERRUPT_FIXED, 15),
        (tlfs.INTERRUPT_FIXED, 256),
        (tlfs.INTERRUPT_LOWEST_PRIORITY, 3),
        (tlfs.INTERRUPT_SMI, 0x40),
        (tlfs.INTERRUPT_REMOTE_READ, 0x40),
        (10, 0x40),
        (0xFFFFFFFF, 0x40),
    ],
)
def test_asserting_what_does_not_exist(driver: Driver, child: Child, kind: int, vector: int) -> None:
    assert driver.interrupt(child, vector, kind) == status.INVALID_PARAMETER


def test_asserting_elsewhere(driver: Driver, child: Child) -> None:
    for partition, expected in ((1, status.INVALID_PARTITION_ID), (99, status.INVALID_PARTITION_ID)):
        data = tlfs.ASSERT_VIRTUAL_INTERRUPT_INPUT.pack(partition, 0, 0, 0, 0x40, 0)
        assert driver.status(hypercalls.ASSERT_VIRTUAL_INTERRUPT, data) == expected
    data = tlfs.ASSERT_VIRTUAL_INTERRUPT_INPUT.pack(child.id, 0, 0, 0, 0x40, 1)
    assert driver.status(hypercalls.ASSERT_VIRTUAL_INTERRUPT, data) == status.INVALID_PARAMETER


# --- level-triggered --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("entry", ["entry", "xapic_entry"])
def test_eoi_of_a_level_interrupt_is_told(driver: Driver, child: Child, entry: str) -> None:
    child.start(getattr(child, entry))
    driver.wait_for(lambda: child.word(READY))
    for number in (1, 2):
        for vector in (0x71, 0x72):
            assert driver.interrupt(child, vector, control=tlfs.INTERRUPT_LEVEL) == 0
            kind, payload = child.intercept()
            assert (kind, payload) == (intercepts.X64_APIC_EOI, struct.pack("<II", 0, vector))
            assert child.count(vector) == number
            child.resume()


def test_eoi_comes_from_the_vp_that_took_it(driver: Driver, two: Child) -> None:
    for vp in (0, 1):
        two.ready(vp)
    for vp in (1, 0, 1):
        assert driver.interrupt(two, 0x73, destination=vp, control=tlfs.INTERRUPT_LEVEL) == 0
        kind, payload = two.intercept(vp)
        assert (kind, payload) == (intercepts.X64_APIC_EOI, struct.pack("<II", vp, 0x73))
        two.resume(vp)


def test_eoi_of_an_edge_interrupt_is_not_told(driver: Driver, child: Child) -> None:
    child.ready()
    assert driver.interrupt(child, 0x74, control=tlfs.INTERRUPT_LEVEL) == 0
    child.intercept()
    child.resume()
    for number in (2, 3):
        assert driver.interrupt(child, 0x74) == 0  # the same vector, now edge
        assert driver.interrupt(child, 0x75) == 0
        driver.wait_for(lambda: child.count(0x74) == number)  # noqa: B023
        driver.wait_for(lambda: child.count(0x75) == number - 1)  # noqa: B023
    assert not any(driver.slot()[:4])


# --- ExtINT and the pins ----------------------------------------------------------------------------------------------
def lint(child: Child, pin: int, entry: int) -> None:
    """LVT_LINT0 or 1 := ``entry``, as VMMs do before the first run."""
    with child.guest.hypervisor.lock:
        vcpu = child.vp().vcpu
        page = vcpu.lapic()
        at = (0x350, 0x360)[pin]
        page[at : at + 4] = entry.to_bytes(4, "little")
        page[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")
        vcpu.set_lapic(page)


def test_extint_is_taken_when_interrupts_open(driver: Driver, child: Child) -> None:
    lint(child, 0, 0x700)
    child.memory[KEEP + 0x28] = 1
    assert driver.interrupt(child, 0x28, tlfs.INTERRUPT_EXTINT) == 0
    child.start(child.xapic_entry)
    driver.wait_for(lambda: child.count(0x28) == 1)
    for number in (2, 3):
        assert driver.interrupt(child, 0x28, tlfs.INTERRUPT_EXTINT) == 0
        driver.wait_for(lambda: child.count(0x28) == number)  # noqa: B023


def test_extint_vector_0_succeeds(driver: Driver, child: Child) -> None:
    assert driver.interrupt(child, 0, tlfs.INTERRUPT_EXTINT) == 0


def test_cleared_extint_is_not_taken(driver: Driver, child: Child) -> None:
    lint(child, 0, 0x700)
    assert driver.interrupt(child, 0x28, tlfs.INTERRUPT_EXTINT) == 0
    result = driver.guest.fast(hypercalls.CLEAR_VIRTUAL_INTERRUPT, struct.pack("<Q", child.id))
    assert (result.op.fault, result.status) == (0, 0)
    child.start(child.xapic_entry)
    driver.wait_for(lambda: child.word(READY))
    assert driver.interrupt(child, 0x45) == 0
    driver.wait_for(lambda: child.count(0x45))
    assert child.count(0x28) == 0


def test_extint_to_a_masked_lint0_waits(driver: Driver, child: Child) -> None:
    lint(child, 0, 0x10000)
    assert driver.interrupt(child, 0x28, tlfs.INTERRUPT_EXTINT) == 0
    child.start(child.xapic_entry)
    driver.wait_for(lambda: child.word(READY))
    assert driver.interrupt(child, 0x45) == 0
    driver.wait_for(lambda: child.count(0x45))
    assert child.count(0x28) == 0
    child.suspend()
    lint(child, 0, 0x700)
    child.memory[KEEP + 0x28] = 1
    child.resume()
    assert driver.interrupt(child, 0x45) == 0
    driver.wait_for(lambda: child.count(0x28) == 1)


@pytest.mark.parametrize(
    ("pin", "entry", "vector"),
    [(0, 0x4A, 0x4A), (1, 0x4B, 0x4B), (1, 0x400, 2), (0, 0x700, 0x29)],
)
def test_lint_pin_does_what_its_table_entry_says(
    driver: Driver, child: Child, pin: int, entry: int, vector: int
) -> None:
    lint(child, pin, entry)
    child.memory[KEEP + 2] = child.memory[KEEP + 0x29] = 1
    child.start(child.xapic_entry)
    driver.wait_for(lambda: child.word(READY))
    assert driver.interrupt(child, 0x29, tlfs.INTERRUPT_LINT0 + pin) == 0
    driver.wait_for(lambda: child.count(vector) == 1)


def test_masked_lint_pin_is_dropped(driver: Driver, child: Child) -> None:
    lint(child, 1, 0x1004C)
    child.start(child.xapic_entry)
    driver.wait_for(lambda: child.word(READY))
    assert driver.interrupt(child, 0x4C, tlfs.INTERRUPT_LINT1) == 0
    assert driver.interrupt(child, 0x45) == 0
    driver.wait_for(lambda: child.count(0x45))
    assert child.count(0x4C) == 0


# --- the child's SynIC ------------------------------------------------------------------------------------------------
SIMP, SIEFP = PAGES + 0x10000, PAGES + 0x11000


def synic_on(child: Child, vp: int = 0, sint: int = 2, vector: int = 0x60) -> None:
    child.set(
        {
            registers.SIMP: SIMP | 1,
            registers.SIEFP: SIEFP | 1,
            registers.SINT0 + sint: vector,
            registers.SCONTROL: 1,
        },
        vp,
    )


def overlay(child: Child, gpa: int) -> memoryview:
    page = child.partition.memory.page(gpa >> 12)
    assert page is not None
    return page


def post_direct(driver: Driver, child: Child, sint: int = 2, kind: int = 1, size: int = 4) -> int:
    message = messages.MESSAGE_HEADER.pack(kind, size, 0, 0x99) + b"ding" + bytes(236)
    data = tlfs.POST_MESSAGE_DIRECT_INPUT.pack(child.id, 0, 0, sint, message)
    return driver.status(hypercalls.POST_MESSAGE_DIRECT, data)


def signal_direct(driver: Driver, child: Child, sint: int = 2, flag: int = 0, vp: int = 0) -> tuple[int, int]:
    data = tlfs.SIGNAL_EVENT_DIRECT_INPUT.pack(child.id, vp, 0, sint, flag)
    result = driver.guest.call(hypercalls.SIGNAL_EVENT_DIRECT, data, output=8)
    return result.status, result.output[0]


def test_direct_message_is_seen_by_the_guest(driver: Driver, child: Child) -> None:
    child.ready()
    child.suspend()
    synic_on(child)
    child.resume()
    assert post_direct(driver, child) == 0
    driver.wait_for(lambda: child.count(0x60) == 1)
    assert bytes(overlay(child, SIMP)[512:532]) == messages.MESSAGE_HEADER.pack(1, 4, 0, 0x99) + b"ding"
    assert post_direct(driver, child) == status.OBJECT_IN_USE
    assert overlay(child, SIMP)[512 + 5] == messages.MESSAGE_FLAG_PENDING


def test_direct_message_is_refused(driver: Driver, child: Child) -> None:
    assert post_direct(driver, child) == status.INVALID_SYNIC_STATE
    synic_on(child)
    assert post_direct(driver, child, sint=16) == status.INVALID_PARAMETER
    assert post_direct(driver, child, kind=0) == status.INVALID_PARAMETER
    assert post_direct(driver, child, size=241) == status.INVALID_PARAMETER
    data = tlfs.POST_MESSAGE_DIRECT_INPUT.pack(child.id, 3, 0, 2, bytes(256))
    assert driver.status(hypercalls.POST_MESSAGE_DIRECT, data) == status.INVALID_VP_INDEX


def test_direct_message_to_a_masked_sint_is_silent(driver: Driver, child: Child) -> None:
    synic_on(child)
    child.set({registers.SINT0 + 2: 0x60 | msrs.SINT_MASKED})
    assert post_direct(driver, child) == 0
    assert overlay(child, SIMP)[512] == 1
    assert child.vp().interrupts == 0


def test_direct_event_tells_whether_the_flag_was_clear(driver: Driver, child: Child) -> None:
    child.ready()
    child.suspend()
    synic_on(child)
    child.resume()
    assert signal_direct(driver, child, flag=2047) == (0, 1)
    driver.wait_for(lambda: child.count(0x60) == 1)
    assert signal_direct(driver, child, flag=2047) == (0, 0)
    assert signal_direct(driver, child, flag=0) == (0, 1)
    driver.wait_for(lambda: child.count(0x60) == 2)
    assert bytes(overlay(child, SIEFP)[512:768]) == b"\x01" + bytes(254) + b"\x80"
    result = driver.guest.fast(
        hypercalls.SIGNAL_EVENT_DIRECT, tlfs.SIGNAL_EVENT_DIRECT_INPUT.pack(child.id, 0, 0, 2, 5)
    )
    assert (result.op.fault, result.status, result.output[16]) == (0, 0, 1)


def test_direct_event_is_refused(driver: Driver, child: Child) -> None:
    assert signal_direct(driver, child)[0] == status.INVALID_SYNIC_STATE
    synic_on(child)
    assert signal_direct(driver, child, sint=16)[0] == status.INVALID_PARAMETER
    assert signal_direct(driver, child, flag=2048)[0] == status.INVALID_PARAMETER
    assert signal_direct(driver, child, vp=1)[0] == status.INVALID_VP_INDEX


def test_sint_deliverable_is_told_when_the_slot_is_free(driver: Driver, child: Child) -> None:
    child.ready()
    child.suspend()
    synic_on(child)
    child.resume()
    assert post_direct(driver, child) == 0
    assert post_direct(driver, child) == status.OBJECT_IN_USE
    child.suspend()
    child.set({registers.DELIVERABILITY_NOTIFICATIONS: 1 << (48 + 2)})
    assert child.get(registers.DELIVERABILITY_NOTIFICATIONS) == 1 << 50
    child.resume()
    assert driver.interrupt(child, 0x45) == 0
    driver.wait_for(lambda: child.count(0x45))
    assert not any(driver.slot()[:4])
    overlay(child, SIMP)[512:516] = bytes(4)
    assert driver.interrupt(child, 0x45) == 0  # the next exit or entry notices
    child.set({registers.EOM: 0})
    child.vp().vcpu.kick()
    kind, payload = child.intercept()
    assert kind == intercepts.SYNIC_SINT_DELIVERABLE
    assert (len(payload), struct.unpack_from("<H", payload, 40)[0]) == (48, 1 << 2)
    assert child.get(registers.DELIVERABILITY_NOTIFICATIONS) == 0
    child.resume()
    assert post_direct(driver, child) == 0
    driver.wait_for(lambda: child.count(0x60) == 2)


def test_synic_pages_hide_and_uncover_memory(driver: Driver, child: Child) -> None:
    child.memory[SIMP : SIMP + 8] = b"beneath!"
    synic_on(child)
    assert bytes(overlay(child, SIMP)[:8]) == bytes(8)
    assert post_direct(driver, child) == 0
    moved = OPERANDS + 0x20000
    child.set({registers.SIMP: moved | 1})
    assert bytes(overlay(child, SIMP)[:8]) == b"beneath!"
    assert overlay(child, moved)[512] == 1
    child.set({registers.SIMP: moved})
    assert overlay(child, moved)[512] == 0
    child.set({registers.SIMP: SIMP | 1})
    assert overlay(child, SIMP)[512] == 1
