# SPDX-License-Identifier: Apache-2.0
"""Synthetic MSRs of a child's guest: SynIC and its pages, APIC registers, what is absent without privilege."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rootvisor.tlfs import messages, msrs, partition_properties, registers
from rootvisor.tlfs import ports as tlfs
from tests.kvm.child import KEEP, PAGES, READY, Child, Driver

FEATURES = (
    partition_properties.SYNTHETIC_HYPERVISOR_PRESENT
    | partition_properties.SYNTHETIC_HV1
    | partition_properties.SYNTHETIC_SYNIC
    | partition_properties.SYNTHETIC_APIC_MSRS
    | partition_properties.SYNTHETIC_HYPERCALL_MSRS
    | partition_properties.SYNTHETIC_VP_INDEX
)
SIMP, SIEFP, SIRBP, ASSIST = (PAGES + 0x10000 + n * 0x1000 for n in range(4))


@pytest.fixture
def child(driver: Driver) -> Iterator[Child]:
    with Child(driver, features=FEATURES) as child:
        yield child


def page(child: Child, gpa: int) -> memoryview:
    view = child.partition.memory.page(gpa >> 12)
    assert view is not None
    return view


def test_synic_begins_as_after_init(child: Child) -> None:
    assert child.rdmsr(msrs.SCONTROL) == 0
    assert child.rdmsr(msrs.SVERSION) == 1
    assert child.rdmsr(msrs.EOM) == 0
    for index in (msrs.SIMP, msrs.SIEFP, msrs.SIRBP, msrs.VP_ASSIST_PAGE):
        assert child.rdmsr(index) == 0
    for sint in range(16):
        assert child.rdmsr(msrs.SINT0 + sint) == msrs.SINT_MASKED


def test_sint_vector_below_16_faults(child: Child) -> None:
    assert not child.wrmsr(msrs.SINT0 + 3, 15)
    assert child.wrmsr(msrs.SINT0 + 3, msrs.SINT_MASKED | 15)
    assert child.wrmsr(msrs.SINT0 + 3, 0x30)
    assert child.rdmsr(msrs.SINT0 + 3) == 0x30


@pytest.mark.parametrize(
    ("index", "gpa"),
    [
        (msrs.SIMP, SIMP),
        (msrs.SIEFP, SIEFP),
        (msrs.SIRBP, SIRBP),
        (msrs.VP_ASSIST_PAGE, ASSIST),
        (msrs.SIMP, 0x8000_0000),  # where the child has no memory
    ],
)
def test_page_lies_where_the_guest_wants_it(child: Child, index: int, gpa: int) -> None:
    """The guest's own stores go to the page, not to the memory below."""
    beneath = gpa < 1 << 20
    if beneath:
        child.memory[gpa : gpa + 4] = b"mine"
    assert child.wrmsr(index, gpa | 0xFF1)
    assert child.rdmsr(index) == gpa | 0xFF1
    assert bytes(page(child, gpa)) == bytes(4096)
    child.start(child.store_loop, rbx=gpa, rax=0x12345678, rcx=1, rdx=0)
    child.intercept()
    assert bytes(page(child, gpa)[:4]) == bytes.fromhex("78563412")
    assert child.wrmsr(index, gpa)
    if beneath:
        assert bytes(child.memory[gpa : gpa + 4]) == bytes(page(child, gpa)[:4]) == b"mine"
    else:
        assert child.partition.memory.page(gpa >> 12) is None
    assert child.wrmsr(index, gpa | 1)
    kept = bytes(4) if index == msrs.VP_ASSIST_PAGE else bytes.fromhex("78563412")
    assert bytes(page(child, gpa)[:4]) == kept, "of the VP assist page the EOI word begins anew"


def test_page_beyond_the_address_space_is_nowhere(child: Child) -> None:
    assert child.wrmsr(msrs.SIMP, 1 << 51 | 1)
    assert child.rdmsr(msrs.SIMP) == 1 << 51 | 1
    assert child.wrmsr(msrs.SIMP, SIMP | 1)
    assert bytes(page(child, SIMP)) == bytes(4096)


def test_page_over_the_local_apic_leaves_it_alone(child: Child) -> None:
    assert child.wrmsr(msrs.SIMP, 0xFEE00001)
    assert child.rdmsr(msrs.SIMP) == 0xFEE00001
    assert child.wrmsr(msrs.SIMP, SIMP | 1)


def test_two_pages_at_one_place_uncover_each_other(child: Child) -> None:
    child.memory[SIMP : SIMP + 4] = b"mine"
    for index in (msrs.SIMP, msrs.SIEFP, msrs.VP_ASSIST_PAGE):
        assert child.wrmsr(index, SIMP | 1)
    for index in (msrs.SIEFP, msrs.SIMP, msrs.VP_ASSIST_PAGE):
        assert child.wrmsr(index, 0)
    assert bytes(page(child, SIMP)[:4]) == b"mine"


