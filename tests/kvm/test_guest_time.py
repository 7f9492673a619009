# SPDX-License-Identifier: Apache-2.0
"""Reference time and overlay pages of an ordinary partition (contract/guest-interface 1.8, 2.6, 2.7)."""

from __future__ import annotations

import random
import struct
import threading

import pytest

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


@row("EOI-01", "EOI-02", "EOI-03")
def test_the_assist_page_never_asks_to_leave_an_eoi_out(ordinary2: Ordinary) -> None:
    """So a guest that looks always writes EOI, and nothing has to be revoked."""
    page = pages(0)[2]
    ordinary2.wrmsr(msrs.VP_ASSIST_PAGE, page | 1)
    assert ordinary2.call(hv.SEND_IPI, hv.SEND_IPI_INPUT.pack(0x55, 0, bytes(3), 1)).status == 0
    assert ordinary2.take(0x55) == 1
    assert ordinary2.read(page) & 0xFFFFFFFF == 0


@row("OVL-05", "MEM-03")
def test_a_guest_that_executes_where_there_is_nothing_ends_by_itself(ordinary2: Ordinary) -> None:
    with pytest.raises(g.Ended, match="triple-fault"):
        ordinary2.one(g.HYPERCALL, rcx=0, target=HOLE)
