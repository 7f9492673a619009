# SPDX-License-Identifier: Apache-2.0
"""The terminal of whoever sits at a console: raw while the guest has it, with an escape key, so that nobody is stuck.

Ctrl-] followed by a key is for us: everything else goes to the guest's console, through a pipe. The pipe is what
makes the escape key work when the guest takes no input any more.
"""

from __future__ import annotations

import os
from select import POLLIN, POLLOUT

from .stream import InputStream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from select import poll
    from typing import Any

ESCAPE = 0x1D
KEYS = {ord("p"): "power", ord("x"): "end", ord("h"): "help", ord("?"): "help"}
HELP = (
    "rootvisor: Ctrl-] and then  p: press the power button   x: end the run at once   "
    "Ctrl-]: send Ctrl-]   h: this help"
)
#: What a guest that takes no input leaves unread before the terminal is not read any more: a large paste.
_HELD_BYTES = 1 << 20


def terminal_size() -> tuple[int, int] | None:
    """(columns, rows) of the terminal at standard output."""
    try:
        size = os.get_terminal_size(1)
    except OSError:
        return None
    return size.columns, size.lines


class RawTerminal:
    """Standard input in raw mode while the guest has the terminal; :meth:`restore` puts it back."""

    __slots__ = ("_saved",)

    def __init__(self) -> None:
        import termios

        try:
            self._saved: list[Any] | None = termios.tcgetattr(0)
        except termios.error:
            self._saved = None
            return
        mode = termios.tcgetattr(0)
        mode[0] &= ~(termios.BRKINT | termios.ICRNL | termios.INPCK | termios.ISTRIP | termios.IXON)
        mode[1] &= ~termios.OPOST
        mode[2] = mode[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        mode[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
        mode[6][termios.VMIN] = 1
        mode[6][termios.VTIME] = 0
        termios.tcsetattr(0, termios.TCSADRAIN, mode)

    def restore(self) -> None:
        """The mode from before."""
        if self._saved is not None:
            import termios

            termios.tcsetattr(0, termios.TCSADRAIN, self._saved)
            self._saved = None


class Keyboard:
    """Carries what is typed at descriptor ``fd`` to :attr:`output`, less what follows the escape key.

    :meth:`attach` has a poll object watch it; whoever polls then calls :meth:`handle` for its descriptors. ``command``
    is called with a value of :data:`KEYS`.
    """

    __slots__ = ("_armed", "_command", "_held", "_poll", "_stream", "_write", "output")

    def __init__(self, fd: int, command: Callable[[str], None]) -> None:
        self._stream = InputStream(fd)
        self._command = command
        self.output, self._write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._write, False)
        self._armed = False
        self._held = bytearray()
        self._poll: poll | None = None

    def attach(self, waiting: poll) -> None:
        """Has ``waiting`` watch the terminal."""
        self._poll = waiting
        waiting.register(self._stream.fd, POLLIN)

    def handle(self, fd: int) -> bool:
        """Does what there is to do at ``fd``; false when it is none of ours."""
        if fd == self._stream.fd:
            buffer = bytearray(4096)
            count = self._stream.read_into([memoryview(buffer)])
            if count is None:
                return True
            if count:
                self.typed(bytes(buffer[:count]))
            else:
                self._hung_up()
        elif fd != self._write:
            return False
        self._forward()
        return True

    def typed(self, data: bytes) -> None:
        """Takes typed bytes, cut anywhere. A key after the escape key that means nothing is sent with it."""
        start = 0
        if self._armed and data:
            self._armed = False
            start = self._escaped(data[0])
        while (at := data.find(ESCAPE, start)) >= 0:
            self._held += data[start:at]
            if at + 1 == len(data):
                self._armed = True
                return
            start = at + 1 + self._escaped(data[at + 1])
        self._held += data[start:]

    def _escaped(self, key: int) -> int:
        """Obeys the key after the escape key; how many bytes of input that takes."""
        name = KEYS.get(key)
        if name is not None:
            self._command(name)
            return 1
        self._held.append(ESCAPE)
        return 1 if key == ESCAPE else 0

    def _forward(self) -> None:
        """Passes on what the pipe has room for; past the end of what was typed, closes it."""
        waiting = self._poll
        if waiting is None or self._write < 0:
            return
        try:
            while self._held:
                del self._held[: os.write(self._write, self._held[:4096])]
        except BlockingIOError:
            waiting.register(self._write, POLLOUT)
        except OSError:  # the console is gone
            self._held.clear()
        if not self._held:
            _unwatch(waiting, self._write)
        if self._stream.fd >= 0:
            waiting.register(self._stream.fd, POLLIN if len(self._held) < _HELD_BYTES else 0)
        elif not self._held:
            self._close_write()

    def _hung_up(self) -> None:
        assert self._poll is not None
        _unwatch(self._poll, self._stream.fd)
        self._stream.close()

    def _close_write(self) -> None:
        fd, self._write = self._write, -1
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Closes the descriptors that are left; nothing may watch them any more."""
        self._stream.close()
        self._close_write()
        os.close(self.output)


def _unwatch(waiting: poll, fd: int) -> None:
    try:
        waiting.unregister(fd)
    except KeyError:
        pass
