# SPDX-License-Identifier: Apache-2.0
"""Who answers a port or an MMIO address of a machine, and which of its GPAs are memory."""

from __future__ import annotations

from bisect import bisect_right

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class IoHandler(Protocol):
        """A device's registers; offsets are relative to the base it was added at, sizes are 1, 2, 4 or 8."""

        def read(self, offset: int, size: int) -> int:
            """The value, zero-extended."""

        def write(self, offset: int, size: int, value: int) -> None:
            """Stores ``value``; never raises for what a guest can do."""


class AddressError(ValueError):
    """A GPA range is not wholly inside one region of the partition's memory."""


def write_access(port: int, size: int) -> int:
    """How KVM describes one write of ``size`` bytes to ``port``: the first eight bytes of ``kvm_run.io``."""
    return 1 | size << 8 | port << 16 | 1 << 32


class PortSpace:
    """I/O ports: one dictionary entry per port, because every port exit looks here."""

    __slots__ = ("_handlers", "writes")

    def __init__(self) -> None:
        self._handlers: dict[int, tuple[int, IoHandler]] = {}
        #: :func:`write_access` -> (offset, size, the handler's write): what :meth:`write` does, for the run loop
        self.writes: dict[int, tuple[int, int, Callable[[int, int, int], None]]] = {}

    def add(self, base: int, length: int, handler: IoHandler) -> None:
        """``handler`` answers ports base .. base + length - 1."""
        for port in range(base, base + length):
            self._handlers[port] = (base, handler)
            for size in (1, 2, 4):
                self.writes[write_access(port, size)] = (port - base, size, handler.write)

    def remove(self, base: int) -> None:
        """Undoes the ``add`` with this base."""
        for port in [p for p, (start, _) in self._handlers.items() if start == base]:
            del self._handlers[port]
            for size in (1, 2, 4):
                self.writes.pop(write_access(port, size), None)

    def read(self, port: int, size: int) -> int:
        """All ones where nobody answers."""
        entry = self._handlers.get(port)
        if entry is None:
            return (1 << (size * 8)) - 1
        return entry[1].read(port - entry[0], size)

    def write(self, port: int, size: int, value: int) -> None:
        """Dropped where nobody answers."""
        entry = self._handlers.get(port)
        if entry is not None:
            entry[1].write(port - entry[0], size, value)


class MmioSpace:
    """Device memory, looked up by bisection; adding and removing replaces the tables, so that readers need no lock."""

    __slots__ = ("_table",)

    def __init__(self) -> None:
        self._table: tuple[list[int], list[tuple[int, int, IoHandler]]] = ([], [])

    def add(self, base: int, length: int, handler: IoHandler) -> None:
        """``handler`` answers GPAs base .. base + length - 1; a later range wins where two begin alike."""
        regions = [r for r in self._table[1] if r[0] != base]
        regions.append((base, length, handler))
        regions.sort(key=lambda r: r[0])
        self._table = ([r[0] for r in regions], regions)

    def remove(self, base: int) -> None:
        """Undoes the ``add`` with this base."""
        regions = [r for r in self._table[1] if r[0] != base]
        self._table = ([r[0] for r in regions], regions)

    def find(self, gpa: int) -> tuple[int, int, IoHandler] | None:
        """(base, length, handler) of the range around ``gpa``."""
        bases, regions = self._table
        index = bisect_right(bases, gpa) - 1
        if index < 0:
            return None
        region = regions[index]
        return region if gpa < region[0] + region[1] else None

    def read(self, gpa: int, size: int) -> int:
        """All ones where nobody answers."""
        region = self.find(gpa)
        if region is None or gpa + size > region[0] + region[1]:
            return (1 << (size * 8)) - 1
        return region[2].read(gpa - region[0], size)

    def write(self, gpa: int, size: int, value: int) -> None:
        """Dropped where nobody answers."""
        region = self.find(gpa)
        if region is not None and gpa + size <= region[0] + region[1]:
            region[2].write(gpa - region[0], size, value)


class MemoryRegion:
    """``size`` bytes of RAM at ``gpa``: ``view`` is its memory, shared through ``fd`` at ``fd_offset``.

    ``address`` is where it is mapped in this process (for vhost in the kernel); 0 where nobody needs to know.
    """

    __slots__ = ("address", "fd", "fd_offset", "gpa", "size", "view")

    def __init__(
        self, gpa: int, size: int, view: memoryview, fd: int, fd_offset: int, address: int = 0
    ) -> None:
        self.gpa = gpa
        self.size = size
        self.view = view
        self.fd = fd
        self.fd_offset = fd_offset
        self.address = address


class GuestMemory:
    """The RAM of a partition, as hypercalls and devices reach it."""

    __slots__ = ("regions",)

    def __init__(self, regions: tuple[MemoryRegion, ...]) -> None:
        self.regions = regions

    def view(self, gpa: int, length: int) -> memoryview:
        """A writable view; :class:`AddressError` unless the range lies wholly inside one region."""
        for region in self.regions:
            offset = gpa - region.gpa
            if offset >= 0 and offset + length <= region.size:
                return region.view[offset : offset + length]
        raise AddressError(f"no memory at {gpa:#x} + {length:#x}")

    def contains(self, gpa: int, length: int) -> bool:
        """Whether the range lies wholly inside one region."""
        return any(region.gpa <= gpa and gpa + length <= region.gpa + region.size for region in self.regions)

    @property
    def size(self) -> int:
        """Bytes of RAM."""
        return sum(region.size for region in self.regions)
