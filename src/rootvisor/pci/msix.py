# SPDX-License-Identifier: Apache-2.0
"""MSI-X: the vector table, the pending bits and the path from a device to the platform (PCI 3.0, 6.8.2)."""

from __future__ import annotations

import select
import struct
from _thread import allocate_lock

from . import registers as reg

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .platform import MsiVector

_ENTRY = struct.Struct("<QII")  # message address, data, vector control


class MsixTable:
    """The vectors of one function.

    A vector is live when MSI-X is enabled, the function mask and the vector's own mask are clear and the function may
    master the bus. The platform hears of a vector only when something it must know changed: `program` before the
    first unmask and when the message of a live vector changes, `mask` when a vector goes live or stops.

    Thread safe: device threads trigger while virtual processors write the table.
    """

    __slots__ = (
        "_bus_master",
        "_enabled",
        "_eventfds",
        "_function_masked",
        "_live",
        "_lock",
        "_make_vector",
        "_pending",
        "_programmed",
        "_table",
        "_vectors",
        "count",
        "on_live",
        "pba",
        "table",
    )

    def __init__(self, count: int) -> None:
        if not 1 <= count <= reg.MSIX_MAX_VECTORS:
            raise ValueError(f"MSI-X has 1 to {reg.MSIX_MAX_VECTORS} vectors, not {count}")
        self.count = count
        self._lock = allocate_lock()
        self._make_vector: Callable[[], MsiVector] | None = None
        self._vectors: list[MsiVector | None] = [None] * count
        self._eventfds: dict[int, int] = {}
        self._programmed: list[tuple[int, int]] = [(0, 0)] * count
        self._live = [False] * count
        self._pending = [False] * count
        self._enabled = False
        self._function_masked = False
        self._bus_master = False
        self._table = bytearray()
        self._clear_table()
        #: told of each vector that goes live, under the lock: for who has to switch the device's own interrupt on
        self.on_live: Callable[[int, MsiVector], None] | None = None
        self.table = _TableRegisters(self)
        self.pba = _PendingRegisters(self)

    @property
    def table_bytes(self) -> int:
        """Size of the vector table."""
        return self.count * reg.MSIX_ENTRY_BYTES

    @property
    def enabled(self) -> bool:
        """Whether the driver has switched MSI-X on."""
        return self._enabled

    @property
    def pba_bytes(self) -> int:
        """Size of the pending bits, whole 64-bit words."""
        return (self.count + 63) // 64 * 8

    def attach(self, make_vector: Callable[[], MsiVector]) -> None:
        """Say where platform vectors come from; each is made when it is first needed."""
        self._make_vector = make_vector

    def trigger(self, index: int) -> None:
        """Raise vector `index`: delivered now, remembered while masked, dropped while MSI-X is off."""
        vector = self._vectors[index]
        if self._live[index] and vector is not None:
            vector.trigger()
            return
        with self._lock:
            if not self._enabled or not self._bus_master:
                return
            if not self._live[index]:
                self._pending[index] = True
                return
            vector = self._vector(index)
        vector.trigger()

    def eventfd(self, index: int) -> int:
        """An eventfd that raises vector `index` without passing through Python."""
        with self._lock:
            fd = self._eventfds.get(index)
            if fd is None:
                fd = self._eventfds[index] = self._vector(index).eventfd()
            return fd

    def set_control(self, *, enabled: bool, function_masked: bool, bus_master: bool) -> None:
        """The message control or command register changed."""
        with self._lock:
            if (enabled, function_masked, bus_master) == (
                self._enabled,
                self._function_masked,
                self._bus_master,
            ):
                return
            self._enabled = enabled
            self._function_masked = function_masked
            self._bus_master = bus_master
            if not enabled:
                self._pending = [False] * self.count
            fire = [index for index in range(self.count) if self._refresh(index)]
        for index in fire:
            self.trigger(index)

    def reset(self) -> None:
        """Everything masked, no message set, as after power-on."""
        self.set_control(enabled=False, function_masked=False, bus_master=False)
        with self._lock:
            self._clear_table()
            for index, vector in enumerate(self._vectors):
                if vector is not None and self._programmed[index] != (0, 0):
                    vector.program(0, 0)
                self._programmed[index] = (0, 0)

    def save(self) -> dict[str, object]:
        """The table and which vectors wait for their unmask; whether MSI-X is on is in configuration space."""
        bits = self.read_pending(0, self.pba_bytes)
        with self._lock:
            return {"table": bytes(self._table), "pending": bits}

    def restore(self, state: dict[str, object]) -> None:
        """Take a saved table; before configuration space is restored. Raises `ValueError`."""
        table, bits = state.get("table"), state.get("pending")
        if not isinstance(table, bytes) or len(table) != len(self._table) or not isinstance(bits, int):
            raise ValueError(f"not the saved state of {self.count} MSI-X vectors")
        with self._lock:
            self._table[:] = table
            self._pending = [bool(bits >> index & 1) for index in range(self.count)]

    def read_table(self, offset: int, size: int) -> int:
        """A guest's read of the table."""
        if offset < 0 or offset + size > len(self._table):
            return reg.all_ones(size)
        return int.from_bytes(self._table[offset : offset + size], "little")

    def write_table(self, offset: int, size: int, value: int) -> None:
        """A guest's write: aligned and of 4 or 8 bytes, anything else is undefined and dropped."""
        if size not in (4, 8) or offset % size or not 0 <= offset <= len(self._table) - size:
            return
        index = offset // reg.MSIX_ENTRY_BYTES
        with self._lock:
            self._table[offset : offset + size] = value.to_bytes(size, "little")
            fire = self._refresh(index)
        if fire:
            self.trigger(index)

    def read_pending(self, offset: int, size: int) -> int:
        """A guest's read of the pending bits, eight vectors to the byte."""
        first, last = 8 * offset, min(8 * (offset + size), self.count)
        bits = 0
        with self._lock:
            for index in range(first, last):
                if self._pending[index] or (not self._live[index] and self._signalled(index)):
                    bits |= 1 << (index - first)
        return bits

    def _clear_table(self) -> None:
        self._table[:] = _ENTRY.pack(0, 0, reg.MSIX_ENTRY_MASKED) * self.count

    def _vector(self, index: int) -> MsiVector:
        vector = self._vectors[index]
        if vector is None:
            if self._make_vector is None:
                raise RuntimeError("MSI-X vector used before its function was attached to a root complex")
            vector = self._vectors[index] = self._make_vector()
        return vector

    def _signalled(self, index: int) -> bool:
        """Whether the eventfd of a masked vector waits for its unmask (the platform reads it only when live)."""
        fd = self._eventfds.get(index)
        if fd is None or not self._enabled:
            return False
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(0))

    def _refresh(self, index: int) -> bool:
        """Bring the platform up to date with entry `index`; True when a remembered interrupt is now due."""
        address, data, control = _ENTRY.unpack_from(self._table, index * reg.MSIX_ENTRY_BYTES)
        masked = control & reg.MSIX_ENTRY_MASKED or self._function_masked
        live = self._enabled and self._bus_master and not masked
        if not live:
            if self._live[index]:
                self._live[index] = False
                self._vector(index).mask(True)
            return False
        vector = self._vector(index)
        if self._programmed[index] != (address, data):
            self._programmed[index] = (address, data)
            vector.program(address, data)
        if not self._live[index]:
            vector.mask(False)
            self._live[index] = True
            if self.on_live is not None:
                self.on_live(index, vector)
        due = self._pending[index]
        self._pending[index] = False
        return due


class _TableRegisters:
    __slots__ = ("_msix",)

    def __init__(self, msix: MsixTable) -> None:
        self._msix = msix

    def read(self, offset: int, size: int) -> int:
        return self._msix.read_table(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._msix.write_table(offset, size, value)


class _PendingRegisters:
    __slots__ = ("_msix",)

    def __init__(self, msix: MsixTable) -> None:
        self._msix = msix

    def read(self, offset: int, size: int) -> int:
        return self._msix.read_pending(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Pending bits are read-only."""
