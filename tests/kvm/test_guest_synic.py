# SPDX-License-Identifier: Apache-2.0
"""An ordinary partition's SynIC: messages, event flags, connections with itself, automatic EOI, polling."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator

import pytest

from rootvisor.hypervisor.errors import HvError
from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import messages, msrs, status
from rootvisor.tlfs import ports as tlfs
from tests.kvm import guest as g
from tests.kvm.ordinary import Ordinary, WithoutKvmsSynic, pages

row = pytest.mark.row

SINT, VECTOR = 8, 0xB0
EVENT_SINT, EVENT_VECTOR = 9, 0xB1
#: Handled as an exception by the agent, which then writes no EOI.
NO_EOI_VECTOR = 0x1F
MESSAGE, EVENT, FAR_MESSAGE, ANY = 0x10, 0x20, 0x11, 0x12


@pytest.fixture
def ordinary(usable_kvm: None) -> Iterator[Ordinary]:
    """Two VPs with their SynICs on, and connections: MESSAGE and EVENT to VP 0, FAR_MESSAGE to VP 1, ANY to any."""
    with prepared(Ordinary(vps=2)) as made:
        yield made
        assert made.partition.defect is None


def prepared(made: Ordinary) -> Ordinary:
    made.enable_hypercalls()
    made.start_vp(1)
    for vp in (0, 1):
        made.enable_synic(vp)
        made.wrmsr(msrs.SINT0 + SINT, VECTOR, vp)
        made.wrmsr(msrs.SINT0 + EVENT_SINT, EVENT_VECTOR, vp)
    connect(made, MESSAGE, tlfs.PORT_MESSAGE, tlfs.MESSAGE_PORT.pack(SINT, 0, 0))
    connect(made, FAR_MESSAGE, tlfs.PORT_MESSAGE, tlfs.MESSAGE_PORT.pack(SINT, 1, 0))
    connect(made, ANY, tlfs.PORT_MESSAGE, tlfs.MESSAGE_PORT.pack(SINT, tlfs.ANY_VP, 0))
    connect(made, EVENT, tlfs.PORT_EVENT, tlfs.EVENT_PORT.pack(EVENT_SINT, 0, 32, 4, 0))
    return made


def connect(guest: Ordinary, number: int, kind: int, info: bytes) -> None:
    ports, partition = guest.hypervisor.ports, guest.partition
    with guest.hypervisor.lock:
        ports.create(partition, number, partition, kind, info)
        ports.connect(partition, number, partition, number, kind, 0, 0, 0)


def post(
    guest: Ordinary, connection: int, kind: int = 1, payload: bytes = b"", size: int | None = None
) -> int:
    length = len(payload) if size is None else size
    data = struct.pack("<IIII", connection, 0, kind, length) + payload.ljust(240, b"\0")
    return guest.call(hv.POST_MESSAGE, data).status


def signal(guest: Ordinary, connection: int, flag: int = 0) -> int:
    data = struct.pack("<IHH", connection, flag, 0)
    return guest.call(hv.SIGNAL_EVENT, data).status


def in_service(guest: Ordinary, vector: int, vp: int = 0) -> bool:
    at = 0x100 + 0x10 * (vector // 32)
    word = int.from_bytes(guest.partition.vps[vp].vcpu.lapic()[at : at + 4], "little")
    return bool(word >> vector % 32 & 1)


@row("SYN-01", "SYN-02", "SYN-04", "SYN-14", "SYN-17", "SYN-20", "HC-17", "PRV-16")
def test_message_to_oneself_and_to_another_vp(ordinary: Ordinary) -> None:
    for vp, connection in ((0, MESSAGE), (1, FAR_MESSAGE)):
        assert post(ordinary, connection, 0x12345678, b"abcdefgh") == 0
        kind, size, flags, sender, payload = ordinary.slot(SINT, vp)
        assert (kind, size, flags, sender, payload[:8]) == (0x12345678, 8, 0, connection, b"abcdefgh")
        assert ordinary.take(VECTOR, vp) == 1
        assert ordinary.interrupts(VECTOR, 1 - vp) == vp


@row("SYN-05", "SYN-06", "SYN-08", "SYN-09", "HC-17")
def test_busy_slot_queues_sixteen_and_eom_brings_them_in_order(ordinary: Ordinary) -> None:
    assert [post(ordinary, MESSAGE, kind) for kind in range(1, 19)] == [0] * 17 + [
        status.INSUFFICIENT_BUFFERS
    ]
    seen = []
    for _ in range(17):
        kind, _size, flags, *_ = ordinary.slot(SINT)
        seen.append((kind, flags))
        ordinary.wrmsr(msrs.EOM, 0)
        assert ordinary.slot(SINT)[:3] == (kind, 0, flags), "the slot is busy still"
        ordinary.free_slot(SINT)
        ordinary.wrmsr(msrs.EOM, 0)
    assert [kind for kind, _ in seen] == list(range(1, 18))
    assert [flags for _, flags in seen] == [1] * 16 + [0]
    assert ordinary.slot(SINT)[0] == 0
    assert ordinary.take(VECTOR) >= 1


@row("SYN-07")
def test_eoi_of_a_guest_that_forgets_eom_brings_the_next_message(ordinary: Ordinary) -> None:
    assert (post(ordinary, MESSAGE, 1), post(ordinary, MESSAGE, 2)) == (0, 0)
    assert ordinary.take(VECTOR) == 1
    ordinary.free_slot(SINT)
    ordinary.wrmsr(msrs.EOI, 0)
    deadline = time.monotonic() + 60
    while ordinary.slot(SINT)[0] != 2:
        assert time.monotonic() < deadline
    assert ordinary.take(VECTOR, count=2) == 2


@row("SYN-07")
def test_a_guest_that_forgets_eom_gets_the_rest_with_the_next_message(ordinary: Ordinary) -> None:
    assert (post(ordinary, MESSAGE, 1), post(ordinary, MESSAGE, 2)) == (0, 0)
    ordinary.free_slot(SINT)
    assert post(ordinary, MESSAGE, 3) == 0
    assert ordinary.slot(SINT)[0] == 2
    assert ordinary.slot(SINT)[2] == 1, "one waits still"


@row("SYN-01", "HC-17", "HC-18")
@pytest.mark.parametrize("off", [msrs.SCONTROL, msrs.SIMP, msrs.SIEFP])
def test_synic_or_page_off_is_no_candidate(ordinary: Ordinary, off: int) -> None:
    value = ordinary.rdmsr(off)
    ordinary.wrmsr(off, value & ~1)
    expected = status.INVALID_SYNIC_STATE
    assert post(ordinary, MESSAGE) == (0 if off == msrs.SIEFP else expected)
    assert signal(ordinary, EVENT) == (0 if off == msrs.SIMP else expected)
    ordinary.wrmsr(off, value)
    assert signal(ordinary, EVENT) == 0


@row("SYN-08")
def test_any_vp_takes_one_whose_synic_is_on(ordinary: Ordinary) -> None:
    ordinary.wrmsr(msrs.SCONTROL, 0)
    assert post(ordinary, ANY, 5) == 0
    assert ordinary.slot(SINT, 1)[0] == 5


@row("HC-17", "SYN-17", "SYN-20")
@pytest.mark.parametrize(
    ("connection", "kind", "size", "expected"),
    [
        (0x99, 1, 0, status.INVALID_CONNECTION_ID),
        (1, 1, 0, status.INVALID_CONNECTION_ID),
        (MESSAGE, 0, 0, status.INVALID_PARAMETER),
        (MESSAGE, 0x80000000, 0, status.INVALID_PARAMETER),
        (MESSAGE, 1, 241, status.INVALID_PARAMETER),
        (EVENT, 1, 0, status.INVALID_PARAMETER),
    ],
)
def test_message_that_makes_no_sense(
    ordinary: Ordinary, connection: int, kind: int, size: int, expected: int
) -> None:
    assert post(ordinary, connection, kind, size=size) == expected
    assert ordinary.slot(SINT)[0] == 0


@row("SYN-03", "SYN-15", "SYN-16", "HC-18", "PRV-17")
def test_event_flags_interrupt_on_the_change_only(ordinary: Ordinary) -> None:
    word = pages(0)[1] + EVENT_SINT * 256
    assert signal(ordinary, EVENT, 3) == 0
    assert ordinary.read(word) == 1 << 35
    assert ordinary.take(EVENT_VECTOR) == 1
    assert signal(ordinary, EVENT, 3) == 0
    assert ordinary.take(EVENT_VECTOR, count=2, turns=2000) == 1
    ordinary.write(word, 0)
    assert ordinary.fast(hv.SIGNAL_EVENT, struct.pack("<IHH", EVENT, 0, 0)).status == 0
    assert ordinary.read(word) == 1 << 32
    assert ordinary.take(EVENT_VECTOR, count=2) == 2
    assert signal(ordinary, EVENT, 4) == status.INVALID_PARAMETER
    assert signal(ordinary, MESSAGE) == status.INVALID_PARAMETER
    assert signal(ordinary, 0x99) == status.INVALID_CONNECTION_ID


@row("SYN-10")
def test_masked_sint_takes_messages_silently_and_no_events(ordinary: Ordinary) -> None:
    for sint, vector in ((SINT, VECTOR), (EVENT_SINT, EVENT_VECTOR)):
        ordinary.wrmsr(msrs.SINT0 + sint, msrs.SINT_MASKED | vector)
    assert post(ordinary, MESSAGE, 7) == 0
    assert ordinary.slot(SINT)[0] == 7
    assert signal(ordinary, EVENT) == status.INVALID_SYNIC_STATE
    assert ordinary.take(VECTOR, turns=2000) == 0
    assert ordinary.interrupts(EVENT_VECTOR) == 0


@row("SYN-12")
def test_polling_sint_takes_both_without_an_interrupt(ordinary: Ordinary) -> None:
    for sint, vector in ((SINT, VECTOR), (EVENT_SINT, EVENT_VECTOR)):
        ordinary.wrmsr(msrs.SINT0 + sint, msrs.SINT_POLLING | vector)
    assert post(ordinary, MESSAGE, 7) == 0
    assert signal(ordinary, EVENT) == 0
    assert ordinary.slot(SINT)[0] == 7
    assert ordinary.take(VECTOR, turns=2000) == 0
    assert ordinary.interrupts(EVENT_VECTOR) == 0


@pytest.fixture
def without_kvms_synic(usable_kvm: None) -> Iterator[Ordinary]:
    with prepared(WithoutKvmsSynic(vps=2)) as made:
        yield made
        assert made.partition.defect is None


@row("SYN-11")
@pytest.mark.parametrize("maker", ["ordinary", "without_kvms_synic"])
def test_automatic_eoi_leaves_nothing_in_service(request: pytest.FixtureRequest, maker: str) -> None:
    ordinary: Ordinary = request.getfixturevalue(maker)
    ordinary.wrmsr(msrs.SINT0 + SINT, msrs.SINT_AUTO_EOI | NO_EOI_VECTOR)
    for _ in range(2):
        assert post(ordinary, MESSAGE) == 0
        assert ordinary.one(g.AWAIT, rcx=NO_EOI_VECTOR, rdx=1, rbx=3_000_000).fault == 0x100 | NO_EOI_VECTOR
        assert not in_service(ordinary, NO_EOI_VECTOR)
        ordinary.free_slot(SINT)
    ordinary.wrmsr(msrs.SINT0 + SINT, NO_EOI_VECTOR)
    assert post(ordinary, MESSAGE) == 0
    assert ordinary.one(g.AWAIT, rcx=NO_EOI_VECTOR, rdx=1, rbx=3_000_000).fault == 0x100 | NO_EOI_VECTOR
    assert in_service(ordinary, NO_EOI_VECTOR), "without the bit it waits for EOI"
    ordinary.wrmsr(msrs.EOI, 0)
    assert not in_service(ordinary, NO_EOI_VECTOR)


@row("SYN-11", "SYN-14")
def test_interrupt_that_ends_itself_waits_for_the_task_priority_and_wakes(
    without_kvms_synic: Ordinary,
) -> None:
    guest = without_kvms_synic
    guest.wrmsr(msrs.SINT0 + SINT, msrs.SINT_AUTO_EOI | VECTOR)
    guest.wrmsr(msrs.TPR, 0xF0)
    assert post(guest, MESSAGE) == 0
    assert guest.take(VECTOR, turns=2000) == 0
    guest.wrmsr(msrs.TPR, 0)
    assert guest.take(VECTOR, turns=100_000_000) == 1
    assert not in_service(guest, VECTOR)
    guest.free_slot(SINT)
    assert post(guest, MESSAGE) == 0
    assert guest.one(g.RDMSR, rcx=msrs.GUEST_IDLE).fault == 0, "it is pending: idling ends at once"
    assert guest.take(VECTOR, count=2, turns=100_000_000) == 2


@row("SYN-13")
def test_sints_share_a_vector(ordinary: Ordinary) -> None:
    ordinary.wrmsr(msrs.SINT0 + EVENT_SINT, VECTOR)
    assert post(ordinary, MESSAGE) == 0
    assert ordinary.take(VECTOR) == 1
    assert signal(ordinary, EVENT) == 0
    assert ordinary.take(VECTOR, count=2) == 2


@row("SYN-14")
def test_interrupt_waits_for_the_task_priority(ordinary: Ordinary) -> None:
    ordinary.wrmsr(msrs.TPR, 0xF0)
    assert post(ordinary, MESSAGE) == 0
    assert ordinary.take(VECTOR, turns=2000) == 0
    ordinary.wrmsr(msrs.TPR, 0)
    assert ordinary.take(VECTOR) == 1


@row("SYN-18", "OVL-03")
def test_queue_and_page_survive_off_move_and_on(ordinary: Ordinary) -> None:
    assert (post(ordinary, MESSAGE, 1), post(ordinary, MESSAGE, 2)) == (0, 0)
    there = pages(0)[0]
    ordinary.wrmsr(msrs.SIMP, there)
    ordinary.wrmsr(msrs.SIMP, there + 0x8000 | 1)
    at = there + 0x8000 + SINT * messages.MESSAGE_SLOT_SIZE
    assert ordinary.read(at) & 0xFFFFFFFF == 1
    ordinary.write(at, 0)
    ordinary.wrmsr(msrs.EOM, 0)
    assert ordinary.read(at) & 0xFFFFFFFF == 2


@row("SYN-18", "MSR-13", "MSR-20")
def test_init_resets_the_synic_and_takes_its_pages_and_queue_away(ordinary: Ordinary) -> None:
    simp, siefp, assist = pages(1)
    ordinary.wrmsr(msrs.VP_ASSIST_PAGE, assist | 1, vp=1)
    ordinary.wrmsr(msrs.STIMER0_CONFIG + 1, 1 << 62, vp=1)
    ordinary.wrmsr(msrs.STIMER0_CONFIG, SINT << 16 | 1, vp=1)
    assert [post(ordinary, FAR_MESSAGE, kind) for kind in (1, 2)] == [0, 0]
    assert ordinary.read(simp + SINT * messages.MESSAGE_SLOT_SIZE) & 0xFFFFFFFF == 1
    ordinary.start_vp(1)
    assert post(ordinary, FAR_MESSAGE, 3) == status.INVALID_SYNIC_STATE
    for index in (msrs.SCONTROL, msrs.SIMP, msrs.SIEFP, msrs.VP_ASSIST_PAGE, *range(0x400000B0, 0x400000B8)):
        assert ordinary.rdmsr(index, vp=1) == 0, hex(index)
    assert [ordinary.rdmsr(msrs.SINT0 + n, vp=1) for n in range(16)] == [0x10000] * 16
    for page in (simp, siefp, assist):
        assert ordinary.read(page + SINT * messages.MESSAGE_SLOT_SIZE) == 0, (
            "the guest's own memory is there again"
        )
    assert ordinary.rdmsr(msrs.SCONTROL) == 1, "the other VP's is as it was"
    ordinary.enable_synic(1)
    ordinary.free_slot(SINT, 1)
    ordinary.wrmsr(msrs.EOM, 0, vp=1)
    assert ordinary.slot(SINT, 1)[0] == 0, "what was queued does not survive"


@row("SYN-18")
def test_messages_for_a_vp_that_has_had_init_and_waits_are_refused(ordinary: Ordinary) -> None:
    assert post(ordinary, FAR_MESSAGE, 1) == 0
    assert ordinary.one(g.WRMSR, rcx=0x830, rax=1 << 32 | 0xC500).fault == 0
    ordinary.leave_doorbell(1)
    assert post(ordinary, FAR_MESSAGE, 2) == status.INVALID_SYNIC_STATE
    assert ordinary.read(pages(1)[0] + SINT * messages.MESSAGE_SLOT_SIZE) == 0


@row("SYN-19", "HC-30")
def test_messages_of_a_parent_are_not_the_guests_to_send(ordinary: Ordinary) -> None:
    for code in (hv.POST_MESSAGE_DIRECT, hv.SIGNAL_EVENT_DIRECT):
        assert ordinary.call(code, bytes(280), output=8).status == status.ACCESS_DENIED
    assert ordinary.slot(0)[0] == 0


@row("SYN-16")
def test_port_with_flags_beyond_the_page_cannot_be_made(ordinary: Ordinary) -> None:
    with pytest.raises(HvError) as refused:
        connect(ordinary, 0x50, tlfs.PORT_EVENT, tlfs.EVENT_PORT.pack(EVENT_SINT, 0, 2047, 2, 0))
    assert refused.value.status == status.INVALID_PARAMETER
