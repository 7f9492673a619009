# SPDX-License-Identifier: Apache-2.0
"""Device interrupts of a partition: what MAP, UNMAP and RETARGET agreed on, and what becomes of a device's message.

A mapped MSI is answered with a message in the remappable format of an interrupt remapping unit: the address carries an
index (bits 19:5 and bit 2 of 0xFEExxxxx, bit 4 set), not a processor, the data is 0. Devices raise that message; the
entry behind the index says which VP gets which vector. So a retarget needs no help of the device, and a message that
nobody mapped, or that comes from another device, goes nowhere and is counted.

IO-APIC entries are answered in the plain redirection format, because the in-kernel IO-APIC takes them as they are.
"""

from __future__ import annotations

from ..kvm.vm import msi_message
from ..tlfs import hypercalls, status
from .errors import HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..kvm.vm import Vm

MSI_BASE = 0xFEE00000
_REMAPPABLE = 1 << 4
#: Most entries one partition can hold; the index has 16 bits.
ENTRY_LIMIT = 4096

Message = tuple[int, int, int, int]  # source, reserved, low, high


def message_index(address: int, data: int) -> int | None:
    """The entry index inside a message in remappable format, or None."""
    if address >> 20 != MSI_BASE >> 20 or not address & _REMAPPABLE or data:
        return None
    return (address >> 5 & 0x7FFF) | (address & 4) << 13


def message_address(index: int) -> int:
    """The address that carries ``index``."""
    return MSI_BASE | _REMAPPABLE | (index & 0x7FFF) << 5 | (index >> 15) << 2


class Entry:
    """Device ``device_id`` may raise ``vector`` on the VP with ``apic_id``; ``message`` is ready for KVM_SIGNAL_MSI."""

    __slots__ = ("apic_id", "device_id", "index", "message", "users", "vector", "vp_index")

    def __init__(self, index: int, device_id: int, vector: int, vp_index: int, apic_id: int) -> None:
        self.index = index
        self.device_id = device_id
        self.users = 0
        self.point(vector, vp_index, apic_id)

    def point(self, vector: int, vp_index: int, apic_id: int) -> None:
        """Aims the entry at another vector and VP."""
        self.vector = vector
        self.vp_index = vp_index
        self.apic_id = apic_id
        self.message = msi_message(MSI_BASE | apic_id << 12, vector)

    @property
    def target(self) -> tuple[int, int]:
        """The (address, data) that KVM's local APICs understand."""
        return MSI_BASE | self.apic_id << 12, self.vector

    def answer(self) -> Message:
        """What MAP_DEVICE_INTERRUPT returns for the entry."""
        if self.device_id >> 62 == hypercalls.DEVICE_TYPE_IO_APIC:
            return hypercalls.INTERRUPT_SOURCE_IO_APIC, 0, self.vector, self.apic_id << 24
        return hypercalls.INTERRUPT_SOURCE_MSI, 0, message_address(self.index), 0