def test_message_and_eom_by_the_guest(driver: Driver, child: Child) -> None:
    """A queue of a message port of the child, emptied by the guest's EOM."""
    info = tlfs.MESSAGE_PORT.pack(2, 0, 0)
    ports = child.guest.hypervisor.ports
    with child.guest.hypervisor.lock:
        ports.create(child.partition, 5, child.guest.partition, tlfs.PORT_MESSAGE, info)
        ports.connect(child.guest.partition, 1, child.partition, 5, tlfs.PORT_MESSAGE, 0, 0, 0)
    for index, value in ((msrs.SIMP, SIMP | 1), (msrs.SINT0 + 2, 0x60), (msrs.SCONTROL, 1)):
        assert child.wrmsr(index, value)
    for number in range(1, 4):
        data = (1).to_bytes(8, "little") + number.to_bytes(4, "little") + (0).to_bytes(4, "little")
        assert driver.status(0x5C, data + bytes(240)) == 0
    slot = page(child, SIMP)[512:768]
    seen = []
    for _ in range(3):
        seen.append((slot[0], slot[messages.MESSAGE_FLAGS_OFFSET]))
        slot[:4] = bytes(4)
        assert child.wrmsr(msrs.EOM, 0)
    assert seen == [(1, 1), (2, 1), (3, 0)]
    assert slot[0] == 0
    child.start(child.xapic_entry)  # the APIC was off: the interrupts were lost, the messages were not
    driver.wait_for(lambda: child.word(READY))


@pytest.mark.parametrize("entry", ["entry", "xapic_entry"])
def test_eoi_by_the_synthetic_msr(driver: Driver, child: Child, entry: str) -> None:
    child.memory[KEEP + 0x50] = 2
    child.start(getattr(child, entry))
    driver.wait_for(lambda: child.word(READY))
    for number in range(1, 4):
        assert driver.interrupt(child, 0x50) == 0
        driver.wait_for(lambda: child.count(0x50) == number)  # noqa: B023


@pytest.mark.parametrize("x2apic", [True, False])
def test_icr_and_tpr_by_synthetic_msrs(driver: Driver, child: Child, x2apic: bool) -> None:
    child.start(child.entry if x2apic else child.xapic_entry)
    driver.wait_for(lambda: child.word(READY))
    child.suspend()
    assert child.wrmsr(msrs.ICR, 0x55)  # to APIC 0
    assert child.rdmsr(msrs.ICR) == 0x55
    child.start(child.entry if x2apic else child.xapic_entry)
    driver.wait_for(lambda: child.count(0x55) == 1)
    child.suspend()
    assert child.wrmsr(msrs.TPR, 0x20)
    assert child.rdmsr(msrs.TPR) == 0x20
    assert child.get(registers.CR8) == 2
    assert not child.wrmsr(msrs.TPR, 0x100)
    assert not child.wrmsr(msrs.EOI, 1 << 32)
    assert child.rdmsr(msrs.EOI) is None


def test_msrs_without_privilege_fault(driver: Driver) -> None:
    with Child(driver, features=FEATURES & ~partition_properties.SYNTHETIC_SYNIC) as child:
        for index in (msrs.SCONTROL, msrs.SIMP, msrs.SINT0, msrs.EOM, msrs.RESET, msrs.SIRBP):
            assert child.rdmsr(index) is None, hex(index)
        assert child.rdmsr(msrs.VP_INDEX) == 0
        assert not child.wrmsr(msrs.VP_INDEX, 0)


def test_vps_have_their_own_pages(driver: Driver) -> None:
    with Child(driver, vps=2, features=FEATURES) as child:
        for vp in (0, 1):
            child.set({registers.SIMP: SIMP + vp * 0x1000 | 1, registers.SCONTROL: 1}, vp)
            message = messages.MESSAGE_HEADER.pack(vp + 1, 0, 0, 0) + bytes(240)
            data = tlfs.POST_MESSAGE_DIRECT_INPUT.pack(child.id, vp, 0, 4, message)
            assert driver.status(0xC1, data) == 0
        assert [page(child, SIMP + vp * 0x1000)[1024] for vp in (0, 1)] == [1, 2]


def test_many_vps_made_and_deleted_use_no_more_pages(driver: Driver, child: Child) -> None:
    before = child.partition.overlay_pages.allocated
    for _ in range(3):
        child._create_vp(1)
        data = (child.id).to_bytes(8, "little") + (1).to_bytes(8, "little")
        assert driver.guest.fast(0x4F, data).status == 0
    assert child.partition.overlay_pages.allocated == before
