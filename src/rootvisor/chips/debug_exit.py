# SPDX-License-Identifier: Apache-2.0
"""The port through which a bare-metal test kernel says that it is done (QEMU's ``isa-debug-exit``)."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PORT = 0xF4


class DebugExit:
    """A write ends the machine: ``end(how, detail)``. ``status`` is then the exit status that QEMU would have."""

    __slots__ = ("_end", "status")

    def __init__(self, end: Callable[[str, str], None]) -> None:
        self._end = end
        self.status: int | None = None

    def read(self, _offset: int, size: int) -> int:
        """Nothing to read."""
        return (1 << (size * 8)) - 1

    def write(self, _offset: int, _size: int, value: int) -> None:
        """The first value counts."""
        if self.status is None:
            self.status = (value << 1 | 1) & 0xFF
            self._end("exit", f"{value:#x} written to port {PORT:#x}")
