# SPDX-License-Identifier: Apache-2.0
"""The SynIC alone: slots, queues, the race for a slot."""

from __future__ import annotations

import mmap

import pytest

from rootvisor.bus.address_space import GuestMemory, MemoryRegion
from rootvisor.hypervisor.errors import GeneralProtection, HvError
from rootvisor.hypervisor.overlay import OwnedPages
from rootvisor.hypervisor.synic import QUEUE_LIMIT, Synic
from rootvisor.tlfs import msrs, status


class Fixture:
    def __init__(self) -> None:
        memory = GuestMemory((MemoryRegion(0, 0x4000, memoryview(mmap.mmap(-1, 0x4000)), -1, 0),))
        pages = OwnedPages(memory, 0, 4)
        self.vectors: list[int] = []
        self.synic = Synic(pages.allocate(), pages.allocate(), pages.allocate(), self.vectors.append)
        for page in (self.synic.simp, self.synic.siefp):
            page.write(page.value | 1)
        self.synic.scontrol = 1
        self.synic.write_sint(0, 0xF3)

    def kind(self, sint: int = 0) -> int:
        return int.from_bytes(self.synic.simp.view[sint * 256 : sint * 256 + 4], "little")

    def free(self, sint: int = 0) -> None:
        self.synic.simp.view[sint * 256 : sint * 256 + 4] = bytes(4)


@pytest.fixture
def made() -> Fixture:
    return Fixture()


def test_queue_holds_its_limit_behind_the_slot(made: Fixture) -> None:
    for number in range(1, QUEUE_LIMIT + 2):
        made.synic.post_message(0, number, 0, b"")
    with pytest.raises(HvError) as refused:
        made.synic.post_message(0, 99, 0, b"")
    assert refused.value.status == status.INSUFFICIENT_BUFFERS
    seen = []
    while made.kind():
        seen.append(made.kind())
        made.free()
        made.synic.end_of_message()
    assert seen == list(range(1, QUEUE_LIMIT + 2))
    assert made.vectors == [0xF3] * (QUEUE_LIMIT + 1)


def test_pending_flag_tells_whether_more_wait(made: Fixture) -> None:
    for number in (1, 2, 3):
        made.synic.post_message(0, number, 0, b"")
    flags = []
    for _ in range(3):
        flags.append(made.synic.simp.view[5])
        made.free()
        made.synic.end_of_message()
    assert flags == [1, 1, 0]


def test_queues_of_sints_are_apart(made: Fixture) -> None:
    made.synic.write_sint(7, 0x80)
    made.synic.post_message(0, 1, 0, b"")
    made.synic.post_message(7, 2, 0, b"")
    assert (made.kind(0), made.kind(7)) == (1, 2)
    assert made.vectors == [0xF3, 0x80]


def test_sint_vector_below_16(made: Fixture) -> None:
    with pytest.raises(GeneralProtection):
        made.synic.write_sint(0, 15)
    made.synic.write_sint(0, msrs.SINT_MASKED | 15)


def test_reset_empties_everything(made: Fixture) -> None:
    made.synic.post_message(0, 1, 0, b"")
    made.synic.post_message(0, 2, 0, b"")
    made.synic.reset()
    assert made.synic.scontrol == 0
    assert made.synic.sints == [msrs.SINT_MASKED] * 16
    assert not made.synic.simp.enabled
    made.free()
    made.synic.simp.write(made.synic.simp.value | 1)
    made.synic.scontrol = 1
    made.synic.end_of_message()
    assert made.kind() == 0


def test_direct_message_is_placed_or_refused(made: Fixture) -> None:
    message = (5).to_bytes(4, "little") + b"\4" + bytes(11) + b"ding"
    made.synic.post_message_direct(0, message)
    assert bytes(made.synic.simp.view[:20]) == message
    with pytest.raises(HvError) as refused:
        made.synic.post_message_direct(0, message)
    assert refused.value.status == status.OBJECT_IN_USE
    assert made.synic.simp.view[5] == 1, "the guest will write EOM"
    made.free()
    made.synic.post_message_direct(0, message)
    assert made.vectors == [0xF3, 0xF3]


def test_direct_message_does_not_overtake_the_queue(made: Fixture) -> None:
    made.synic.post_message(0, 1, 0, b"")
    made.synic.post_message(0, 2, 0, b"")
    made.free()
    with pytest.raises(HvError):
        made.synic.post_message_direct(0, b"\1" + bytes(15))


def test_deliverable_sints_are_asked_for_once(made: Fixture) -> None:
    made.synic.notify_sints = 0b1001
    made.synic.post_message(0, 1, 0, b"")
    assert made.synic.take_deliverable() == 0b1000
    assert made.synic.take_deliverable() == 0
    assert made.synic.notify_sints == 1
    assert made.synic.simp.view[5] == 1
    made.free()
    assert made.synic.take_deliverable() == 1
    assert made.synic.notify_sints == 0


def test_deliverable_waits_for_the_synic(made: Fixture) -> None:
    made.synic.notify_sints = 1
    made.synic.write_scontrol(0)
    assert made.synic.take_deliverable() == 0
    made.synic.write_scontrol(1)
    assert made.synic.take_deliverable() == 1


def test_event_flag_tells_whether_it_was_clear(made: Fixture) -> None:
    assert made.synic.set_event_flag(0, 2047)
    assert not made.synic.set_event_flag(0, 2047)
    assert made.synic.siefp.view[255] == 0x80
    assert made.vectors == [0xF3]
    made.synic.write_sint(0, msrs.SINT_MASKED)
    assert made.synic.set_event_flag(0, 1)
    assert made.vectors == [0xF3]


@pytest.mark.parametrize(("sint", "flag"), [(16, 0), (-1, 0), (0, 2048), (0, -1)])
def test_event_flag_that_does_not_exist(made: Fixture, sint: int, flag: int) -> None:
    with pytest.raises(HvError) as refused:
        made.synic.set_event_flag(sint, flag)
    assert refused.value.status == status.INVALID_PARAMETER
