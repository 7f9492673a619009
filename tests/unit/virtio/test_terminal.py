# SPDX-License-Identifier: Apache-2.0
"""The escape key, and what passes by it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from select import POLLIN, poll

import pytest

from rootvisor.virtio.terminal import Keyboard


class Desk:
    """A keyboard at a pipe, polled as the machine does."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.read, self.write = os.pipe()
        self.keyboard = Keyboard(self.read, self.commands.append)
        os.close(self.read)
        self.waiting = poll()
        self.keyboard.attach(self.waiting)
        self.ended = False

    def turn(self) -> None:
        """Until nothing is left to do."""
        while ready := self.waiting.poll(0):
            for fd, _events in ready:
                assert self.keyboard.handle(fd)

    def type(self, *pieces: bytes) -> bytes:
        """What the console reads of these."""
        for piece in pieces:
            os.write(self.write, piece)
            self.turn()
        return self.console()

    def console(self) -> bytes:
        there = poll()
        there.register(self.keyboard.output, POLLIN)
        data = b""
        while there.poll(0):
            part = os.read(self.keyboard.output, 1 << 16)
            if not part:
                self.ended = True
                break
            data += part
            self.turn()
        return data

    def close(self) -> None:
        if self.write >= 0:
            os.close(self.write)
        self.keyboard.close()


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("pieces", "console", "commands"),
    [
        ((b"plain \x03\x04\x01",), b"plain \x03\x04\x01", []),
        ((b"a\x1dpb",), b"ab", ["power"]),
        ((b"a\x1d", b"xb"), b"ab", ["end"]),
        ((b"\x1dh\x1d?",), b"", ["help", "help"]),
        ((b"\x1d\x1dx",), b"\x1dx", []),
        ((b"\x1d", b"\x1d", b"x"), b"\x1dx", []),
        ((b"\x1dq",), b"\x1dq", []),
        ((b"1\x1d", b"q2"), b"1\x1dq2", []),
        ((b"\x1d",), b"", []),
    ],
)
def test_typed_escape_key_is_ours_the_rest_is_the_consoles(
    desk: Desk, pieces: tuple[bytes, ...], console: bytes, commands: list[str]
) -> None:
    assert desk.type(*pieces) == console
    assert desk.commands == commands


def test_escape_key_works_when_the_console_takes_nothing(desk: Desk) -> None:
    data = os.urandom(300_000).replace(b"\x1d", b"\0")
    for at in range(0, len(data), 50_000):
        os.write(desk.write, data[at : at + 50_000])
        desk.turn()
    os.write(desk.write, b"\x1dx")
    desk.turn()
    assert desk.commands == ["end"]
    assert desk.console() == data


def test_hang_up_ends_the_consoles_input_after_what_was_typed(desk: Desk) -> None:
    os.write(desk.write, b"last words")
    os.close(desk.write)
    desk.write = -1
    desk.turn()
    assert desk.console() == b"last words"
    assert desk.ended


def test_hang_up_with_a_full_console_loses_nothing(desk: Desk) -> None:
    data = bytes(range(1, 0x1D)) * 8192
    for at in range(0, len(data), 50_000):
        os.write(desk.write, data[at : at + 50_000])
        desk.turn()
    os.close(desk.write)
    desk.write = -1
    desk.turn()
    assert desk.console() == data
    assert desk.console() == b""
    assert desk.ended