class InterruptRemapping:
    """The remapping table of one partition."""

    __slots__ = ("_by_key", "_free", "_vm", "blocked", "changed", "delivered", "devices", "entries", "report")

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._by_key: dict[tuple[int, int, int], Entry] = {}
        self._free: list[int] = []
        self.entries: list[Entry | None] = []
        #: device ids that exist in the partition; the machine adds its own
        self.devices: set[int] = set()
        #: messages delivered and refused
        self.delivered = 0
        self.blocked = 0
        #: called with an index whose entry changed, so that routes of event file descriptors follow
        self.changed: list[Callable[[int], None]] = []
        #: called with (device id, address, data) of a refused message
        self.report: Callable[[int, int, int], None] | None = None

    def map(self, device_id: int, vector: int, vp_index: int, apic_id: int) -> Message:
        """The same device, vector and VP give the same entry, which then has one user more.

        Linux maps every vector of a device to a placeholder (239 on VP 0) first, and unmaps each by itself later.
        """
        if device_id not in self.devices:
            raise HvError(status.INVALID_DEVICE_ID)
        if not 16 <= vector <= 255:
            raise HvError(status.INVALID_PARAMETER)
        key = (device_id, vector, vp_index)
        entry = self._by_key.get(key)
        if entry is None:
            if self._free:
                index = self._free.pop()
            elif len(self.entries) < ENTRY_LIMIT:
                index = len(self.entries)
                self.entries.append(None)
            else:
                raise HvError(status.NO_RESOURCES)
            entry = Entry(index, device_id, vector, vp_index, apic_id)
            self.entries[index] = entry
            self._by_key[key] = entry
            self._announce(index)
        entry.users += 1
        return entry.answer()

    def find(self, device_id: int, source: int, low: int, high: int) -> Entry:
        """The entry that an answer of MAP names. HV_STATUS_INVALID_DEVICE_ID, INVALID_PARAMETER."""
        if device_id not in self.devices:
            raise HvError(status.INVALID_DEVICE_ID)
        if source == hypercalls.INTERRUPT_SOURCE_MSI:
            index = message_index(low, high)
            if index is not None and index < len(self.entries):
                entry = self.entries[index]
                if entry is not None and entry.device_id == device_id:
                    return entry
        elif source == hypercalls.INTERRUPT_SOURCE_IO_APIC:
            for entry in self._by_key.values():
                if (
                    entry.device_id == device_id
                    and entry.vector == low & 0xFF
                    and entry.apic_id == high >> 24
                ):
                    return entry
        raise HvError(status.INVALID_PARAMETER)

    def unmap(self, device_id: int, source: int, low: int, high: int) -> None:
        """The entry has one user less; without any it is forgotten, and messages with its index are refused."""
        entry = self.find(device_id, source, low, high)
        entry.users -= 1
        if entry.users:
            return
        del self._by_key[(entry.device_id, entry.vector, entry.vp_index)]
        self.entries[entry.index] = None
        self._free.append(entry.index)
        self._announce(entry.index)

    def retarget(self, entry: Entry, vector: int, vp_index: int, apic_id: int) -> None:
        """The device keeps its message; the interrupt goes elsewhere."""
        if not 16 <= vector <= 255:
            raise HvError(status.INVALID_PARAMETER)
        key = (entry.device_id, vector, vp_index)
        other = self._by_key.get(key)
        if other is not None and other is not entry:
            raise HvError(status.INVALID_PARAMETER)
        del self._by_key[(entry.device_id, entry.vector, entry.vp_index)]
        old = (entry.vector, entry.apic_id)
        entry.point(vector, vp_index, apic_id)
        self._by_key[key] = entry
        if entry.device_id >> 62 == hypercalls.DEVICE_TYPE_IO_APIC:
            self._rewrite_ioapic(old, entry)
        self._announce(entry.index)

    def _rewrite_ioapic(self, old: tuple[int, int], entry: Entry) -> None:
        state = self._vm.read_ioapic()
        for pin in range(24):
            offset = 32 + 8 * pin
            word = int.from_bytes(state[offset : offset + 8], "little")
            if (word & 0xFF, word >> 56) == old:
                word = word & 0x00FFFFFF_FFFFFF00 | entry.vector | entry.apic_id << 56
                state[offset : offset + 8] = word.to_bytes(8, "little")
        self._vm.write_ioapic(state)

    def resolve(self, device_id: int, address: int, data: int) -> Entry | None:
        """The entry that a device's message names, if it is mapped for that very device."""
        index = message_index(address, data)
        if index is None or index >= len(self.entries):
            return None
        entry = self.entries[index]
        return entry if entry is not None and entry.device_id == device_id else None

    def raise_message(self, device_id: int, address: int, data: int) -> bool:
        """A device wrote (address, data). False when the message is refused."""
        entry = self.resolve(device_id, address, data)
        if entry is None:
            self.blocked += 1
            if self.report is not None:
                self.report(device_id, address, data)
            return False
        self.delivered += 1
        self._vm.signal_msi(entry.message)
        return True

    def _announce(self, index: int) -> None:
        for callback in self.changed:
            callback(index)
