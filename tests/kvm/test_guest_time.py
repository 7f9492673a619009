# SPDX-License-Identifier: Apache-2.0
"""Reference time and overlay pages of an ordinary partition (contract/guest-interface 1.8, 2.6, 2.7)."""

from __future__ import annotations

import os
import random
import struct
import threading
import time

import pytest

from rootvisor.kvm.abi import MEM_READONLY
from rootvisor.kvm.memory import SharedMemory
from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import msrs
from tests.kvm import guest as g
from tests.kvm.ordinary import CALL_PAGE, TSC_PAGE, Ordinary, pages

row = pytest.mark.row

HOLE = 0x8000_0000
PAGE_MSRS = (msrs.SIMP, msrs.SIEFP, msrs.VP_ASSIST_PAGE)


def tsc_page(guest: Ordinary) -> tuple[int, int, int]:
    """Sequence, scale, offset, as the guest reads them."""
    words = [guest.read(TSC_PAGE + n * 8) for n in range(3)]
    sequence, scale, offset = struct.unpack("<IxxxxQq", struct.pack("<3Q", *words))
    return sequence, scale, offset


@row("REF-01", "MSR-05", "PRV-01")
def test_counter_begins_near_zero_and_never_goes_back_between_vps(ordinary2: Ordinary) -> None:
    last = ordinary2.rdmsr(msrs.TIME_REF_COUNT)
    assert last < 600 * 10_000_000
    for turn in range(40):
        time = ordinary2.rdmsr(msrs.TIME_REF_COUNT, turn % 2)
        assert time >= last
        last = time


