# SPDX-License-Identifier: Apache-2.0
"""This process's terminal while a guest has it. It outlives machines: a guest that reboots keeps it."""

from __future__ import annotations

import os
import sys
from _thread import allocate_lock, start_new_thread
from select import POLLIN, poll

from ..virtio.terminal import HELP, Keyboard, RawTerminal, terminal_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Terminal:
    """Standard input as ``input`` for a guest's console, less the keys that are for the VMM.

    ``press`` presses the power button, ``end`` ends the VMM. ``on_resize(columns, rows)`` is set by whoever has the
    console. What is no terminal is handed on as it is.
    """

    def __init__(self, press: Callable[[], None], end: Callable[[], None]) -> None:
        self._press = press
        self._end = end
        self.on_resize: Callable[[int, int], None] | None = None
        self.input = 0
        self._raw: RawTerminal | None = None
        self._keyboard: Keyboard | None = None
        self._stop_read = self._stop_write = -1
        self._running = allocate_lock()

    @property
    def size(self) -> tuple[int, int] | None:
        """(columns, rows); None where standard output is no terminal."""
        return terminal_size()

    def start(self) -> None:
        """Takes the terminal over, if it is one."""
        if not os.isatty(0):
            return
        self._keyboard = Keyboard(0, self._command)
        self.input = self._keyboard.output
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)
        self._raw = RawTerminal()
        self._running.acquire()
        start_new_thread(self._body, (self._keyboard,))

    def _body(self, keyboard: Keyboard) -> None:
        try:
            waiting = poll()
            waiting.register(self._stop_read, POLLIN)
            keyboard.attach(waiting)
            while True:
                for fd, _events in waiting.poll():
                    if fd == self._stop_read:
                        return
                    keyboard.handle(fd)
        finally:
            self._running.release()

    def _command(self, name: str) -> None:
        if name == "power":
            self._press()
        elif name == "end":
            self._end()
        else:
            sys.stderr.write(f"\r\n{HELP}\r\n")
            sys.stderr.flush()

    def resized(self) -> None:
        """The window has another size (SIGWINCH)."""
        size = terminal_size()
        if size is not None and self.on_resize is not None:
            self.on_resize(*size)

    def stop(self) -> None:
        """Gives the terminal back."""
        if self._keyboard is None:
            return
        os.write(self._stop_write, b"\0")
        self._running.acquire()
        if self._raw is not None:
            self._raw.restore()
        self._keyboard.close()
        self._keyboard = None
        os.close(self._stop_read)
        os.close(self._stop_write)
