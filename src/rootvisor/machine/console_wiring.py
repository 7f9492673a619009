# SPDX-License-Identifier: Apache-2.0
"""Who reads and writes what: the virtio console's ports, the serial port, and the process's standard streams.

Three shapes. A command with streams: stdin, stdout, stderr are ports of their own, hvc0 is only a log. A command (or
shell) with a terminal: hvc0 is the terminal. A foreign initial ramdisk: hvc0 and the serial port are the streams.
"""

from __future__ import annotations

import os

from ..virtio.console import Console, Port
from ..virtio.terminal import terminal_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_TAIL = 16 << 10


class Consoles:
    """Builds the console device and holds our ends: ``control`` (read, write) and ``log`` (read) descriptors.

    ``tail`` keeps the last 16 KiB of what the kernel printed, for the report of a bad end. ``terminal_input`` is what
    a terminal's console reads.
    """

    __slots__ = (
        "_command", "_log_copy", "_log_write", "_own", "_pending", "_tty", "agent", "control_read", "control_write",
        "log", "tail", "terminal_input",
    )  # fmt: skip

    def __init__(self, description: dict[str, Any], log_copy: int | None) -> None:
        self._command = description.get("command")
        self._tty = bool(description.get("tty"))
        self._log_copy = log_copy
        self.agent = self._command is not None
        self.tail = bytearray()
        self.terminal_input = 0
        self._pending = b""
        self._own: list[int] = []
        self.control_read = self.control_write = self.log = self._log_write = -1

    def devices(self) -> list[Console]:
        """The console devices of the run; the first one has the terminal, if there is one.

        A terminal's console is alone on its device: its size then travels in configuration space, where all kernels
        agree on the order of the fields (see :class:`Console`).
        """
        size = terminal_size() if self._tty else None
        if not self.agent:
            return [Console([Port("console", self.terminal_input, 1, True)], size)]
        self.control_read, control_out = self._pipe()
        control_in, self.control_write = self._pipe()
        control = Port("rootvisor.control", control_in, control_out)
        if self._tty:
            return [
                Console([Port("console", self.terminal_input, 1, True)], size),
                Console([control], name="control"),
            ]
        ports = [
            Port("console", None, self.log_pipe(), True),
            Port("rootvisor.stdin", 0, None),
            Port("rootvisor.stdout", None, 1, on_output_lost=self._output_lost),
            Port("rootvisor.stderr", None, 2),
            control,
        ]
        return [Console(ports)]

    def _output_lost(self) -> None:
        """Nobody reads standard output any more: the command is told as a pipe would tell it."""
        self.tell_agent("lost stdout")

    def log_pipe(self) -> int:
        """The write end of the log, for the serial port and for a console that nobody sits at."""
        if self._log_write < 0:
            self.log, self._log_write = self._pipe()
        return self._log_write

    def _pipe(self) -> tuple[int, int]:
        read, write = os.pipe2(os.O_CLOEXEC)
        self._own += [read, write]
        return read, write

    def read_log(self) -> bool:
        """Takes what the kernel printed; False when nothing is left (a non-blocking pipe)."""
        try:
            data = os.read(self.log, 65536)
        except OSError:
            return False
        self.tail += data
        del self.tail[:-_TAIL]
        if self._log_copy is not None:
            try:
                os.write(self._log_copy, data)
            except OSError:
                self._log_copy = None
        return bool(data)

    def read_control(self, message: Callable[[str], None]) -> bool:
        """Takes lines from the agent and hands them to ``message``; False when nothing is left."""
        try:
            data = os.read(self.control_read, 4096)
        except OSError:
            return False
        *lines, self._pending = (self._pending + data).split(b"\n")
        self._pending = self._pending[-4096:]
        for line in lines:
            message(line.decode("utf-8", "replace"))
        return bool(data)

    def tell_agent(self, line: str) -> None:
        """Sends a line to the agent; it is small, and dropped if the agent does not read."""
        os.set_blocking(self.control_write, False)
        try:
            os.write(self.control_write, line.encode() + b"\n")
        except OSError:
            pass

    def close(self) -> None:
        """Closes our ends."""
        for fd in self._own:
            os.close(fd)
        self._own.clear()
