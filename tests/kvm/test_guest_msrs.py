# SPDX-License-Identifier: Apache-2.0
"""An ordinary partition: its synthetic MSRs, values, faults and what comes back."""

from __future__ import annotations

import pytest

from rootvisor.hypervisor.guest_partition import GUEST_FEATURES
from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import msrs, privileges, status
from tests.kvm import guest as g
from tests.kvm.ordinary import CALL_PAGE, Ordinary, pages

row = pytest.mark.row


@row("MSR-00")
def test_identity_zero_takes_the_call_page_away(ordinary: Ordinary) -> None:
    before = int.from_bytes(ordinary.ram[CALL_PAGE : CALL_PAGE + 8], "little")
    assert ordinary.read(CALL_PAGE) != before
    ordinary.wrmsr(msrs.GUEST_OS_ID, 0)
    assert ordinary.rdmsr(msrs.HYPERCALL) == CALL_PAGE
    assert ordinary.read(CALL_PAGE) == before, "the guest's own memory is there again"


@row("MSR-00", "MSR-01")
def test_enable_stays_clear_without_an_identity(usable_kvm: None) -> None:
    with Ordinary() as guest:
        guest.wrmsr(msrs.HYPERCALL, CALL_PAGE | 0xA5)
        assert guest.rdmsr(msrs.HYPERCALL) == CALL_PAGE | 0xA4
        guest.wrmsr(msrs.GUEST_OS_ID, 0x8100_1234_5678_9ABC)
        assert guest.rdmsr(msrs.GUEST_OS_ID) == 0x8100_1234_5678_9ABC


@row("MSR-01")
def test_call_page_beyond_the_address_space_and_locked_faults(ordinary: Ordinary) -> None:
    assert ordinary.wrmsr_fault(msrs.HYPERCALL, 1 << 40 | 1) == g.GP
    assert ordinary.rdmsr(msrs.HYPERCALL) == CALL_PAGE | 1
    ordinary.wrmsr(msrs.HYPERCALL, CALL_PAGE | 3)
    assert ordinary.wrmsr_fault(msrs.HYPERCALL, CALL_PAGE) == g.GP
    assert ordinary.rdmsr(msrs.HYPERCALL) == CALL_PAGE | 3


@row("MSR-02", "MSR-07", "MSR-08", "MSR-15", "MSC-05")
def test_constants_read_and_cannot_be_written(ordinary2: Ordinary) -> None:
    assert [ordinary2.rdmsr(msrs.VP_INDEX, vp) for vp in (0, 1)] == [0, 1]
    assert ordinary2.rdmsr(msrs.SVERSION) == 1
    frequency = ordinary2.rdmsr(msrs.TSC_FREQUENCY)
    assert frequency == ordinary2.partition.reference_time.tsc_hz
    assert ordinary2.partition.reference_time.scale == (10_000_000 << 64) // frequency
    assert ordinary2.rdmsr(msrs.APIC_FREQUENCY) == 1_000_000_000
    for index in (
        msrs.VP_INDEX,
        msrs.TSC_FREQUENCY,
        msrs.APIC_FREQUENCY,
        msrs.SVERSION,
        msrs.TIME_REF_COUNT,
        msrs.VP_RUNTIME,
    ):
        assert ordinary2.wrmsr_fault(index, 0) == g.GP


@row("MSR-03")
def test_reset_takes_one_bit_and_resets(usable_kvm: None) -> None:
    with Ordinary() as guest:
        assert guest.rdmsr(msrs.RESET) == 0
        assert guest.wrmsr_fault(msrs.RESET, 2) == g.GP
        guest.wrmsr(msrs.RESET, 0)
        with pytest.raises(g.Ended, match="reset"):
            guest.one(g.WRMSR, rcx=msrs.RESET, rax=1)


@row("MSR-04")
def test_run_time_grows_with_work(ordinary2: Ordinary) -> None:
    before = [ordinary2.rdmsr(msrs.VP_RUNTIME, vp) for vp in (0, 1)]
    for _ in range(20):
        ordinary2.rdmsr(msrs.VP_INDEX)
    after = [ordinary2.rdmsr(msrs.VP_RUNTIME, vp) for vp in (0, 1)]
    assert after[0] > before[0]
    assert after[1] > before[1]
    assert after[0] - before[0] < 60 * 10_000_000, "100 ns units"


