# SPDX-License-Identifier: Apache-2.0
"""Synthetic MSRs: values, what faults, and what comes back (contract/root-partition section 2)."""

from __future__ import annotations

import pytest

from rootvisor.hypervisor.hypercall_abi import PAGE_CODE
from rootvisor.hypervisor.root_partition import ROOT_FEATURES, ROOT_PRIVILEGES
from rootvisor.tlfs import cpuid, msrs, privileges, status
from rootvisor.tlfs import hypercalls as hv
from tests.kvm import guest as g
from tests.kvm.guest import Guest

PAGE_MSRS = [msrs.HYPERCALL, msrs.REFERENCE_TSC, msrs.VP_ASSIST_PAGE, msrs.SIMP, msrs.SIEFP, msrs.SIRBP]
READ_ONLY = [msrs.VP_INDEX, msrs.TIME_REF_COUNT, msrs.TSC_FREQUENCY, msrs.APIC_FREQUENCY, msrs.SVERSION]
ABSENT = [
    msrs.VP_RUNTIME, 0x40000004, 0x4000000F, 0x40000040, 0x40000074, 0x40000086, 0x400000A0, msrs.STIMER0_CONFIG,
    0x400000B1, 0x400000E0, msrs.GUEST_IDLE, 0x400000F1, 0x40000106, 0x40000107, 0x40000108, 0x40000114, 0x40000200,
    0x40001002, 0x40001080, 0x40001090, 0x40001FFF,
]  # fmt: skip


@pytest.mark.parametrize("index", ABSENT)
def test_absent_msr_faults(guest: Guest, index: int) -> None:
    assert guest.rdmsr_fault(index) == g.GP
    assert guest.wrmsr_fault(index, 0) == g.GP


@pytest.mark.parametrize("index", READ_ONLY)
def test_read_only_msr_faults_on_writes(guest: Guest, index: int) -> None:
    guest.rdmsr(index)
    assert guest.wrmsr_fault(index, 0) == g.GP


def test_eoi_is_write_only(guest: Guest) -> None:
    assert guest.rdmsr_fault(msrs.EOI) == g.GP
    assert guest.wrmsr_fault(msrs.EOI, 0) == 0
    assert guest.wrmsr_fault(msrs.EOI, 1 << 32) == g.GP


def test_eois_are_left_out_where_the_assist_page_says_so(guest: Guest) -> None:
    """Each saves an exit. Twenty interrupts of one vector: none would come while the one before has not ended."""
    if not guest.partition.recommendations & cpuid.RECOMMEND_APIC_MSRS:
        pytest.skip("this processor ends interrupts without an exit, or its KVM is older than Linux 6.0")
    word = guest.rdmsr(msrs.VP_ASSIST_PAGE) & ~0xFFF
    guest.wrmsr(msrs.VP_ASSIST_PAGE, word | 1)
    guest.eois_may_be_left_out(word)
    for turn in range(1, 21):
        assert guest.call(hv.SEND_IPI, hv.SEND_IPI_INPUT.pack(0x55, 0, bytes(3), 1)).status == 0
        assert guest.take(0x55, count=turn) == turn
    left_out = guest.eois_left_out()
    assert left_out > 10
    guest.wrmsr(msrs.VP_ASSIST_PAGE, word)
    assert guest.call(hv.SEND_IPI, hv.SEND_IPI_INPUT.pack(0x55, 0, bytes(3), 1)).status == 0
    assert guest.take(0x55, count=21) == 21
    assert guest.eois_left_out() == left_out, "the page is off"


def test_eoi_word_stays_clear_without_an_interrupt(guest: Guest) -> None:
    page = guest.rdmsr(msrs.VP_ASSIST_PAGE) & ~0xFFF
    guest.ram[page : page + 8] = b"\xff" * 8
    guest.wrmsr(msrs.VP_ASSIST_PAGE, page | 1)
    assert bytes(guest.ram[page : page + 8]) == bytes(4) + b"\xff" * 4


