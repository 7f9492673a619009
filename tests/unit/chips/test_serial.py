# SPDX-License-Identifier: Apache-2.0
"""The 16550A as a driver meets it."""

from __future__ import annotations

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
