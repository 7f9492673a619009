# SPDX-License-Identifier: Apache-2.0
"""A child's memory on a mapper that only takes notes, against a dictionary of pages."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from mmap import mmap
from typing import Any

import pytest

from rootvisor.bus.address_space import AddressError, GuestMemory, MemoryRegion
from rootvisor.hypervisor.child_memory import (
    NO_ACCESS,
    READ_ONLY,
    UNMAPPED,
    WRITABLE,
    ChildMemory,
    NotAccessible,
    address_width,
)
from rootvisor.hypervisor.errors import HvError
from rootvisor.kvm.errors import KvmError
from rootvisor.tlfs import gpa as tlfs
from rootvisor.tlfs import status

PAGE = 4096
RAM_FD = 1000
#: The root: pages 0 .. 0x1000 - 1 and 0x10000 .. 0x10800 - 1, the latter behind the former in the file.
LOW, HIGH_AT, HIGH = 0x1000, 0x10000, 0x800
OWNED = range(0xF00, 0xF10)
READ = tlfs.MAP_READABLE
WRITE = tlfs.MAP_READABLE | tlfs.MAP_WRITABLE
LARGE = tlfs.MAP_LARGE_PAGE


class FakeKvm:
    width = 36

    def supported_cpuid(self) -> list[tuple[int, ...]]:
        return [(0x80000008, 0, 0, self.width, 0, 0, 0)]


class FakeHypervisor:
    def __init__(self) -> None:
        self.kvm = FakeKvm()
        self.deposited: set[int] = set()

    def owns(self, gpn: int, count: int) -> bool:
        pages = range(gpn, gpn + count)
        return not self.deposited.isdisjoint(pages) or not set(OWNED).isdisjoint(pages)


class FakeVm:
    def __init__(self) -> None:
        self.slots: dict[int, tuple[int, int, int, int]] = {}
        self.written: set[int] = set()
        self.refuse_after = 1 << 30

    def set_memory(self, slot: int, gpa: int, size: int, address: int, flags: int = 0) -> None:
        if size:
            self.refuse_after -= 1
            if self.refuse_after == 0:
                raise KvmError("no room")
            for other, (at, length, _, _) in self.slots.items():
                assert other == slot or gpa + size <= at or at + length <= gpa, "slots overlap"
            assert address == FakeReservation.address + gpa
            self.slots[slot] = (gpa, size, address, flags)
        else:
            del self.slots[slot]

    def dirty_log(self, slot: int, size: int) -> bytes:
        """Written pages, by byte and bit; clean again."""
        gpa, length, _, flags = self.slots[slot]
        assert flags == 1, "not logged"
        assert size == (length // PAGE + 63) // 64 * 8
        bits = 0
        for gfn in [gfn for gfn in self.written if gpa <= gfn * PAGE < gpa + length]:
            bits |= 1 << (gfn - gpa // PAGE)
            self.written.remove(gfn)
        return bits.to_bytes(size, "little")


class FakeReservation:
    """Notes of every page; ``limit`` is how many pieces there may be."""

    address = 0x1000_0000_0000

    def __init__(self, size: int) -> None:
        self.size = size
        self.pages: dict[int, tuple[int, int, bool]] = {}
        self.present: set[int] = set()
        self.limit = 1 << 30
        self.calls = 0
        self.closed = False

    def pieces(self) -> int:
        """How many mappings the kernel would have, those without access left out."""
        count = 0
        for gfn, (fd, offset, writable) in self.pages.items():
            count += self.pages.get(gfn - 1) != (fd, offset - PAGE, writable)
        return count

    def _try(self, changed: dict[int, tuple[int, int, bool]]) -> None:
        self.calls += 1
        before = self.pages
        self.pages = changed
        if self.limit < 100 and self.pieces() > self.limit:
            self.pages = before
            raise OSError(errno.ENOMEM, "no room")

    def map_file(self, offset: int, size: int, fd: int, fd_offset: int, writable: bool) -> None:
        assert not (offset | size | fd_offset) % PAGE
        assert size > 0
        assert offset + size <= self.size
        first = offset // PAGE
        new = {first + n: (fd, fd_offset + n * PAGE, writable) for n in range(size // PAGE)}
        self._try({**self.pages, **new})

    def clear(self, offset: int, size: int) -> None:
        assert size > 0
        first, last = offset // PAGE, (offset + size) // PAGE
        self._try({gfn: page for gfn, page in self.pages.items() if not first <= gfn < last})

    forbid = clear

    def touched(self, offset: int, pages: int) -> bytes:
        first = offset // PAGE
        return bytes(gfn in self.present for gfn in range(first, first + pages))

    def untouch(self, offset: int, size: int) -> None:
        self.present -= set(range(offset // PAGE, (offset + size) // PAGE))

    def touch(self, offset: int, size: int) -> None:
        self.present |= set(range(offset // PAGE, (offset + size) // PAGE))

    def close(self) -> None:
        self.closed = True


class Made:
    """A child's memory and what is around it."""

    def __init__(self) -> None:
        self.hypervisor = FakeHypervisor()
        self.vm = FakeVm()
        low, high = mmap(-1, LOW * PAGE), mmap(-1, HIGH * PAGE)
        for page in range(64):
            low[page * PAGE : page * PAGE + 8] = page.to_bytes(8, "little")
        self.root = GuestMemory(
            (
                MemoryRegion(0, LOW * PAGE, memoryview(low), RAM_FD, 0),
                MemoryRegion(HIGH_AT * PAGE, HIGH * PAGE, memoryview(high), RAM_FD, LOW * PAGE),
            )
        )
        self.reservation = FakeReservation(0)
        vm: Any = self.vm
        hypervisor: Any = self.hypervisor
        self.memory = ChildMemory(vm, hypervisor, self.reserve)
        self.memory.bind(self.root)

    def reserve(self, size: int) -> Any:
        self.reservation.size = size
        return self.reservation

    def seen(self, gfn: int) -> tuple[int, bool] | None:
        """(root page, writable) of what is mapped at a page of the child."""
        entry = self.reservation.pages.get(gfn)
        if entry is None or entry[0] != RAM_FD:
            return None
        page = entry[1] // PAGE
        return (page if page < LOW else page - LOW + HIGH_AT), entry[2]


