# SPDX-License-Identifier: Apache-2.0
"""The I/O APIC as drivers and devices meet it."""

from __future__ import annotations

import marshal
import queue
import random
import threading

import pytest

from rootvisor.chips.ioapic import EXTINT, FIXED, INIT, LOWEST_PRIORITY, NMI, PINS, SMI, IoApic

INDEX, WINDOW, EOI = 0x00, 0x10, 0x40
LEVEL, MASKED, REMOTE_IRR, LOGICAL = 1 << 15, 1 << 16, 1 << 14, 1 << 11


class Board:
    def __init__(self) -> None:
        self.messages: list[tuple[int, bool, int, int, bool]] = []
        self.chip = IoApic(lambda *message: self.messages.append(message), 2)

    def read(self, index: int) -> int:
        self.chip.write(INDEX, 4, index)
        return self.chip.read(WINDOW, 4)

    def write(self, index: int, value: int) -> None:
        self.chip.write(INDEX, 4, index)
        self.chip.write(WINDOW, 4, value)

    def route(self, pin: int, low: int, destination: int = 0) -> None:
        self.write(0x11 + 2 * pin, destination << 24)
        self.write(0x10 + 2 * pin, low)

    def entry(self, pin: int) -> int:
        return self.read(0x10 + 2 * pin) | self.read(0x11 + 2 * pin) << 32

    @property
    def vectors(self) -> list[int]:
        return [message[3] for message in self.messages]


@pytest.fixture
def board() -> Board:
    return Board()


def test_identity(board: Board) -> None:
    assert board.read(0) == 2 << 24
    assert board.read(1) == 0x0017_0020
    assert board.read(2) == 2 << 24
    board.write(0, 0xFFFF_FFFF)
    assert board.read(0) == 0x0F00_0000
    board.write(1, 0)
    assert board.read(1) == 0x0017_0020


def test_entries_are_masked_after_reset(board: Board) -> None:
    assert [board.entry(pin) for pin in range(PINS)] == [MASKED] * PINS
    for pin in range(PINS):
        board.chip.set_pin(pin, 1)
    assert board.messages == []


def test_reserved_and_read_only_bits_of_an_entry_stay_clear(board: Board) -> None:
    board.write(0x10, 0xFFFF_FFFF)
    board.write(0x11, 0xFFFF_FFFF)
    assert board.entry(0) == 0xFF00_0000_0001_AFFF


def test_index_beyond_the_registers_reads_as_zero(board: Board) -> None:
    for index in (3, 0xF, 0x40, 0xFF):
        board.write(index, 0xFFFF_FFFF)
        assert board.read(index) == 0


def test_narrow_accesses(board: Board) -> None:
    board.chip.write(INDEX, 1, 1)
    assert board.chip.read(INDEX, 1) == 1
    assert [board.chip.read(WINDOW + n, 1) for n in range(4)] == [0x20, 0, 0x17, 0]
    assert board.chip.read(WINDOW, 8) == 0x0017_0020
    board.chip.write(INDEX, 1, 0x10)
    board.chip.write(WINDOW, 2, 0x30)
    assert board.chip.read(WINDOW, 4) == MASKED, "the window takes whole registers only"
    assert board.chip.read(0x20, 4) == 0
    board.chip.write(0x20, 4, 1)


def test_edge_is_delivered_once_per_assertion(board: Board) -> None:
    board.route(4, 0x34, destination=3)
    board.chip.set_pin(4, 1)
    board.chip.set_pin(4, 1)
    assert board.messages == [(3, False, FIXED, 0x34, False)]
    board.chip.set_pin(4, 0)
    board.chip.set_pin(4, 1)
    assert len(board.messages) == 2
    assert not board.entry(4) & REMOTE_IRR


def test_edge_on_a_masked_pin_is_lost(board: Board) -> None:
    board.route(4, 0x34 | MASKED)
    board.chip.set_pin(4, 1)
    board.route(4, 0x34)
    assert board.messages == []
    board.chip.set_pin(4, 0)
    board.chip.set_pin(4, 1)
    assert board.vectors == [0x34]