@row("REF-01", "REF-07")
def test_counters_of_two_vps_that_run_at_once_agree(ordinary2: Ordinary) -> None:
    """Each VP reads in a batch; the readings of both lie in one order with the TSC that they share."""
    batches = [
        [g.Op(kind, rcx=msrs.TIME_REF_COUNT) for kind in (g.RDTSC, g.RDMSR, g.RDTSC)] * 60 for _ in range(2)
    ]
    threads = [threading.Thread(target=ordinary2.run, args=(batch, vp)) for vp, batch in enumerate(batches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    readings = []
    for batch in batches:
        for before, middle, after in zip(batch[0::3], batch[1::3], batch[2::3], strict=True):
            readings.append((before.rax, after.rax, middle.rax))
    readings.sort()
    for (_, ended, earlier), (began, _, later) in (
        (one, two) for at, one in enumerate(readings) for two in readings[at + 1 :: 17]
    ):
        assert ended > began or earlier <= later


@row("REF-02", "REF-03", "REF-04", "REF-07", "MSR-06", "PRV-09", "OVL-01")
def test_page_and_counter_are_one_clock(ordinary2: Ordinary) -> None:
    ordinary2.wrmsr(msrs.REFERENCE_TSC, TSC_PAGE | 0xA1)
    assert ordinary2.rdmsr(msrs.REFERENCE_TSC, 1) == TSC_PAGE | 0xA1
    sequence, scale, offset = tsc_page(ordinary2)
    assert sequence not in (0, 0xFFFFFFFF)
    assert scale == (10_000_000 << 64) // ordinary2.rdmsr(msrs.TSC_FREQUENCY)
    ops = [g.Op(kind, rcx=msrs.TIME_REF_COUNT) for kind in (g.RDTSC, g.RDMSR, g.RDTSC)] * 20
    for vp in (0, 1):
        ordinary2.run(ops, vp)
        for before, middle, after in zip(ops[0::3], ops[1::3], ops[2::3], strict=True):
            assert (before.rax * scale >> 64) + offset <= middle.rax <= (after.rax * scale >> 64) + offset
        for op in ops:
            op.rcx, op.rax = msrs.TIME_REF_COUNT, 0


@pytest.mark.timeout(3600)
@row("REF-01", "REF-03", "REF-07")
def test_no_vp_reads_a_time_before_one_that_another_has_read(
    usable_kvm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four VPs at once, for ROOTVISOR_GUEST_HAMMER seconds (default 2): by the page, and now and then by the MSR."""
    end = time.monotonic() + float(os.environ.get("ROOTVISOR_GUEST_HAMMER", "2"))
    back, readings = [0] * 4, [0] * 4
    with Ordinary(vps=4) as guest:
        for vp in (1, 2, 3):
            guest.start_vp(vp)
        guest.wrmsr(msrs.REFERENCE_TSC, TSC_PAGE | 1)

        def hammer(vp: int) -> None:
            while not readings[vp] or time.monotonic() < end:
                back[vp] += guest.one(g.HAMMER, vp, rcx=g.SPARE, rdx=50_000, rbx=TSC_PAGE).rax
                readings[vp] += 50_000

        threads = [threading.Thread(target=hammer, args=(vp,)) for vp in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        latest = guest.read(g.SPARE)
        assert all(readings)
        assert 0 < latest <= guest.rdmsr(msrs.TIME_REF_COUNT)
        assert guest.partition.defect is None
    with capsys.disabled():
        print(f"\n{sum(readings)} readings of the reference time on 4 VPs, {sum(back)} went back")
    assert back == [0] * 4


@row("REF-05")
def test_page_changes_with_a_new_sequence_that_is_never_reserved(ordinary2: Ordinary) -> None:
    ordinary2.wrmsr(msrs.REFERENCE_TSC, TSC_PAGE | 1)
    partition = ordinary2.partition
    partition.reference_time.sequence = 0xFFFFFFFF
    partition.reference_time.write_page(partition.tsc_page.view)
    assert tsc_page(ordinary2)[0] == 1


@row("REF-02", "REF-06", "OVL-02")
def test_disabled_page_shows_the_guests_memory_which_was_never_written(ordinary2: Ordinary) -> None:
    ordinary2.write(TSC_PAGE, 0x1111_2222_3333_4444)
    ordinary2.wrmsr(msrs.REFERENCE_TSC, TSC_PAGE | 1)
    assert ordinary2.read(TSC_PAGE) != 0x1111_2222_3333_4444
    assert ordinary2.write(TSC_PAGE, 0) == g.GP, "only the hypervisor writes it"
    ordinary2.wrmsr(msrs.REFERENCE_TSC, 0)
    assert ordinary2.rdmsr(msrs.REFERENCE_TSC) == 0
    assert ordinary2.read(TSC_PAGE) == 0x1111_2222_3333_4444


@row("MSR-06", "MSR-16", "OVL-01")
@pytest.mark.parametrize("index", [msrs.REFERENCE_TSC, *PAGE_MSRS])
def test_page_beyond_the_address_space_is_accepted_and_nowhere(ordinary2: Ordinary, index: int) -> None:
    for page in (1 << 40, 1 << 51, (1 << 64) - 4096):
        ordinary2.wrmsr(index, page | 1)
        assert ordinary2.rdmsr(index) == page | 1
    ordinary2.wrmsr(index, 0)


@row("OVL-04", "OVL-02", "MSR-01")
def test_call_page_can_be_read_and_executed_and_not_written(ordinary2: Ordinary) -> None:
    before = [ordinary2.read(CALL_PAGE + n) for n in (0, 8, 4088)]
    op = ordinary2.one(g.STORE, rcx=CALL_PAGE, rax=0)
    assert op.fault == g.GP
    assert [ordinary2.read(CALL_PAGE + n) for n in (0, 8, 4088)] == before
    assert ordinary2.call(hv.NOTIFY_LONG_SPIN_WAIT, bytes(8)).status == 0
    ordinary2.wrmsr(msrs.HYPERCALL, CALL_PAGE)
    assert ordinary2.write(CALL_PAGE, 0x77) == 0
    assert ordinary2.read(CALL_PAGE) == 0x77
    ordinary2.wrmsr(msrs.HYPERCALL, CALL_PAGE | 1)
    assert ordinary2.call(hv.NOTIFY_LONG_SPIN_WAIT, bytes(8)).status == 0
    ordinary2.wrmsr(msrs.HYPERCALL, 0)
    assert ordinary2.read(CALL_PAGE) == 0x77


@row("OVL-01", "OVL-02", "OVL-03", "MSR-13", "MSR-16")
@pytest.mark.parametrize("index", PAGE_MSRS)
@pytest.mark.parametrize("there", [pages(0)[0], HOLE, 0xE0000000], ids=["ram", "hole", "far hole"])
def test_page_hides_what_is_below_and_takes_its_contents_along(
    ordinary2: Ordinary, index: int, there: int
) -> None:
    ram = pages(1)[0]
    ordinary2.write(ram + 8, 0xAAAA)
    ordinary2.wrmsr(index, there | 1)
    assert ordinary2.read(there + 8) == 0
    ordinary2.write(there + 8, 0x5555)
    assert ordinary2.read(there + 8, vp=1) == 0x5555
    ordinary2.wrmsr(index, ram | 1)
    assert ordinary2.read(ram + 8) == 0x5555, "contents travel"
    assert ordinary2.read(there + 8) != 0x5555
    ordinary2.wrmsr(index, ram)
    assert ordinary2.read(ram + 8) == 0xAAAA, "what is below was never touched"
    ordinary2.wrmsr(index, there | 1)
    assert ordinary2.read(there + 8) == 0x5555, "and survive being off"


@row("OVL-05")
def test_overlays_on_one_page_and_operands_in_overlays_harm_nobody(ordinary2: Ordinary) -> None:
    dice = random.Random(5)
    places = [pages(0)[0], pages(0)[0], pages(1)[0], HOLE, 0xFEE00000, 0xFEC00000, 1 << 45]
    for _ in range(150):
        index, vp = dice.choice(PAGE_MSRS), dice.randrange(2)
        ordinary2.wrmsr(index, dice.choice(places) | dice.randrange(2), vp)
        ordinary2.call(
            hv.POST_MESSAGE,
            input_gpa=dice.choice((*places, CALL_PAGE)) + 8 * dice.randrange(8),
            output_gpa=dice.choice((*places, CALL_PAGE)),
        )
    for vp in (0, 1):
        for index in PAGE_MSRS:
            ordinary2.wrmsr(index, 0, vp)
    assert ordinary2.call(hv.NOTIFY_LONG_SPIN_WAIT, bytes(8)).status == 0


#: Handled as an exception by the agent, which then writes no EOI.
UNENDED, LOWER = 0x1F, 0x1E
ATTEMPTS = 300


def granted(guest: Ordinary, *after: g.Op) -> list[g.Op] | None:
    """Has VP 0 take an interrupt for which the assist page says that no EOI is needed, and do ``after`` in the same
    batch, where nothing leaves the guest in between; what it did. None: KVM never says so.

    Any exit takes the word away again, and the host's own interrupts are exits: hence several attempts.
    """
    page = pages(0)[2]
    for _ in range(ATTEMPTS):
        ops = [
            g.Op(g.WRMSR, rcx=0x83F, rax=UNENDED),
            g.Op(g.AWAIT, rcx=UNENDED, rdx=1, rbx=3_000_000),
            g.Op(g.LOAD, rcx=page),
            *(g.Op(op.kind, rcx=op.rcx, rax=op.rax, rdx=op.rdx, rbx=op.rbx) for op in after),
        ]
        guest.run(ops)
        assert ops[1].fault == 0x100 | UNENDED
        if ops[2].rax & 1:
            return ops[3:]
        guest.write(page, 0)
        end_all(guest)
        guest.one(g.AWAIT, rcx=LOWER, rdx=1, rbx=1000)  # should one wait
        end_all(guest)
    return None


def end_all(guest: Ordinary) -> None:
    while any(in_service(guest)):
        guest.wrmsr(msrs.EOI, 0)


def in_service(guest: Ordinary) -> list[int]:
    lapic = memoryview(guest.partition.vps[0].vcpu.lapic()).cast("I")
    return [int(lapic[0x40 + 4 * word]) for word in range(8)]


@pytest.fixture
def assisted(ordinary2: Ordinary) -> Ordinary:
    ordinary2.wrmsr(msrs.VP_ASSIST_PAGE, pages(0)[2] | 1)
    return ordinary2


def skip_with_apicv() -> None:
    """A processor with an APIC of its own for guests needs no help with EOIs."""
    for path in ("/sys/module/kvm_intel/parameters/enable_apicv", "/sys/module/kvm_amd/parameters/avic"):
        if os.path.exists(path) and open(path).read().strip() in ("Y", "1"):
            pytest.skip("EOIs do not leave the guest here, and KVM never says that one is not needed")


@row("EOI-01", "EOI-02")
def test_the_assist_page_says_that_no_eoi_is_needed_and_clearing_the_word_is_one(assisted: Ordinary) -> None:
    page = pages(0)[2]
    done = granted(assisted, g.Op(g.STORE, rcx=page, rax=0), g.Op(g.RDMSR, rcx=msrs.VP_INDEX))
    if done is None:
        skip_with_apicv()
    assert done is not None, "never granted"
    assert not any(in_service(assisted)), "the interrupt has ended"
    assert assisted.call(hv.SEND_IPI, hv.SEND_IPI_INPUT.pack(0x55, 0, bytes(3), 1)).status == 0
    assert assisted.take(0x55) == 1


@row("EOI-02")
def test_an_eoi_that_is_not_needed_is_taken_all_the_same(assisted: Ordinary) -> None:
    done = granted(assisted, g.Op(g.WRMSR, rcx=msrs.EOI, rax=0))
    if done is None:
        skip_with_apicv()
    assert not any(in_service(assisted))
    assert assisted.call(hv.SEND_IPI, hv.SEND_IPI_INPUT.pack(0x55, 0, bytes(3), 1)).status == 0
    assert assisted.take(0x55) == 1


@row("EOI-03")
def test_a_lower_interrupt_that_comes_takes_the_grant_back(assisted: Ordinary) -> None:
    page = pages(0)[2]
    done = granted(assisted, g.Op(g.WRMSR, rcx=0x83F, rax=LOWER), g.Op(g.LOAD, rcx=page))
    if done is None:
        skip_with_apicv()
    assert done is not None, "never granted"
    assert done[1].rax & 1 == 0, "the next EOI is needed: there is something to deliver after it"
    assert any(in_service(assisted))
    assert assisted.one(g.AWAIT, rcx=LOWER, rdx=1, rbx=2000).fault == 0, "it waits for the EOI"
    assisted.wrmsr(msrs.EOI, 0)
    assert assisted.one(g.AWAIT, rcx=LOWER, rdx=1, rbx=3_000_000).fault == 0x100 | LOWER


@row("EOI-01", "EOI-04")
@pytest.mark.parametrize("gone", [pages(0)[2], 1 << 45 | 1], ids=["off", "nowhere"])
def test_without_the_assist_page_nothing_is_written_where_it_was(assisted: Ordinary, gone: int) -> None:
    page = pages(0)[2]
    assisted.wrmsr(msrs.VP_ASSIST_PAGE, gone)
    ops = [
        g.Op(g.WRMSR, rcx=0x83F, rax=UNENDED),
        g.Op(g.AWAIT, rcx=UNENDED, rdx=1, rbx=3_000_000),
        g.Op(g.LOAD, rcx=page),
        g.Op(g.WRMSR, rcx=msrs.EOI, rax=0),
    ]
    assisted.run(ops)
    assert (ops[1].fault, ops[2].rax, ops[3].fault) == (0x100 | UNENDED, 0, 0)
    assert not any(in_service(assisted))


@row("OVL-01", "OVL-02")
def test_overlays_lie_over_memory_of_the_computers_own(ordinary2: Ordinary) -> None:
    """PCI configuration space is such memory: read-only to the guest, here eight pages."""
    base, words = 0xD000_0000, 8
    window = SharedMemory("window", words * 4096)
    try:
        for page in range(words):
            window.view[page * 4096 : page * 4096 + 8] = (0x1000 + page).to_bytes(8, "little")
        ordinary2.partition.overlays.show_window(2, base, words * 4096, window.address, MEM_READONLY)
        everywhere = [base + 4096 * page for page in range(words)]
        assert [ordinary2.read(at) for at in everywhere] == [0x1000 + page for page in range(words)]
        for index, page in ((msrs.SIMP, 3), (msrs.SIEFP, 4), (msrs.VP_ASSIST_PAGE, 0)):
            ordinary2.wrmsr(index, base + 4096 * page | 1)
            assert ordinary2.write(base + 4096 * page, 0x77) == 0
        seen = [0x77 if page in (0, 3, 4) else 0x1000 + page for page in range(words)]
        assert [ordinary2.read(at, vp=1) for at in everywhere] == seen
        ordinary2.partition.overlays.show_window(2, base, 0, window.address, 0)
        assert [ordinary2.read(at) for at in everywhere] == [
            0x77 if page in (0, 3, 4) else (1 << 64) - 1 for page in range(words)
        ]
        ordinary2.partition.overlays.show_window(2, base, words * 4096, window.address, MEM_READONLY)
        for index in PAGE_MSRS:
            ordinary2.wrmsr(index, 0)
        assert [ordinary2.read(at) for at in everywhere] == [0x1000 + page for page in range(words)]
    finally:
        ordinary2.partition.overlays.show_window(2, base, 0, 0, 0)
        window.close()


@row("OVL-05", "MEM-03")
def test_a_guest_that_executes_where_there_is_nothing_ends_by_itself(ordinary2: Ordinary) -> None:
    with pytest.raises(g.Ended, match="triple-fault"):
        ordinary2.one(g.HYPERCALL, rcx=0, target=HOLE)
