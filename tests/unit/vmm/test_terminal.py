# SPDX-License-Identifier: Apache-2.0
"""The process's terminal: the guest's input, keys for the VMM, the size of the window."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from collections.abc import Iterator

import pytest

from rootvisor.vmm.terminal import Terminal


class Wired:
    """A terminal on descriptor 0 of this process; ``user`` is the other end."""

    def __init__(self) -> None:
        self.user, self.side = os.openpty()
        self.saved = os.dup(0)
        os.dup2(self.side, 0)
        self.events: list[str] = []
        self.terminal = Terminal(lambda: self.events.append("power"), lambda: self.events.append("end"))

    def close(self) -> None:
        os.dup2(self.saved, 0)
        os.close(self.saved)
        os.close(self.user)
        os.close(self.side)


@pytest.fixture
def wired() -> Iterator[Wired]:
    one = Wired()
    yield one
    one.terminal.stop()
    one.close()


def test_input_that_is_no_terminal_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(lambda: None, lambda: None)
    reader, writer = os.pipe()
    saved = os.dup(0)
    os.dup2(reader, 0)
    try:
        terminal.start()
        assert terminal.input == 0
        terminal.stop()
    finally:
        os.dup2(saved, 0)
        for fd in (saved, reader, writer):
            os.close(fd)


def test_keys_reach_the_guest_and_the_terminal_is_as_before_at_the_end(wired: Wired) -> None:
    before = termios.tcgetattr(wired.side)
    wired.terminal.start()
    assert not termios.tcgetattr(wired.side)[3] & termios.ICANON
    os.write(wired.user, b"ls\r\x03")
    received = b""
    while len(received) < 4:
        received += os.read(wired.terminal.input, 4)
    assert received == b"ls\r\x03"
    wired.terminal.stop()
    assert termios.tcgetattr(wired.side)[:4] == before[:4]


def test_window_that_changes_tells_the_guest(wired: Wired, monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest has taken standard output again when the test begins
    size_of = os.get_terminal_size
    monkeypatch.setattr(os, "get_terminal_size", lambda _fd: size_of(wired.side))
    sizes: list[tuple[int, int]] = []
    wired.terminal.resized()
    wired.terminal.on_resize = lambda columns, rows: sizes.append((columns, rows))
    fcntl.ioctl(wired.user, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
    wired.terminal.resized()
    assert sizes == [(100, 30)]


def test_stop_without_start_is_nothing(wired: Wired) -> None:
    wired.terminal.stop()
    assert not wired.events
