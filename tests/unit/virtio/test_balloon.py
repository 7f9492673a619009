# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from rootvisor.virtio import balloon
from rootvisor.virtio.balloon import Balloon
from rootvisor.virtio.registers import F_INDIRECT_DESC, F_RING_PACKED, F_VERSION_1, STATUS_NEEDS_RESET
from tests.unit.virtio.guest_side import RAM_BASE, RAM_BYTES, Guest, wait_until

PAGE = 4096
FIRST = RAM_BASE // PAGE
LAST = (RAM_BASE + RAM_BYTES) // PAGE
ALL = F_VERSION_1 | balloon.F_STATS_VQ | balloon.F_REPORTING


class Side:
    """A guest with a balloon, and what it gave back."""

    def __init__(self, features: int, *, statistics: bool = True) -> None:
        self.given: list[tuple[int, int]] = []
        self.device = Balloon(
            8 * PAGE, lambda gpa, size: self.given.append((gpa, size)), statistics=statistics
        )
        self.guest = Guest(self.device)
        self.guest.start(features, [128] * len(self.device.queue_sizes))

    def pages(self, queue: int, *numbers: int) -> None:
        data = struct.pack(f"<{len(numbers)}I", *numbers)
        assert self.guest.request(queue, [(self.guest.memory.place(data), len(data), False)]) == 0


@pytest.fixture(params=[0, F_RING_PACKED], ids=["split", "packed"])
def side(request: pytest.FixtureRequest) -> Iterator[Side]:
    side = Side(ALL | request.param)
    yield side
    side.guest.close()


def test_config_tells_the_wish_and_hears_the_answer(side: Side) -> None:
    guest = side.guest
    assert guest.config_read(0, 4) == 0x1045 << 16 | 0x1AF4
    assert guest.read(0x100, 4) == 8
    side.device.resize(100 * PAGE)
    assert guest.read(0x100, 4) == 100 and guest.vectors[0].count == 1
    guest.write(0x104, 4, 60)
    assert guest.read(0x104, 4) == 60
    assert (side.device.size, side.device.actual) == (100 * PAGE, 60 * PAGE)
    guest.write(20, 1, 0)
    assert side.device.actual == 0 and side.device.size == 100 * PAGE


def test_pages_are_given_back_in_runs(side: Side) -> None:
    side.pages(0, FIRST + 5, FIRST + 3, FIRST + 4, FIRST + 9, FIRST + 4)
    assert side.given == [(RAM_BASE + 3 * PAGE, 3 * PAGE), (RAM_BASE + 9 * PAGE, PAGE)]
    assert side.device.counters[0].bytes == 4 * PAGE


def test_pages_out_of_the_balloon_need_nothing(side: Side) -> None:
    side.pages(1, FIRST, FIRST + 1)
    assert not side.given


def test_pages_outside_ram_are_left_alone(side: Side) -> None:
    side.pages(0, FIRST - 1, FIRST, LAST - 1, LAST, 0, 0xFFFFFFFF)
    assert side.given == [(RAM_BASE, PAGE), (RAM_BASE + RAM_BYTES - PAGE, PAGE)]


def test_free_pages_that_the_guest_reports_are_given_back(side: Side) -> None:
    one, two = RAM_BASE + 512 * PAGE, RAM_BASE + 768 * PAGE
    side.guest.request(3, [(one, 128 * PAGE, True), (two, PAGE, True)])
    assert side.given == [(one, 128 * PAGE), (two, PAGE)]
    side.guest.request(3, [(one + 1, PAGE, True), (two, 100, True)])
    assert len(side.given) == 2


def test_free_pages_take_the_next_queue_without_statistics() -> None:
    side = Side(F_VERSION_1 | balloon.F_REPORTING | F_INDIRECT_DESC, statistics=False)
    assert len(side.device.queue_sizes) == 3
    side.guest.request(2, [(RAM_BASE + 512 * PAGE, PAGE, True)], indirect=True)
    assert side.given == [(RAM_BASE + 512 * PAGE, PAGE)]
    side.guest.close()
    # The same when the driver does without statistics that are offered.
    side = Side(F_VERSION_1 | balloon.F_REPORTING)
    side.guest.request(2, [(RAM_BASE + 512 * PAGE, PAGE, True)])
    assert side.given == [(RAM_BASE + 512 * PAGE, PAGE)]
    side.guest.close()


def test_statistics_come_when_asked_for(side: Side) -> None:
    guest, device = side.guest, side.device
    told: list[dict[str, int]] = []
    place = guest.memory.allocate(20)

    def fill(free: int) -> None:
        guest.memory.view(place, 20)[:] = struct.pack("<HQHQ", 4, free, 99, 1)

    fill(1000)
    ring = guest.rings[2]
    head = ring.add([(place, 20, False)])
    guest.kick(2)
    wait_until(lambda: device.statistics == {"free_memory": 1000})
    assert not ring.used()
    for number, free in ((1, 2000), (2, 3000)):
        device.request_statistics(told.append)
        wait_until(lambda: bool(guest.vectors[1].count))
        assert ring.used() == [(head, 0)]
        fill(free)
        head = ring.add([(place, 20, False)])
        guest.kick(2)
        wait_until(lambda count=number: len(told) == count)  # type: ignore[misc]
        assert told[-1] == device.statistics == {"free_memory": free}


def test_request_with_too_many_pages_needs_reset(side: Side) -> None:
    place = side.guest.memory.allocate(1 << 19)
    side.guest.rings[0].add([(place, 1 << 19, False)])
    side.guest.kick(0)
    wait_until(lambda: bool(side.guest.status & STATUS_NEEDS_RESET))


@pytest.mark.parametrize("size", [-1, 1 << 45])
def test_size_that_cannot_be_is_value_error(side: Side, size: int) -> None:
    with pytest.raises(ValueError, match="cannot have"):
        side.device.resize(size)