@pytest.mark.parametrize(
    ("privilege", "index"),
    [
        (privileges.ACCESS_PARTITION_REFERENCE_COUNTER, msrs.TIME_REF_COUNT),
        (privileges.ACCESS_SYNIC_REGS, msrs.SCONTROL),
        (privileges.ACCESS_SYNIC_REGS, msrs.SINT0),
        (privileges.ACCESS_INTR_CTRL_REGS, msrs.VP_ASSIST_PAGE),
        (privileges.ACCESS_INTR_CTRL_REGS, msrs.TPR),
        (privileges.ACCESS_HYPERCALL_MSRS, msrs.HYPERCALL),
        (privileges.ACCESS_HYPERCALL_MSRS, msrs.GUEST_OS_ID),
        (privileges.ACCESS_VP_INDEX, msrs.VP_INDEX),
        (privileges.ACCESS_RESET_REG, msrs.RESET),
        (privileges.ACCESS_PARTITION_REFERENCE_TSC, msrs.REFERENCE_TSC),
        (privileges.ACCESS_FREQUENCY_REGS, msrs.TSC_FREQUENCY),
        (privileges.ACCESS_FREQUENCY_REGS, msrs.APIC_FREQUENCY),
        (privileges.ACCESS_TSC_INVARIANT_CONTROLS, msrs.TSC_INVARIANT_CONTROL),
    ],
)
def test_msr_without_its_privilege_faults(usable_kvm: None, privilege: int, index: int) -> None:
    with Guest(privileges=ROOT_PRIVILEGES & ~privilege) as guest:
        assert guest.rdmsr_fault(index) == g.GP


@pytest.mark.parametrize(
    ("feature", "index"),
    [
        (privileges.FEATURE_FREQUENCY_MSRS, msrs.TSC_FREQUENCY),
        (privileges.FEATURE_CRASH_MSRS, msrs.CRASH_CTL),
    ],
)
def test_msr_without_its_feature_faults(usable_kvm: None, feature: int, index: int) -> None:
    with Guest(features=ROOT_FEATURES & ~feature) as guest:
        assert guest.rdmsr_fault(index) == g.GP


def test_vp_index_on_each_vp(guest2: Guest) -> None:
    assert [guest2.rdmsr(msrs.VP_INDEX, vp=vp) for vp in (0, 1)] == [0, 1]


def test_frequencies(guest: Guest) -> None:
    assert guest.rdmsr(msrs.APIC_FREQUENCY) == 1_000_000_000
    assert guest.rdmsr(msrs.TSC_FREQUENCY) == guest.partition.vps[0].vcpu.tsc_khz() * 1000


def test_guest_os_id_reads_back(guest: Guest) -> None:
    guest.wrmsr(msrs.GUEST_OS_ID, 0x8100_1234_5678_9ABC)
    assert guest.rdmsr(msrs.GUEST_OS_ID) == 0x8100_1234_5678_9ABC


def test_hypercall_enable_needs_an_os_identity(usable_kvm: None) -> None:
    with Guest() as guest:
        value = guest.rdmsr(msrs.HYPERCALL)
        assert value & 1 == 0
        assert value >> 12, "the hypervisor supplies the page"
        guest.wrmsr(msrs.HYPERCALL, value | 1)
        assert guest.rdmsr(msrs.HYPERCALL) == value
        guest.wrmsr(msrs.GUEST_OS_ID, 0x8100 << 48)
        guest.wrmsr(msrs.HYPERCALL, value | 1)
        assert guest.rdmsr(msrs.HYPERCALL) == value | 1


def test_guest_os_id_zero_clears_hypercall_enable(guest: Guest) -> None:
    assert guest.rdmsr(msrs.HYPERCALL) & 1
    guest.wrmsr(msrs.GUEST_OS_ID, 0)
    assert guest.rdmsr(msrs.HYPERCALL) & 1 == 0


