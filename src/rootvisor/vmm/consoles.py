# SPDX-License-Identifier: Apache-2.0
"""Where the guest's console and serial port lead: a terminal, a file, a pseudo-terminal, nowhere."""

from __future__ import annotations

import os
import select

from ..virtio.stream import InputStream
from ..virtio.worker import Worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..chips.serial import SerialPort
    from .schema import Document


class Stream:
    """One of the two. ``present``: the guest has the device; ``input`` and ``output`` are descriptors or None.

    ``tty``: it is this process's terminal. ``path``: of a pseudo-terminal, for the user.
    """

    __slots__ = ("_owned", "input", "output", "path", "present", "tty")

    def __init__(self, config: Document, terminal_input: int) -> None:
        mode = config["mode"]
        self.present = mode != "Off"
        self.tty = mode == "Tty"
        self.path = ""
        self.input: int | None = None
        self.output: int | None = None
        self._owned: list[int] = []
        if mode == "Tty":
            self.input, self.output = terminal_input, 1
        elif mode == "File":
            self.output = os.open(
                config["file"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOCTTY, 0o644
            )
            self._owned.append(self.output)
        elif mode == "Pty":
            ours, theirs = os.openpty()
            _make_raw(theirs)
            self.path = os.ttyname(theirs)
            # The other end stays open here: without a reader the guest's output waits, and is not an error.
            self._owned += [ours, theirs]
            self.input = self.output = ours

    def close(self) -> None:
        """Closes what was opened here."""
        for fd in self._owned:
            os.close(fd)
        self._owned.clear()


def _make_raw(fd: int) -> None:
    import termios
    import tty

    tty.setraw(fd, termios.TCSANOW)


class SerialInput:
    """Feeds a serial port from a descriptor, as fast as the guest reads, on a thread of its own."""

    __slots__ = ("_held", "_port", "_stream", "_worker")

    def __init__(self, port: SerialPort, fd: int) -> None:
        self._port = port
        self._stream = InputStream(fd)
        self._held = b""
        self._worker = Worker("serial", self._defect)
        port.on_room = lambda: self._worker.post(self._pump)
        with self._worker.lock:
            self._worker.watch(self._stream.fd, select.POLLIN, self._ready)
        self._worker.start()

    def _ready(self, _events: int) -> None:
        buffer = bytearray(256)
        count = self._stream.read_into([memoryview(buffer)])
        if count == 0:
            self._worker.unwatch(self._stream.fd)
        elif count:
            self._held = bytes(buffer[:count])
            self._pump()

    def _pump(self) -> None:
        """Gives the port what it takes; nothing more is read before it has taken all."""
        self._held = self._held[self._port.receive(self._held) :]
        if self._held:
            self._worker.unwatch(self._stream.fd)
        else:
            self._worker.watch(self._stream.fd, select.POLLIN, self._ready)

    def _defect(self, _error: Exception) -> None:
        self._worker.unwatch(self._stream.fd)

    def close(self) -> None:
        """Ends the thread and closes the copy of the descriptor."""
        self._worker.stop()
        self._stream.close()
