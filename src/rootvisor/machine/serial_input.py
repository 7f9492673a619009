# SPDX-License-Identifier: Apache-2.0
"""Standard input for a partition whose console is its serial port, having no other."""

from __future__ import annotations

import os
from select import POLLIN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from select import poll

    from ..chips.serial import SerialPort


class SerialInput:
    """Carries what can be read at ``fd`` to a serial port, no faster than the port takes it. Whoever polls calls
    :meth:`handle` for its descriptor, and :meth:`push` now and then."""

    __slots__ = ("_fd", "_held", "_poll", "_serial", "_watching")

    def __init__(self, fd: int, serial: SerialPort) -> None:
        self._fd = fd
        self._serial = serial
        self._held = b""
        self._watching = False

    def attach(self, waiting: poll) -> None:
        """Has ``waiting`` watch the descriptor."""
        self._poll = waiting
        try:
            waiting.register(self._fd, POLLIN)
            self._watching = True
        except (OSError, ValueError):
            pass  # no standard input

    def handle(self, fd: int) -> bool:
        """Takes what has come; false when ``fd`` is another."""
        if fd != self._fd or not self._watching:
            return False
        try:
            data = os.read(fd, 4096)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        self._held += data
        if self._held or not data:  # until the port has taken it; for ever at the end
            self._poll.unregister(fd)
            self._watching = False
        self.push()
        return True

    def push(self) -> None:
        """Offers the port what it has not taken yet; when nothing is left, the descriptor is watched again."""
        if not self._held:
            return
        self._held = self._held[self._serial.receive(self._held) :]
        if not self._held:
            self._poll.register(self._fd, POLLIN)
            self._watching = True