def test_hypercall_page_can_be_copied(guest: Guest) -> None:
    """The kernel copies the page once at boot and calls the copy."""
    page = guest.rdmsr(msrs.HYPERCALL) & ~0xFFF
    assert bytes(guest.ram[page : page + 4]) == b"\xf3\x0f\x1e\xfa", "ENDBR64, or 6.12 gives IBT up"
    guest.ram[g.SPARE : g.SPARE + 4096] = guest.ram[page : page + 4096]
    op = guest.one(g.HYPERCALL, rcx=hv.GET_PARTITION_ID, r8=g.OUTPUT, target=g.SPARE)
    assert (op.fault, op.rax) == (0, 0)


def test_hypercall_page_moves_to_a_guests_own_address(guest: Guest) -> None:
    """A kernel that takes itself for a guest supplies the address, and executes whatever lies there."""
    guest.ram[g.SPARE : g.SPARE + 4096] = b"\x5a" * 4096
    home = guest.rdmsr(msrs.HYPERCALL)
    guest.wrmsr(msrs.HYPERCALL, g.SPARE | 1)
    assert bytes(guest.ram[g.SPARE : g.SPARE + len(PAGE_CODE)]) == PAGE_CODE
    assert guest.one(g.HYPERCALL, rcx=0xBEEF, target=g.SPARE).rax == status.INVALID_HYPERCALL_CODE
    guest.wrmsr(msrs.HYPERCALL, home)
    assert bytes(guest.ram[g.SPARE : g.SPARE + 4096]) == b"\x5a" * 4096, "what lay below is back"
    assert guest.call(hv.GET_PARTITION_ID).status == 0


@pytest.mark.parametrize("page", [g.RAM, 1 << 40, (1 << 64) - 4096])
def test_hypercall_page_outside_memory_faults(guest: Guest, page: int) -> None:
    before = guest.rdmsr(msrs.HYPERCALL)
    assert guest.wrmsr_fault(msrs.HYPERCALL, page | 1) == g.GP
    assert guest.rdmsr(msrs.HYPERCALL) == before
    assert guest.call(hv.GET_PARTITION_ID).status == 0


def test_hypercall_msr_locked_faults(guest: Guest) -> None:
    value = guest.rdmsr(msrs.HYPERCALL)
    guest.wrmsr(msrs.HYPERCALL, value | 3)
    assert guest.wrmsr_fault(msrs.HYPERCALL, value) == g.GP
    assert guest.rdmsr(msrs.HYPERCALL) == value | 3


@pytest.mark.parametrize("index", PAGE_MSRS)
def test_page_msr_keeps_its_page_and_reserved_bits(guest: Guest, index: int) -> None:
    """Linux disables on off-line, and reads the page number again on on-line."""
    value = guest.rdmsr(index) & ~1
    assert value >> 12, "the root's pages are supplied"
    guest.wrmsr(index, value | 0xAA4 | 1)
    assert guest.rdmsr(index) == value | 0xAA4 | 1
    guest.wrmsr(index, value)
    assert guest.rdmsr(index) == value


@pytest.mark.parametrize("index", PAGE_MSRS[1:])
@pytest.mark.parametrize("page", [g.RAM, 0xFEE00000, 1 << 45, (1 << 64) - 4096])
def test_page_msr_outside_memory_is_accepted(guest: Guest, index: int, page: int) -> None:
    home = guest.rdmsr(index)
    guest.wrmsr(index, page | 1)
    assert guest.rdmsr(index) == page | 1
    guest.wrmsr(index, home | 1)
    assert guest.rdmsr(index) == home | 1


def test_page_msrs_of_all_vps_are_distinct(guest2: Guest) -> None:
    pages = [guest2.rdmsr(index, vp=vp) >> 12 for index in PAGE_MSRS[2:] for vp in (0, 1)]
    pages += [guest2.rdmsr(msrs.HYPERCALL) >> 12, guest2.rdmsr(msrs.REFERENCE_TSC) >> 12]
    assert len(set(pages)) == 10
    assert all(guest2.partition.owned_pages.contains(page) for page in pages)