@pytest.fixture
def made() -> Made:
    return Made()


@pytest.fixture
def overlay_fd() -> Iterator[int]:
    fd = os.memfd_create("overlays")
    os.ftruncate(fd, 16 * PAGE)
    os.pwrite(fd, b"overlay", 3 * PAGE)
    yield fd
    os.close(fd)


def expect(code: int, reps: int | None, function: Any, *arguments: Any) -> None:
    with pytest.raises(HvError) as error:
        function(*arguments)
    assert (error.value.status, error.value.reps) == (code, reps)


# --- slots ----------------------------------------------------------------------------------------------------------
def test_two_slots_leave_the_local_apic_alone(made: Made) -> None:
    at = made.reservation.address
    assert list(made.vm.slots.values()) == [
        (0, 0xFEE00000, at, 0),
        (0xFEE01000, (1 << 36) - 0xFEE01000, at + 0xFEE01000, 0),
    ]


def test_width_is_the_processors_up_to_40_bits() -> None:
    assert address_width([(0x80000008, 0, 0, 39, 0, 0, 0)]) == 39
    assert address_width([(0x80000008, 0, 0, 0x3034, 0, 0, 0)]) == 40
    assert address_width([]) == 36


def test_slots_that_kvm_refuses_give_the_addresses_back(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise KvmError("no")

    monkeypatch.setattr(made.vm, "set_memory", refuse)
    vm: Any = made.vm
    hypervisor: Any = made.hypervisor
    with pytest.raises(KvmError):
        ChildMemory(vm, hypervisor, made.reserve)
    assert made.reservation.closed


# --- mapping --------------------------------------------------------------------------------------------------------
def test_consecutive_pages_are_one_piece(made: Made) -> None:
    made.memory.map(0x100, 509, WRITE, tuple(range(0x200, 0x200 + 509)))
    assert made.reservation.calls == 1
    assert made.seen(0x100 + 508) == (0x200 + 508, True)
    assert made.memory.state(0x100000 + 508 * PAGE) == WRITABLE
    assert made.memory.mapped_pages == 509
    assert made.memory.fault_ins == 1


def test_scattered_pages_are_a_piece_for_each_run(made: Made) -> None:
    made.memory.map(0, 6, READ, (5, 6, 7, 2, 1, 0))
    assert made.reservation.calls == 4
    assert [made.seen(gfn) for gfn in range(7)] == [
        (5, False), (6, False), (7, False), (2, False), (1, False), (0, False), None
    ]  # fmt: skip
    assert made.memory.state(5 * PAGE) == READ_ONLY


def test_same_mapping_twice_leaves_the_first_alone(made: Made) -> None:
    pages = (3, 4, 9, 8)
    made.memory.map(16, 4, WRITE, pages)
    calls = made.reservation.calls
    made.memory.map(16, 4, WRITE, pages)
    assert made.reservation.calls == calls
    assert made.memory.mapped_pages == 4


def test_small_pages_replace_a_part_of_a_large_one(made: Made) -> None:
    made.memory.map(512, 2, WRITE | LARGE, (512, 1024))
    assert made.reservation.calls == 1  # two large pages that continue each other
    made.memory.map(600, 2, READ, (7, 8))
    assert made.seen(599) == (599, True)
    assert made.seen(600) == (7, False)
    assert made.seen(602) == (602, True)
    made.memory.map(512, 1, WRITE | LARGE, (512,))
    assert made.seen(600) == (600, True)
    assert made.memory.mapped_pages == 1024


def test_no_access_takes_away_and_remembers(made: Made) -> None:
    made.memory.map(0, 8, WRITE, tuple(range(8)))
    made.memory.map(2, 3, tlfs.MAP_NO_ACCESS, None)
    assert [made.memory.state(gfn * PAGE) for gfn in (1, 2, 4, 5, 8)] == [
        WRITABLE, NO_ACCESS, NO_ACCESS, WRITABLE, UNMAPPED
    ]  # fmt: skip
    assert sorted(made.reservation.pages) == [0, 1, 5, 6, 7]
    assert made.memory.mapped_pages == 5


def test_no_access_of_memory_without_access_costs_no_call(made: Made) -> None:
    for gfn in range(0, 1 << 20, 509):
        made.memory.map(gfn, 509, tlfs.MAP_NO_ACCESS, None)
    made.memory.map(0x1000, 4, tlfs.MAP_NO_ACCESS | LARGE, None)
    assert made.reservation.calls == 0
    assert made.memory.state(0x1000 * PAGE) == NO_ACCESS


def test_unmap_of_a_range_with_holes_forgets_all_of_it(made: Made) -> None:
    made.memory.map(1, 1, WRITE, (1,))
    made.memory.map(3, 1, tlfs.MAP_NO_ACCESS, None)
    made.memory.unmap(0, 8)
    assert {made.memory.state(gfn * PAGE) for gfn in range(8)} == {UNMAPPED}
    assert made.reservation.pages == {}


# --- refusals -------------------------------------------------------------------------------------------------------
def test_page_outside_the_roots_memory_ends_the_call_there(made: Made) -> None:
    expect(status.INVALID_PARAMETER, 2, made.memory.map, 0, 4, WRITE, (LOW - 2, LOW - 1, LOW, LOW + 1))
    assert [made.memory.state(gfn * PAGE) for gfn in range(3)] == [WRITABLE, WRITABLE, UNMAPPED]
    assert made.memory.mapped_pages == 2


@pytest.mark.parametrize("large", [False, True])
def test_page_of_the_hypervisors_own_ends_the_call_there(made: Made, large: bool) -> None:
    if large:
        expect(status.INVALID_PARAMETER, 1, made.memory.map, 0, 2, WRITE | LARGE, (0xC00, 0xE00))
        assert made.memory.mapped_pages == 512
    else:
        expect(status.INVALID_PARAMETER, 3, made.memory.map, 0, 6, WRITE, tuple(range(0xEFD, 0xF03)))
        assert made.memory.mapped_pages == 3


def test_deposited_page_ends_the_call_there(made: Made) -> None:
    made.hypervisor.deposited.update((7, 0x10007))
    expect(status.INVALID_PARAMETER, 2, made.memory.map, 0, 4, WRITE, (5, 6, 7, 8))
    expect(status.INVALID_PARAMETER, 0, made.memory.map, 512, 1, WRITE | LARGE, (HIGH_AT,))
    assert made.memory.state(512 * PAGE) == UNMAPPED


def test_addresses_beyond_the_width_are_refused_before_anything_is_done(made: Made) -> None:
    limit = 1 << 24
    made.memory.map(limit - 1, 1, WRITE, (1,))
    expect(status.INVALID_PARAMETER, 0, made.memory.map, limit - 1, 2, WRITE, (1, 2))
    expect(status.INVALID_PARAMETER, 0, made.memory.map, limit, 1, tlfs.MAP_NO_ACCESS, None)
    expect(status.INVALID_PARAMETER, 0, made.memory.unmap, limit - 1, 2)
    assert made.seen(limit - 1) == (1, True)


def test_pages_beyond_the_gap_of_the_root_come_from_their_place_in_the_file(made: Made) -> None:
    made.memory.map(0, 2, WRITE, (HIGH_AT, HIGH_AT + 1))
    assert made.reservation.pages[1] == (RAM_FD, (LOW + 1) * PAGE, True)


# --- the map count --------------------------------------------------------------------------------------------------
def test_no_room_for_a_piece_leaves_no_half_of_it(made: Made) -> None:
    made.reservation.limit = 2
    expect(status.NO_RESOURCES, 2, made.memory.map, 0, 6, WRITE, (9, 5, 3, 4, 1, 0))
    assert [made.memory.state(gfn * PAGE) for gfn in range(5)] == [
        WRITABLE, WRITABLE, NO_ACCESS, NO_ACCESS, UNMAPPED
    ]  # fmt: skip
    assert sorted(made.reservation.pages) == [0, 1]
    assert made.memory.mapped_pages == 2


def test_revocation_without_room_to_cut_takes_the_whole_piece(made: Made) -> None:
    made.memory.map(0, 8, WRITE, tuple(range(8)))
    made.memory.map(64, 8, WRITE, tuple(range(64, 72)))
    made.reservation.limit = 2
    made.memory.map(3, 1, tlfs.MAP_NO_ACCESS, None)
    assert {made.memory.state(gfn * PAGE) for gfn in range(8)} == {NO_ACCESS}
    assert made.memory.state(64 * PAGE) == WRITABLE
    assert sorted(made.reservation.pages) == list(range(64, 72))
    assert made.memory.mapped_pages == 8


def test_revocation_that_cannot_be_made_stops_everything(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    made.memory.map(0, 8, WRITE, tuple(range(8)))

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOMEM, "no room")

    monkeypatch.setattr(made.reservation, "clear", refuse)
    monkeypatch.setattr(made.reservation, "forbid", refuse)
    with pytest.raises(KvmError):
        made.memory.map(3, 1, tlfs.MAP_NO_ACCESS, None)


# --- overlays -------------------------------------------------------------------------------------------------------
def test_overlay_survives_what_happens_below(made: Made, overlay_fd: int) -> None:
    memory = made.memory
    memory.map(0, 8, WRITE, tuple(range(8)))
    memory.put_overlay(4, overlay_fd, 3 * PAGE, writable=False)
    assert memory.overlaid(4 * PAGE + 5)
    assert memory.state(4 * PAGE) == READ_ONLY
    actions: tuple[Callable[[], None], ...] = (
        lambda: memory.map(0, 8, READ, tuple(range(16, 24))),
        lambda: memory.map(0, 8, tlfs.MAP_NO_ACCESS, None),
        lambda: memory.unmap(0, 8),
        lambda: memory.map(0, 8, WRITE, tuple(range(32, 40))),
    )
    for action in actions:
        action()
        assert made.reservation.pages[4] == (overlay_fd, 3 * PAGE, False)
        page = memory.page(4)
        assert page is not None
        assert bytes(page[:7]) == b"overlay"
    memory.remove_overlay(4)
    assert made.seen(4) == (36, True)
    assert not memory.overlaid(4 * PAGE)


def test_overlay_over_nothing_leaves_nothing(made: Made, overlay_fd: int) -> None:
    made.memory.put_overlay(4, overlay_fd, 0)
    assert made.memory.state(4 * PAGE) == WRITABLE
    made.memory.remove_overlay(4)
    made.memory.remove_overlay(4)
    assert made.memory.state(4 * PAGE) == UNMAPPED
    assert made.reservation.pages == {}


def test_overlay_in_place_of_an_overlay(made: Made, overlay_fd: int) -> None:
    made.memory.put_overlay(4, overlay_fd, 0)
    made.memory.put_overlay(4, overlay_fd, 3 * PAGE)
    assert made.memory.read(4 * PAGE, 7) == b"overlay"
    made.memory.write(4 * PAGE, b"O")
    assert os.pread(overlay_fd, 2, 3 * PAGE) == b"Ov"
    made.memory.remove_overlay(4)
    assert made.memory.state(4 * PAGE) == UNMAPPED


def test_overlay_without_room_is_refused(made: Made, overlay_fd: int) -> None:
    made.reservation.limit = 0
    with pytest.raises(KvmError):
        made.memory.put_overlay(4, overlay_fd, 0)
    assert made.memory.state(4 * PAGE) == UNMAPPED


# --- reading and writing --------------------------------------------------------------------------------------------
def test_view_names_the_exact_byte_and_what_is_missing(made: Made) -> None:
    made.memory.map(0, 1, READ, (9,))
    made.memory.map(1, 1, tlfs.MAP_NO_ACCESS, None)
    for gpa, write, state in ((5, True, READ_ONLY), (PAGE + 7, True, NO_ACCESS), (2 * PAGE, True, UNMAPPED)):
        with pytest.raises(NotAccessible) as error:
            made.memory.view(gpa, 4)
        assert (error.value.gpa, error.value.write, error.value.state) == (gpa, write, state)
    with pytest.raises(AddressError):
        made.memory.view(PAGE - 2, 4)


def test_read_crosses_pages_and_names_the_first_byte_that_is_missing(made: Made) -> None:
    made.memory.map(0, 2, READ, (9, 3))
    assert made.memory.read(PAGE - 1, 2) == b"\0\3"
    with pytest.raises(NotAccessible) as error:
        made.memory.read(2 * PAGE - 4, 8)
    assert (error.value.gpa, error.value.write, error.value.state) == (2 * PAGE, False, UNMAPPED)


def test_write_is_all_or_nothing(made: Made) -> None:
    made.memory.map(0, 2, WRITE, (9, 3))
    made.memory.write(PAGE - 2, b"abcd")
    assert bytes(made.root.view(9 * PAGE + PAGE - 2, 2)) == b"ab"
    assert bytes(made.root.view(3 * PAGE, 2)) == b"cd"
    with pytest.raises(NotAccessible) as error:
        made.memory.write(2 * PAGE - 2, b"wxyz")
    assert (error.value.gpa, error.value.write) == (2 * PAGE, True)
    assert bytes(made.root.view(3 * PAGE + PAGE - 2, 2)) == b"\0\0"


def test_beyond_the_address_space_nothing_is_mapped(made: Made) -> None:
    assert made.memory.state(1 << 60) == UNMAPPED
    assert made.memory.page(1 << 50) is None


# --- access states --------------------------------------------------------------------------------------------------
CLEAR, SET = tlfs.ACCESS_CLEAR_DIRTY, tlfs.ACCESS_SET_DIRTY
DIRTY, ACCESSED = tlfs.STATE_DIRTY, tlfs.STATE_ACCESSED


def test_tracking_logs_what_is_mapped_and_nothing_else(made: Made) -> None:
    memory = made.memory
    gib4 = 1 << 20
    memory.map(0, 0xA0, tlfs.MAP_NO_ACCESS, None)
    memory.map(0x100, 0xFEF00 - 0x100, tlfs.MAP_NO_ACCESS, None)
    memory.map(gib4, 5, WRITE, (1, 2, 3, 4, 5))
    memory.start_tracking()
    slots = sorted(made.vm.slots.values())
    assert sum(size for _, size, _, _ in slots) == (1 << 36) - PAGE
    assert not [gpa for gpa, size, _, _ in slots if gpa <= 0xFEE00000 < gpa + size]
    logged = [(gpa // PAGE, (gpa + size) // PAGE) for gpa, size, _, flags in slots if flags]
    assert logged[0] == (0, 1 << 15)  # parts of 128 MiB; the gap of VGA memory is logged too
    assert logged[-3:] == [(0xF8000, 0xFEE00), (0xFEE01, 0xFEF00), (gib4, gib4 + 5)]
    memory.stop_tracking()
    assert [slot[:2] for slot in made.vm.slots.values()] == [
        (0, 0xFEE00000), (0xFEE01000, (1 << 36) - 0xFEE01000)
    ]  # fmt: skip
    assert memory.dirty is None


def test_dirty_is_from_before_the_change(made: Made) -> None:
    memory = made.memory
    memory.map(8, 4, WRITE, (1, 2, 3, 4))
    assert memory.access_states(6, 8, 0) == bytes(8)
    memory.start_tracking()
    made.vm.written.add(9)
    assert memory.access_states(6, 8, CLEAR) == bytes((0, 0, 0, DIRTY, 0, 0, 0, 0))
    assert memory.access_states(6, 8, SET) == bytes(8)
    assert memory.access_states(6, 8, 0) == bytes((0, 0, DIRTY, DIRTY, DIRTY, DIRTY, 0, 0))
    made.vm.written.add(10)
    memory.access_states(6, 8, CLEAR)
    assert memory.access_states(6, 8, 0) == bytes(8)
    made.vm.written.add(8)
    memory.start_tracking()
    made.vm.written.clear()
    assert memory.access_states(6, 8, 0) == bytes(8)


def test_dirty_survives_revocation_and_another_mapping(made: Made) -> None:
    memory = made.memory
    memory.map(8, 2, WRITE, (1, 2))
    memory.start_tracking()
    made.vm.written.add(8)
    memory.map(8, 2, tlfs.MAP_NO_ACCESS, None)
    assert memory.access_states(8, 2, 0) == bytes((DIRTY, 0))
    memory.unmap(8, 2)
    assert memory.access_states(8, 2, CLEAR) == bytes(2)
    memory.map(8, 2, WRITE, (5, 6))
    assert memory.access_states(8, 2, CLEAR) == bytes((DIRTY, 0))
    assert memory.access_states(8, 2, 0) == bytes(2)


def test_what_the_hypervisor_writes_is_dirty(made: Made) -> None:
    memory = made.memory
    memory.map(8, 3, WRITE, (1, 2, 3))
    memory.start_tracking()
    memory.write(9 * PAGE - 1, b"ab")
    assert memory.access_states(8, 3, 0) == bytes((DIRTY, DIRTY, 0))


def test_writable_memory_that_came_later_counts_as_dirty(made: Made) -> None:
    memory = made.memory
    memory.map(8, 1, WRITE, (1,))
    memory.start_tracking()
    memory.map(0x10000, 1, WRITE, (2,))
    memory.map(0x10001, 1, READ, (3,))
    assert memory.access_states(0xFFFF, 4, CLEAR) == bytes((0, DIRTY, 0, 0))
    assert memory.access_states(8, 1, 0) == bytes(1)


def test_huge_children_get_larger_parts(made: Made) -> None:
    for gfn in range(0x100000, 0x1000000, 1 << 20):
        made.memory.map(gfn, 1 << 11, tlfs.MAP_NO_ACCESS | LARGE, None)
    made.memory.start_tracking()
    assert 200 < len(made.vm.slots) < 600


@pytest.mark.parametrize("after", [1, 2, 3])
def test_tracking_without_room_is_refused_and_leaves_the_memory(made: Made, after: int) -> None:
    made.memory.map(8, 1, WRITE, (1,))
    before = dict(made.vm.slots)
    made.vm.refuse_after = after
    expect(status.NO_RESOURCES, None, made.memory.start_tracking)
    assert made.vm.slots == before
    assert made.memory.dirty is None


def test_accessed_is_what_lies_in_the_page_tables(made: Made) -> None:
    memory = made.memory
    memory.map(8, 4, WRITE, (1, 2, 3, 4))
    memory.map(12, 1, tlfs.MAP_NO_ACCESS, None)
    made.reservation.present |= {7, 9, 12}
    assert memory.access_states(7, 6, tlfs.ACCESS_CLEAR_ACCESSED) == bytes((0, 0, ACCESSED, 0, 0, 0))
    assert memory.access_states(7, 6, tlfs.ACCESS_SET_ACCESSED) == bytes(6)
    assert memory.access_states(7, 6, 0) == bytes((0, *[ACCESSED] * 4, 0))


def test_access_states_far_outside_are_zero(made: Made) -> None:
    made.memory.start_tracking()
    assert made.memory.access_states((1 << 24) - 2, 9, 0xF) == bytes(9)
    assert made.memory.access_states(1 << 40, 9, 0xF) == bytes(9)


# --- the end --------------------------------------------------------------------------------------------------------
def test_clear_takes_everything_away(made: Made, overlay_fd: int) -> None:
    made.memory.map(0, 3, WRITE, (5, 7, 9))
    made.memory.put_overlay(1, overlay_fd, 0)
    made.memory.clear()
    assert made.reservation.pages == {}
    assert {made.memory.state(gfn * PAGE) for gfn in range(3)} == {UNMAPPED}
    assert made.memory.mapped_pages == 0
    made.memory.close()
    assert made.reservation.closed


def test_uses_finds_pages_that_lie_in_the_child(made: Made) -> None:
    made.memory.map(100, 4, WRITE, (5, 6, 7, 20))
    assert made.memory.uses([1, 6])
    assert made.memory.uses([20])
    assert not made.memory.uses([4, 8, 19, 21])
    assert not made.memory.uses([])


# --- all together ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(9))
def test_random_calls_agree_with_a_dictionary(seed: int, overlay_fd: int) -> None:
    """States, what is mapped, counts: after every call, with and without a limit to the pieces."""
    chance = random.Random(seed)
    made = Made()
    memory = made.memory
    space = 1600
    model: dict[int, tuple[int, int]] = {}
    overlays: dict[int, tuple[int, bool]] = {}
    made.hypervisor.deposited.update(range(0x300, 0x304))
    if seed % 3 == 2:
        made.reservation.limit = 40
    taken = made.hypervisor.deposited | set(OWNED)
    for _ in range(120):
        action = chance.random()
        gfn = chance.randrange(space)
        count = chance.choice((1, 1, 2, 9, 509))
        if action < 0.5:
            unit = 1
            flags = chance.choice((READ, WRITE))
            if chance.random() < 0.2:
                unit, flags, gfn, count = 512, flags | LARGE, gfn & -512, chance.choice((1, 2))
                pages = tuple(512 * chance.randrange(9) for _ in range(count))
            elif chance.random() < 0.7:
                first = chance.choice((gfn & 0xFF, chance.randrange(LOW), HIGH_AT + chance.randrange(HIGH)))
                pages = tuple(range(first, first + count))
            else:
                pages = tuple(chance.randrange(LOW) for _ in range(count))
            done, code = count, 0
            try:
                memory.map(gfn, count, flags, pages)
            except HvError as error:
                assert error.reps is not None
                done, code = error.reps, error.status
            state = WRITABLE if flags & tlfs.MAP_WRITABLE else READ_ONLY
            for index, page in enumerate(pages[:done]):
                for inside in range(unit):
                    assert page + inside not in taken
                    model[gfn + index * unit + inside] = (state, page + inside)
            if code == status.INVALID_PARAMETER:
                wrong = range(pages[done], pages[done] + unit)
                assert any(page in taken or LOW <= page < HIGH_AT or page >= HIGH_AT + HIGH for page in wrong)
            elif code:
                assert code == status.NO_RESOURCES
        elif action < 0.75:
            memory.map(gfn, count, tlfs.MAP_NO_ACCESS, None)
            model.update(dict.fromkeys(range(gfn, gfn + count), (NO_ACCESS, -1)))
        elif action < 0.85:
            memory.unmap(gfn, count)
            for page in range(gfn, gfn + count):
                model.pop(page, None)
        elif action < 0.95:
            entry = chance.randrange(16) * PAGE, chance.random() < 0.5
            try:
                memory.put_overlay(gfn, overlay_fd, *entry)
                overlays[gfn] = entry
            except KvmError:
                assert made.reservation.limit < 100
        elif overlays:
            gfn = chance.choice(list(overlays))
            memory.remove_overlay(gfn)
            del overlays[gfn]
        compare(made, model, overlays, overlay_fd, space + 1200)


def compare(
    made: Made,
    model: dict[int, tuple[int, int]],
    overlays: dict[int, tuple[int, bool]],
    overlay_fd: int,
    space: int,
) -> None:
    """Where pieces are limited, pages may have lost access, and overlays may be gone; what is there must be right."""
    limited = made.reservation.limit < 100
    for gfn in range(space):
        seen = made.reservation.pages.get(gfn)
        found = made.memory.state(gfn * PAGE)
        if gfn in overlays and limited and not made.memory.overlaid(gfn * PAGE):
            del overlays[gfn]
        if gfn in overlays:
            offset, writable = overlays[gfn]
            assert seen == (overlay_fd, offset, writable)
            assert found == (WRITABLE if writable else READ_ONLY)
            continue
        state, page = model.get(gfn, (UNMAPPED, -1))
        if limited and state != found:
            assert found == NO_ACCESS
            state, page = model[gfn] = NO_ACCESS, -1
        assert found == state
        assert made.seen(gfn) == ((page, state == WRITABLE) if state >= READ_ONLY else None)
    # Pages under an overlay are mapped too, as far as the root is concerned.
    assert made.memory.mapped_pages >= sum(
        state >= READ_ONLY for gfn, (state, _) in model.items() if gfn not in overlays
    )
    if not limited:
        assert made.memory.mapped_pages == sum(state >= READ_ONLY for state, _ in model.values())
