# SPDX-License-Identifier: Apache-2.0
"""Our side of the agent in a guest (rootvisor/boot/agent): its console ports, what it says, what it is told.

The protocol is that of the root partition's agent; see rootvisor/boot/initramfs.py.
"""

from __future__ import annotations

import os
from _thread import allocate_lock, start_new_thread
from select import POLLHUP, POLLIN, poll

from ..virtio.console import Console, Port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: What the guest's kernel printed last, for the report of a bad end.
_TAIL_BYTES = 16 << 10
_LINE_BYTES = 4096


class Agent:
    """The agent of one guest.

    ``terminal``: its command has the guest's console as its terminal; otherwise the command's streams are this
    process's, through ports of their own. ``log_copy``: descriptor to which the guest's console is copied, or None.

    Attributes: ``ready``: the guest's user space runs. ``status``: the command's exit status, None before there is
    one. ``error``: why there is none. ``tail``: what the console printed last; empty with a terminal.
    """

    def __init__(self, *, terminal: bool, log_copy: int | None = None) -> None:
        self._terminal = terminal
        self._log_copy = log_copy
        self.ready = False
        self.status: int | None = None
        self.error = ""
        self.tail = bytearray()
        self._pending = b""
        self._theirs: list[int] = []
        self._control_read, self._control_out = self._pipe()
        self._control_in, self._control_write = self._pipe()
        self._theirs += [self._control_out, self._control_in]
        self._log_read = -1
        self._running = allocate_lock()
        os.set_blocking(self._control_write, False)

    def _pipe(self) -> tuple[int, int]:
        return os.pipe2(os.O_CLOEXEC)

    def consoles(self) -> list[Console]:
        """The devices, which keep copies of the descriptors. Once.

        With a terminal that is the control port alone: the console is another device, and the first one.
        """
        control = Port("rootvisor.control", self._control_in, self._control_out)
        if self._terminal:
            return [Console([control], name="control")]
        self._log_read, log = self._pipe()
        self._theirs.append(log)
        ports = [
            Port("console", None, log, True),
            Port("rootvisor.stdin", 0, None),
            Port("rootvisor.stdout", None, 1, on_output_lost=lambda: self.tell("lost stdout")),
            Port("rootvisor.stderr", None, 2),
            control,
        ]
        return [Console(ports)]

    def tell(self, line: str) -> None:
        """Sends a line, which is dropped when the agent does not read. From any thread."""
        try:
            os.write(self._control_write, line.encode() + b"\n")
        except OSError:
            pass

    def listen(self) -> None:
        """Reads what comes, on a thread, until the devices are gone: they alone can write from now on."""
        for fd in self._theirs:
            os.close(fd)
        self._theirs.clear()
        self._running.acquire()
        start_new_thread(self._body, ())

    def _body(self) -> None:
        try:
            takers: dict[int, Callable[[bytes], None]] = {self._control_read: self.said}
            if self._log_read >= 0:
                takers[self._log_read] = self._printed
            waiting = poll()
            for fd in takers:
                waiting.register(fd, POLLIN)
            while takers:
                for fd, events in waiting.poll():
                    data = os.read(fd, 65536) if events & (POLLIN | POLLHUP) else b""
                    if data:
                        takers[fd](data)
                    else:
                        waiting.unregister(fd)
                        del takers[fd]
        finally:
            self._running.release()

    def said(self, data: bytes) -> None:
        """Takes bytes of the control port, cut anywhere. Lines that mean nothing are passed over: a guest may write
        what it likes."""
        *lines, rest = (self._pending + data).split(b"\n")
        self._pending = rest[-_LINE_BYTES:]
        for line in lines:
            word, _, text = line.decode("utf-8", "replace").partition(" ")
            if word == "ready":
                self.ready = True
            elif word == "exit" and text.isascii() and text.isdecimal() and len(text) <= 3:
                self.status = int(text) & 0xFF
            elif word == "error":
                self.error = text

    def _printed(self, data: bytes) -> None:
        self.tail += data
        del self.tail[:-_TAIL_BYTES]
        if self._log_copy is not None:
            try:
                os.write(self._log_copy, data)
            except OSError:
                self._log_copy = None

    def close(self) -> None:
        """Takes the last words, and closes what is left. The devices are gone before."""
        self._running.acquire()
        for fd in (*self._theirs, self._control_read, self._control_write, self._log_read):
            if fd >= 0:
                os.close(fd)
        self._theirs.clear()