def test_level_waits_for_eoi_before_it_asks_again(board: Board) -> None:
    board.route(9, 0x39 | LEVEL | LOGICAL | LOWEST_PRIORITY << 8, destination=0xFF)
    board.chip.set_pin(9, 1)
    assert board.messages == [(0xFF, True, LOWEST_PRIORITY, 0x39, True)]
    assert board.entry(9) & REMOTE_IRR
    board.chip.set_pin(9, 0)
    board.chip.set_pin(9, 1)
    assert board.vectors == [0x39]
    board.chip.eoi(0x39)
    assert board.vectors == [0x39, 0x39]
    assert board.entry(9) & REMOTE_IRR
    board.chip.set_pin(9, 0)
    board.chip.eoi(0x39)
    assert board.vectors == [0x39, 0x39]
    assert not board.entry(9) & REMOTE_IRR


def test_eoi_of_another_vector_does_nothing(board: Board) -> None:
    board.route(9, 0x39 | LEVEL)
    board.chip.set_pin(9, 1)
    board.chip.eoi(0x3A)
    assert board.vectors == [0x39]
    assert board.entry(9) & REMOTE_IRR


def test_eoi_ends_every_pin_of_the_vector(board: Board) -> None:
    for pin in (10, 11):
        board.route(pin, 0x40 | LEVEL)
        board.chip.set_pin(pin, 1)
    board.chip.set_pin(10, 0)
    board.chip.eoi(0x40)
    assert board.vectors == [0x40, 0x40, 0x40]
    assert not board.entry(10) & REMOTE_IRR
    assert board.entry(11) & REMOTE_IRR


def test_eoi_register(board: Board) -> None:
    board.route(9, 0x39 | LEVEL)
    board.chip.set_pin(9, 1)
    board.chip.write(EOI, 4, 0x39)
    assert board.vectors == [0x39, 0x39]
    assert board.chip.read(EOI, 4) == 0


def test_level_that_is_asserted_while_masked_is_delivered_at_unmask(board: Board) -> None:
    board.route(9, 0x39 | LEVEL | MASKED)
    board.chip.set_pin(9, 1)
    assert board.messages == []
    board.route(9, 0x39 | LEVEL)
    assert board.vectors == [0x39]


def test_level_that_is_gone_before_unmask_is_not_delivered(board: Board) -> None:
    board.route(9, 0x39 | LEVEL | MASKED)
    board.chip.set_pin(9, 1)
    board.chip.set_pin(9, 0)
    board.route(9, 0x39 | LEVEL)
    assert board.messages == []


def test_mask_and_unmask_in_service_do_not_deliver_twice(board: Board) -> None:
    board.route(9, 0x39 | LEVEL)
    board.chip.set_pin(9, 1)
    board.route(9, 0x39 | LEVEL | MASKED)
    board.route(9, 0x39 | LEVEL)
    assert board.vectors == [0x39]


def test_eoi_of_a_masked_pin_waits_for_unmask(board: Board) -> None:
    board.route(9, 0x39 | LEVEL)
    board.chip.set_pin(9, 1)
    board.route(9, 0x39 | LEVEL | MASKED)
    board.chip.eoi(0x39)
    assert board.vectors == [0x39]
    board.route(9, 0x39 | LEVEL)
    assert board.vectors == [0x39, 0x39]


def test_edge_trigger_clears_remote_irr(board: Board) -> None:
    """How Linux ends an interrupt that moved to another vector, where there is no EOI register."""
    board.route(9, 0x39 | LEVEL)
    board.chip.set_pin(9, 1)
    board.chip.set_pin(9, 0)
    board.route(9, 0x39 | MASKED)
    board.route(9, 0x39 | LEVEL)
    assert not board.entry(9) & REMOTE_IRR
    assert board.vectors == [0x39]


