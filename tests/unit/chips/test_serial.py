# SPDX-License-Identifier: Apache-2.0
"""The 16550A as a driver meets it."""

from __future__ import annotations

import marshal
import os
from collections.abc import Iterator

import pytest

from rootvisor.chips.serial import INPUT_LIMIT, SerialPort

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCRATCH = range(8)


class Board:
    def __init__(self) -> None:
        self.levels: list[int] = []
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.port = SerialPort(self.levels.append, self.writer)

    def output(self) -> bytes:
        try:
            return os.read(self.reader, 65536)
        except BlockingIOError:
            return b""


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board()
    yield made
    os.close(made.reader)
    os.close(made.writer)


def test_lines_go_out_whole(board: Board) -> None:
    for byte in b"hello":
        board.port.write(DATA, 1, byte)
    assert board.output() == b""
    board.port.write(DATA, 1, 10)
    assert board.output() == b"hello\n"


def test_flush_writes_an_unfinished_line(board: Board) -> None:
    board.port.write(DATA, 1, ord(">"))
    board.port.flush()
    assert board.output() == b">"


def test_transmitter_is_always_empty(board: Board) -> None:
    assert board.port.read(LSR, 1) & 0x60 == 0x60


def test_input_raises_the_line_until_it_is_read(board: Board) -> None:
    board.port.write(MCR, 1, 8)
    board.port.write(IER, 1, 1)
    assert board.port.receive(b"ab") == 2
    assert board.levels[-1] == 1
    assert board.port.read(IIR, 1) & 0xF == 4
    assert [board.port.read(DATA, 1), board.port.read(DATA, 1)] == [ord("a"), ord("b")]
    assert board.levels[-1] == 0
    assert board.port.read(LSR, 1) & 1 == 0


def test_transmit_interrupt_is_taken_back_by_iir(board: Board) -> None:
    board.port.write(MCR, 1, 8)
    board.port.write(IER, 1, 2)
    assert board.levels[-1] == 1
    assert board.port.read(IIR, 1) & 0xF == 2
    assert board.levels[-1] == 0
    assert board.port.read(IIR, 1) & 0xF == 1


def test_divisor_latch_hides_data(board: Board) -> None:
    board.port.write(LCR, 1, 0x80)
    board.port.write(DATA, 1, 1)
    board.port.write(IER, 1, 0)
    assert (board.port.read(DATA, 1), board.port.read(IER, 1)) == (1, 0)
    board.port.write(LCR, 1, 3)
    board.port.flush()
    assert board.output() == b""


def test_loopback(board: Board) -> None:
    board.port.write(MCR, 1, 0x1F)
    assert board.port.read(MSR, 1) == 0xF0
    board.port.write(DATA, 1, 0x55)
    assert board.port.read(DATA, 1) == 0x55
    board.port.flush()
    assert board.output() == b""


def test_scratch_register_is_how_drivers_find_the_chip(board: Board) -> None:
    board.port.write(SCRATCH, 1, 0xA5)
    assert board.port.read(SCRATCH, 1) == 0xA5


def test_input_that_nobody_reads_is_bounded(board: Board) -> None:
    assert board.port.receive(bytes(INPUT_LIMIT + 100)) == INPUT_LIMIT
    assert board.port.receive(b"x") == 0


def test_loopback_that_nobody_reads_is_bounded(board: Board) -> None:
    board.port.write(MCR, 1, 0x10)
    for _ in range(INPUT_LIMIT + 100):
        board.port.write(DATA, 1, 1)
    assert board.port.receive(b"x") == 0


def test_nobody_listens_any_more(board: Board) -> None:
    reader, writer = os.pipe()
    port = SerialPort(board.levels.append, writer)
    os.close(reader)
    for byte in b"line\nline\n":
        port.write(DATA, 1, byte)
    os.close(writer)


def test_host_stream_goes_on_when_the_guest_has_read(board: Board) -> None:
    """A host that has more than the port takes: nothing is lost, and it need not poll."""
    stream = bytes(range(256)) * 64
    offered = board.port.receive(stream)
    called: list[int] = []

    def on_room() -> None:
        nonlocal offered
        called.append(offered)
        offered += board.port.receive(stream[offered:])

    board.port.on_room = on_room
    read = bytearray()
    while board.port.read(LSR, 1) & 1:
        read.append(board.port.read(DATA, 1))
    assert bytes(read) == stream
    assert len(called) == (len(stream) - INPUT_LIMIT) // (INPUT_LIMIT // 2)


def test_room_is_not_told_where_nothing_was_refused(board: Board) -> None:
    called: list[int] = []
    board.port.on_room = lambda: called.append(1)
    board.port.receive(bytes(INPUT_LIMIT))
    while board.port.read(LSR, 1) & 1:
        board.port.read(DATA, 1)
    assert called == []


def test_clearing_the_fifo_makes_room(board: Board) -> None:
    called: list[int] = []
    board.port.receive(bytes(INPUT_LIMIT + 1))
    board.port.on_room = lambda: called.append(1)
    board.port.write(IIR, 1, 3)
    assert called == [1]
    assert not board.port.read(LSR, 1) & 1


def test_saved_state_goes_on_in_another_port(board: Board) -> None:
    for register, value in (
        (LCR, 0x80),
        (DATA, 1),
        (IER, 2),
        (LCR, 3),
        (MCR, 0xB),
        (IIR, 1),
        (IER, 1),
        (SCRATCH, 7),
    ):
        board.port.write(register, 1, value)
    board.port.receive(b"typed")
    board.port.write(DATA, 1, ord("$"))
    state = marshal.loads(marshal.dumps(board.port.save()))
    assert board.output() == b"$", "output is no state"
    levels: list[int] = []
    other = SerialPort(levels.append, None)
    other.restore(state)
    assert other.save() == state
    assert levels == [1]
    assert other.read(IIR, 1) == 0xC4
    assert bytes(other.read(DATA, 1) for _ in range(5)) == b"typed"
    assert levels == [1, 0]
    assert [other.read(register, 1) for register in (IER, LCR, MCR, SCRATCH)] == [1, 3, 0xB, 7]
    other.write(LCR, 1, 0x83)
    assert (other.read(DATA, 1), other.read(IER, 1)) == (1, 2)


@pytest.mark.parametrize("change", [{"ier": None}, {"input": 5}, {"input": "text"}, {"divisor": "1"}])
def test_restore_of_nonsense_is_refused_and_changes_nothing(board: Board, change: dict[str, object]) -> None:
    before = board.port.save()
    with pytest.raises((KeyError, TypeError)):
        board.port.restore(before | change)
    with pytest.raises(KeyError):
        board.port.restore({})
    assert board.port.save() == before