@row("MSR-10", "MSR-11", "MSR-12")
def test_apic_registers(ordinary2: Ordinary) -> None:
    assert ordinary2.rdmsr_fault(msrs.EOI) == g.GP
    assert ordinary2.wrmsr_fault(msrs.EOI, 1 << 32) == g.GP
    ordinary2.wrmsr(msrs.EOI, 0)
    ordinary2.wrmsr(msrs.TPR, 0x40)
    assert ordinary2.rdmsr(msrs.TPR) == 0x40
    assert ordinary2.wrmsr_fault(msrs.TPR, 0x100) == g.GP
    ordinary2.wrmsr(msrs.ICR, 1 << 56 | 0x55)
    assert ordinary2.take(0x55, vp=1) == 1
    ordinary2.wrmsr(msrs.TPR, 0)


@row("MSR-13", "EOI-04")
def test_assist_page_keeps_its_contents_but_for_the_eoi_word(ordinary: Ordinary) -> None:
    page = pages(0)[2]
    ordinary.wrmsr(msrs.VP_ASSIST_PAGE, page | 0xA5)
    assert ordinary.rdmsr(msrs.VP_ASSIST_PAGE) == page | 0xA5
    ordinary.write(page, 0x1234_5678_0000_0001)
    ordinary.write(page + 0x100, 0x55)
    ordinary.wrmsr(msrs.VP_ASSIST_PAGE, page)
    ordinary.wrmsr(msrs.VP_ASSIST_PAGE, page + 0x1000 | 1)
    assert ordinary.read(page + 0x1000) == 0x1234_5678_0000_0000
    assert ordinary.read(page + 0x1100) == 0x55
    ordinary.wrmsr(msrs.VP_ASSIST_PAGE, 1 << 45 | 1)
    assert ordinary.rdmsr(msrs.VP_ASSIST_PAGE) == 1 << 45 | 1, "a page beyond the address space is nowhere"


@row("MSR-14", "MSR-16", "MSR-18", "MSR-19", "SYN-18")
def test_synic_as_created(ordinary: Ordinary) -> None:
    for index in (msrs.SCONTROL, msrs.SIMP, msrs.SIEFP, msrs.SIRBP, msrs.EOM):
        assert ordinary.rdmsr(index) == 0
    assert [ordinary.rdmsr(msrs.SINT0 + n) for n in range(16)] == [0x10000] * 16


@row("MSR-14", "MSR-16", "MSR-18")
@pytest.mark.parametrize("index", [msrs.SCONTROL, msrs.SIMP, msrs.SIEFP, msrs.SIRBP])
def test_synic_registers_keep_what_was_written(ordinary: Ordinary, index: int) -> None:
    for value in (pages(0)[0] | 0xFF5, 1 << 50 | 1, 0):
        ordinary.wrmsr(index, value)
        assert ordinary.rdmsr(index) == value


@row("MSR-17")
def test_eom_reads_zero_and_takes_anything(ordinary: Ordinary) -> None:
    for value in (0, 1, (1 << 64) - 1):
        ordinary.wrmsr(msrs.EOM, value)
    assert ordinary.rdmsr(msrs.EOM) == 0


@row("MSR-19")
def test_sint_refuses_low_vectors_unless_masked(ordinary: Ordinary) -> None:
    for vector in range(16):
        assert ordinary.wrmsr_fault(msrs.SINT0 + 4, vector) == g.GP
        ordinary.wrmsr(msrs.SINT0 + 4, 0x10000 | vector)
    ordinary.wrmsr(msrs.SINT0 + 4, 0x7_00F3)
    assert ordinary.rdmsr(msrs.SINT0 + 4) == 0x7_00F3


@row("MSR-24", "MSC-02")
@pytest.mark.parametrize("source", ["ours", "local APIC"])
def test_guest_idle_sleeps_until_an_interrupt_waits_though_it_is_masked(
    ordinary2: Ordinary, source: str
) -> None:
    """VP 1 idles with interrupts off; VP 0 sends it one after a while."""
    import threading

    assert ordinary2.wrmsr_fault(msrs.GUEST_IDLE, 0) == g.GP
    ordinary2.wrmsr(msrs.TPR, 0xF0, vp=1)
    answer: list[g.Op] = []
    idler = threading.Thread(target=lambda: answer.append(ordinary2.one(g.RDMSR, 1, rcx=msrs.GUEST_IDLE)))
    idler.start()
    idler.join(0.3)
    assert idler.is_alive(), "nothing is pending"
    if source == "ours":
        assert ordinary2.call(hv.SEND_IPI, hv.SEND_IPI_INPUT.pack(0x45, 0, bytes(3), 2)).status == 0
    else:
        assert ordinary2.one(g.WRMSR, rcx=0x830, rax=1 << 32 | 0x45).fault == 0
    idler.join(20)
    assert answer
    assert (answer[0].fault, answer[0].rax) == (0, 0)
    assert ordinary2.interrupts(0x45, 1) == 0, "it is pending, not taken"


