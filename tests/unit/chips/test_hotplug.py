# SPDX-License-Identifier: Apache-2.0
"""General-purpose events, and the registers of slots whose functions come and go."""

from __future__ import annotations

import marshal
from random import Random

import pytest

from rootvisor.chips.hotplug import GPE_BYTES, REGISTER_BYTES, GeneralEvents, PciSlots

INSERTED, EJECT_ASKED, EJECT = 0, 4, 8
EVENT = 1 << 1


class Board:
    def __init__(self) -> None:
        self.levels: list[int] = []
        self.ejected: list[int] = []
        self.events = GeneralEvents(self.levels.append)
        self.slots = PciSlots(self.events, self.ejected.append)


@pytest.fixture
def board() -> Board:
    return Board()


def test_event_interrupts_when_it_is_enabled_until_it_is_acknowledged(board: Board) -> None:
    board.slots.inserted(5)
    assert board.levels[-1] == 0
    board.events.write(2, 1, EVENT)
    assert board.levels[-1] == 1 and board.events.read(0, 1) == EVENT
    board.events.write(0, 1, EVENT)
    assert board.levels[-1] == 0 and board.events.read(0, 1) == 0


def test_acknowledgement_clears_only_the_bits_that_are_written(board: Board) -> None:
    board.events.raise_event(0x103)
    board.events.write(0, 1, 0x01)
    assert board.events.read(0, 2) == 0x102
    board.events.write(1, 1, 0x01)
    assert board.events.read(0, 2) == 0x002


def test_enable_bits_read_back_and_clear_no_status(board: Board) -> None:
    board.events.raise_event(EVENT)
    board.events.write(2, 2, 0xFFFF)
    board.events.write(3, 1, 0)
    assert board.events.read(0, 4) == 0x00FF << 16 | EVENT


@pytest.mark.parametrize("slot", [0, 1, 31])
def test_slots_are_told_once(board: Board, slot: int) -> None:
    board.slots.inserted(slot)
    assert board.slots.read(EJECT_ASKED, 4) == 0
    assert board.slots.read(INSERTED, 4) == 1 << slot
    assert board.slots.read(INSERTED, 4) == 0
    board.slots.ask_to_eject(slot)
    assert board.slots.read(EJECT_ASKED, 4) == 1 << slot
    assert board.slots.read(EJECT_ASKED, 4) == 0


def test_two_changes_before_the_first_read_are_both_told(board: Board) -> None:
    board.slots.inserted(2)
    board.slots.inserted(9)
    assert board.slots.read(INSERTED, 4) == 1 << 2 | 1 << 9


def test_eject_names_every_slot_that_is_written(board: Board) -> None:
    board.slots.write(EJECT, 4, 1 << 3 | 1 << 30)
    assert board.ejected == [3, 30]
    assert board.slots.read(EJECT, 4) == 0


@pytest.mark.parametrize(("offset", "size"), [(8, 1), (8, 2), (9, 4), (0, 4), (4, 4), (10, 4)])
def test_write_that_is_no_whole_eject_register_ejects_nothing(board: Board, offset: int, size: int) -> None:
    board.slots.write(offset, size, (1 << size * 8) - 1)
    assert board.ejected == []


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (1, 4), (2, 2), (4, 1), (9, 1)])
def test_partial_read_loses_nothing(board: Board, offset: int, size: int) -> None:
    board.slots.inserted(1)
    board.slots.ask_to_eject(2)
    assert board.slots.read(offset, size) == 0
    assert (board.slots.read(INSERTED, 4), board.slots.read(EJECT_ASKED, 4)) == (2, 4)


def test_saved_state_has_what_was_not_read(board: Board) -> None:
    board.events.write(2, 2, EVENT)
    board.slots.inserted(4)
    board.slots.ask_to_eject(6)
    events, slots = (marshal.loads(marshal.dumps(one.save())) for one in (board.events, board.slots))
    other = Board()
    other.events.restore(events)
    other.slots.restore(slots)
    assert other.events.read(0, 4) == EVENT << 16 | EVENT
    assert (other.slots.read(INSERTED, 4), other.slots.read(EJECT_ASKED, 4)) == (1 << 4, 1 << 6)


def test_any_access_gives_a_value_of_its_size(board: Board) -> None:
    random = Random(8)
    for _ in range(20_000):
        size = random.choice((1, 2, 4))
        chip, end = random.choice(((board.events, GPE_BYTES), (board.slots, REGISTER_BYTES)))
        offset = random.randrange(end)
        if random.getrandbits(1):
            chip.write(offset, size, random.getrandbits(8 * size))
        else:
            assert 0 <= chip.read(offset, size) < 1 << 8 * size
    assert all(0 <= number < 32 for number in board.ejected)