def test_hypercall_and_tsc_msr_are_one_for_all_vps(guest2: Guest) -> None:
    for index in (msrs.HYPERCALL, msrs.REFERENCE_TSC, msrs.GUEST_OS_ID):
        assert guest2.rdmsr(index) == guest2.rdmsr(index, vp=1)


def test_synic_registers_at_reset(guest: Guest) -> None:
    assert guest.rdmsr(msrs.SCONTROL) == 0
    assert guest.rdmsr(msrs.SVERSION) == 1
    assert guest.rdmsr(msrs.EOM) == 0
    assert [guest.rdmsr(msrs.SINT0 + n) for n in range(16)] == [msrs.SINT_MASKED] * 16


@pytest.mark.parametrize("vector", range(16))
def test_sint_unmasked_vector_below_16_faults(guest: Guest, vector: int) -> None:
    assert guest.wrmsr_fault(msrs.SINT0 + 3, vector) == g.GP
    assert guest.rdmsr(msrs.SINT0 + 3) == msrs.SINT_MASKED
    assert guest.wrmsr_fault(msrs.SINT0 + 3, msrs.SINT_MASKED | vector) == 0


def test_sints_are_per_vp(guest2: Guest) -> None:
    guest2.wrmsr(msrs.SINT0, 0xF3, vp=1)
    assert guest2.rdmsr(msrs.SINT0) == msrs.SINT_MASKED
    assert guest2.rdmsr(msrs.SINT0, vp=1) == 0xF3


def test_tpr_reads_back_and_faults_above_8_bits(guest: Guest) -> None:
    guest.wrmsr(msrs.TPR, 0x30)
    assert guest.rdmsr(msrs.TPR) == 0x30
    assert guest.wrmsr_fault(msrs.TPR, 0x100) == g.GP
    guest.wrmsr(msrs.TPR, 0)


def test_icr_sends_in_xapic_layout(guest2: Guest) -> None:
    guest2.wrmsr(msrs.ICR, 1 << 56 | 0x55)
    assert guest2.take(0x55, vp=1) == 1
    assert guest2.rdmsr(msrs.ICR) >> 56 == 1
    assert guest2.rdmsr(msrs.ICR) & 0xFF == 0x55


def test_crash_parameters_read_back(guest: Guest) -> None:
    for number in range(5):
        guest.wrmsr(msrs.CRASH_P0 + number, 0x1111_0000 + number)
    assert [guest.rdmsr(msrs.CRASH_P0 + n) for n in range(5)] == [0x1111_0000 + n for n in range(5)]


def test_crash_control_shows_the_capabilities(guest: Guest) -> None:
    assert guest.rdmsr(msrs.CRASH_CTL) == 3 << 62
    guest.wrmsr(msrs.CRASH_CTL, msrs.CRASH_MESSAGE)  # without NOTIFY nothing happens
    assert guest.partition.ended == ""


def test_tsc_invariant_control_is_sticky(guest: Guest) -> None:
    assert guest.rdmsr(msrs.TSC_INVARIANT_CONTROL) == 0
    assert guest.wrmsr_fault(msrs.TSC_INVARIANT_CONTROL, 2) == g.GP
    guest.wrmsr(msrs.TSC_INVARIANT_CONTROL, 1)
    assert guest.rdmsr(msrs.TSC_INVARIANT_CONTROL) == 1
    assert guest.wrmsr_fault(msrs.TSC_INVARIANT_CONTROL, 0) == g.GP


def test_reset_reads_zero_and_ignores_a_zero(guest: Guest) -> None:
    assert guest.rdmsr(msrs.RESET) == 0
    guest.wrmsr(msrs.RESET, 0)
    assert guest.partition.ended == ""
