# SPDX-License-Identifier: Apache-2.0
"""Carry bytes between the caller's streams and QEMU's sockets, in threads, with back pressure."""

from __future__ import annotations

import array
import fcntl
import os
import select
import socket
import termios
import threading
from collections.abc import Callable

_CHUNK = 1 << 18


class Input(threading.Thread):
    """From the file descriptor ``fd`` into ``sock``. The end of ``fd`` becomes a half-closed socket, which QEMU
    shows to the guest as the end of the input. ``close`` ends the thread without waiting for input."""

    def __init__(self, fd: int, sock: socket.socket) -> None:
        super().__init__(name="rootvisor-input", daemon=True)
        self._fd = fd
        self._socket = sock
        self._stop_read, self._stop_write = os.pipe()

    def run(self) -> None:
        """The thread's body."""
        poll = select.poll()
        poll.register(self._stop_read, select.POLLIN)
        try:
            poll.register(self._fd, select.POLLIN)
            while True:
                if any(fd == self._stop_read for fd, _ in poll.poll()):
                    return
                try:
                    data = os.read(self._fd, _CHUNK)
                except BlockingIOError:
                    continue
                if not data:
                    break
                self._socket.sendall(data)
        except (OSError, ValueError):
            pass  # closed, a terminal that hung up, or QEMU is gone: the end of the input in every case
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        """End the thread. The socket must be shut first when QEMU may be stopped with its buffer full."""
        os.write(self._stop_write, b"x")
        if self.ident is not None:
            self.join()
        os.close(self._stop_read)
        os.close(self._stop_write)


class Output(threading.Thread):
    """From ``sock`` to the file descriptor ``fd``, until QEMU's end is closed. When nobody reads ``fd`` any more,
    ``broken`` is called once and the rest is dropped."""

    def __init__(self, sock: socket.socket, fd: int, broken: Callable[[], None]) -> None:
        super().__init__(name="rootvisor-output", daemon=True)
        self._fd = fd
        self._socket = sock
        self._broken = broken
        self.received = 0

    def run(self) -> None:
        """The thread's body."""
        sink = True
        while True:
            try:
                data = self._socket.recv(_CHUNK)
            except OSError:
                return
            if not data:
                return
            self.received += len(data)
            if sink:
                try:
                    write_all(self._fd, data)
                except OSError:
                    sink = False
                    self._broken()

    def waiting(self) -> int:
        """Bytes that QEMU has sent and we have not taken."""
        count = array.array("i", [0])
        fcntl.ioctl(self._socket, termios.FIONREAD, count)
        return count[0]


def write_all(fd: int, data: bytes) -> None:
    """Write everything, also where somebody made ``fd`` non-blocking."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            select.select([], [fd], [])