@pytest.mark.parametrize("mode", [SMI, NMI, INIT, EXTINT])
def test_modes_that_are_always_edges(board: Board, mode: int) -> None:
    board.route(1, mode << 8 | LEVEL)
    board.chip.set_pin(1, 1)
    assert board.messages == [(0, False, mode, 0, False)]
    assert not board.entry(1) & REMOTE_IRR


def test_callback_may_call_the_chip(board: Board) -> None:
    def deliver(*_message: object) -> None:
        chip.set_pin(5, 0)
        chip.eoi(0x50)

    chip = IoApic(deliver)
    board.chip = chip
    board.route(5, 0x50 | LEVEL)
    chip.set_pin(5, 1)
    assert not board.entry(5) & REMOTE_IRR


def test_saved_state_goes_on_in_another_chip(board: Board) -> None:
    board.route(9, 0x39 | LEVEL, destination=1)
    board.route(4, 0x34)
    board.chip.set_pin(9, 1)
    board.chip.set_pin(4, 1)
    board.chip.write(INDEX, 4, 0x22)
    state = marshal.loads(marshal.dumps(board.chip.save()))
    other = Board()
    other.chip.restore(state)
    assert other.messages == [], "the local APICs have it already"
    assert other.chip.read(INDEX, 4) == 0x22
    assert other.chip.save() == state
    other.chip.set_pin(4, 1)
    assert other.messages == [], "no new edge"
    other.chip.eoi(0x39)
    assert other.messages == [(1, False, FIXED, 0x39, True)]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"id": 0, "index": 0, "pins": 0, "entries": [0]},
        {"id": 0, "index": 0, "pins": 0, "entries": ["x"] * 24},
    ],
)
def test_restore_of_nonsense_is_refused_and_changes_nothing(board: Board, state: dict[str, object]) -> None:
    before = board.chip.save()
    with pytest.raises((ValueError, KeyError, TypeError)):
        board.chip.restore(state)
    assert board.chip.save() == before


def test_any_access_is_answered(board: Board) -> None:
    random_source = random.Random(1)
    for _ in range(20_000):
        offset, size = random_source.randrange(0x1000), random_source.choice((1, 2, 4, 8))
        if random_source.random() < 0.5:
            offset = random_source.choice((INDEX, WINDOW, EOI))
        if random_source.random() < 0.5:
            board.chip.write(offset, size, random_source.getrandbits(size * 8))
        else:
            assert 0 <= board.chip.read(offset, size) < 1 << size * 8
        board.chip.set_pin(random_source.randrange(PINS), random_source.getrandbits(1))
    board.messages.clear()


def test_levels_from_many_threads_are_all_served() -> None:
    """Devices raise pins of one vector while processors lower them and end the interrupt: none is left behind."""
    vector, rounds, pins = 0x30, 100, (0, 1, 2)
    messages: queue.SimpleQueue[int] = queue.SimpleQueue()
    chip = IoApic(lambda _destination, _logical, _mode, number, _level: messages.put(number))
    for pin in pins:
        chip.write(INDEX, 4, 0x10 + 2 * pin)
        chip.write(WINDOW, 4, vector | LEVEL)
    served = {pin: threading.Event() for pin in pins}
    asserted = dict.fromkeys(pins, False)
    lost: list[int] = []

    def device(pin: int) -> None:
        for _ in range(rounds):
            asserted[pin] = True
            chip.set_pin(pin, 1)
            if not served[pin].wait(20):
                lost.append(pin)
                return
            served[pin].clear()

    def processor() -> None:
        while messages.get() == vector:
            done = [pin for pin in pins if asserted[pin]]
            for pin in done:
                asserted[pin] = False
                chip.set_pin(pin, 0)
            chip.eoi(vector)
            for pin in done:
                served[pin].set()

    handler = threading.Thread(target=processor)
    devices = [threading.Thread(target=device, args=(pin,)) for pin in pins]
    for thread in (handler, *devices):
        thread.start()
    for thread in devices:
        thread.join()
    messages.put(0)
    handler.join()
    assert lost == []