@row("MSR-26", "MSR-27", "MSC-01")
def test_crash_is_reported_and_the_guest_goes_on(ordinary: Ordinary) -> None:
    text = b"kernel panic: of the test"
    ordinary.ram[g.SPARE : g.SPARE + len(text)] = text
    assert ordinary.rdmsr(msrs.CRASH_CTL) == 3 << 62
    for number, value in enumerate((1, 2, 3, g.SPARE, len(text))):
        ordinary.wrmsr(msrs.CRASH_P0 + number, value)
        assert ordinary.rdmsr(msrs.CRASH_P0 + number) == value
    ordinary.wrmsr(msrs.CRASH_CTL, msrs.CRASH_MESSAGE)
    assert ordinary.partition.crash_report == b"", "without NOTIFY nothing happens"
    ordinary.wrmsr(msrs.CRASH_CTL, 3 << 62)
    assert ordinary.partition.crash_report == text
    assert ordinary.partition.ended == ""
    assert ordinary.rdmsr(msrs.VP_INDEX) == 0


@row("MSC-01")
@pytest.mark.parametrize(
    ("gpa", "length"), [(1 << 52, 100), ((1 << 64) - 1, 4096), (g.RAM - 1, 2), (0, 1 << 63)]
)
def test_crash_text_outside_of_memory_is_no_harm(ordinary: Ordinary, gpa: int, length: int) -> None:
    ordinary.wrmsr(msrs.CRASH_P0 + 3, gpa)
    ordinary.wrmsr(msrs.CRASH_P0 + 4, length)
    ordinary.wrmsr(msrs.CRASH_CTL, 3 << 62)
    assert ordinary.partition.crash_report


@row("MSR-26")
def test_crash_registers_fault_without_their_feature(usable_kvm: None) -> None:
    with Ordinary(features=GUEST_FEATURES & ~privileges.FEATURE_CRASH_MSRS) as guest:
        for index in (msrs.CRASH_P0, msrs.CRASH_P4, msrs.CRASH_CTL):
            assert guest.rdmsr_fault(index) == g.GP


@row("MSR-32", "MSC-06", "PRV-14")
def test_invariant_tsc_appears_when_the_guest_asks_for_it_and_stays(ordinary2: Ordinary) -> None:
    """Where KVM cannot hide it, it is there at all times, and the register is not."""
    shown = [ordinary2.cpuid(0x80000007, vp=vp)[3] >> 8 & 1 for vp in (0, 1)]
    if not ordinary2.cpuid(0x40000003)[0] & privileges.ACCESS_TSC_INVARIANT_CONTROLS:
        assert shown == [1, 1]
        assert ordinary2.rdmsr_fault(msrs.TSC_INVARIANT_CONTROL) == g.GP
        assert ordinary2.wrmsr_fault(msrs.TSC_INVARIANT_CONTROL, 1) == g.GP
        return
    assert shown == [0, 0]
    assert ordinary2.wrmsr_fault(msrs.TSC_INVARIANT_CONTROL, 2) == g.GP
    ordinary2.wrmsr(msrs.TSC_INVARIANT_CONTROL, 0)
    assert ordinary2.cpuid(0x80000007)[3] >> 8 & 1 == 0
    ordinary2.wrmsr(msrs.TSC_INVARIANT_CONTROL, 1)
    assert ordinary2.rdmsr(msrs.TSC_INVARIANT_CONTROL, 1) == 1
    assert ordinary2.wrmsr_fault(msrs.TSC_INVARIANT_CONTROL, 0) == g.GP
    assert [ordinary2.cpuid(0x80000007, vp=vp)[3] >> 8 & 1 for vp in (0, 1)] == [1, 1]


@row("HC-04", "MSC-03")
def test_spin_wait_always_succeeds(ordinary: Ordinary) -> None:
    for count in (0, 1, 0xFFFFFFFF):
        assert ordinary.call(hv.NOTIFY_LONG_SPIN_WAIT, hv.NOTIFY_LONG_SPIN_WAIT_INPUT.pack(count)).status == 0
    assert (
        ordinary.fast(hv.NOTIFY_LONG_SPIN_WAIT, hv.NOTIFY_LONG_SPIN_WAIT_INPUT.pack(7)).status
        == status.SUCCESS
    )


@row("MEM-03")
def test_memory_that_is_not_there_reads_as_ones_and_swallows_writes(ordinary: Ordinary) -> None:
    assert ordinary.write(0x8000_0000, 0x1234) == 0
    assert ordinary.read(0x8000_0000) == (1 << 64) - 1
