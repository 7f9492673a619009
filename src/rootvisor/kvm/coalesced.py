# SPDX-License-Identifier: Apache-2.0
"""Coalesced writes: registers whose writes mean nothing until another register is touched.

KVM keeps such writes in a ring that it shares with user space and does not leave the guest (api.rst 4.116). The ring
is one per VM; whoever handles an exit drains it first, so that the order of accesses is kept.

Layout: u32 first, u32 last, then entries of 24 bytes: u64 address, u32 length, u32 is port I/O, 8 bytes of data.
"""

from __future__ import annotations

import struct
from _thread import allocate_lock

from . import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .vm import Vm

_ENTRY = struct.Struct("<QII8s")
_ENTRIES = (4096 - 8) // _ENTRY.size
_ZONE = struct.Struct("<QII")


class CoalescedWrites:
    """Zones of one VM and the ring behind them. Without KVM's support :attr:`offset` is 0 and every write exits."""

    __slots__ = ("_lock", "_ring", "_vm", "_with_ports", "offset")

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        #: of the ring in a processor's run mapping, in bytes
        self.offset = vm.kvm.capability(abi.CAP_COALESCED_MMIO) * 4096
        self._with_ports = bool(vm.kvm.capability(abi.CAP_COALESCED_PIO))
        self._ring: memoryview | None = None
        self._lock = allocate_lock()

    def add(self, address: int, size: int, ports: bool = False) -> None:
        """Writes inside the zone stay in the guest from now on."""
        if self.offset and (self._with_ports or not ports):
            zone = bytearray(_ZONE.pack(address, size, ports))
            self._vm.ioctl(abi.KVM_REGISTER_COALESCED_MMIO, zone)

    def remove(self, address: int, size: int, ports: bool = False) -> None:
        """Undoes :meth:`add`."""
        if self.offset and (self._with_ports or not ports):
            zone = bytearray(_ZONE.pack(address, size, ports))
            self._vm.ioctl(abi.KVM_UNREGISTER_COALESCED_MMIO, zone)

    def drain(
        self, write_port: Callable[[int, int, int], None], write_mmio: Callable[[int, int, int], None]
    ) -> int:
        """Hands every waiting write to ``write(address, size, value)``, oldest first. Any thread.

        The ring's heads as it was left empty, for who compares them later: what they are after the return may count a
        write that another processor has made since.
        """
        with self._lock:
            if self._ring is None:
                self._ring = self._vm.vcpus[0].u8[self.offset : self.offset + 4096]
            ring = self._ring
            heads = ring[:8].cast("I")
            first = heads[0] % _ENTRIES
            while first != heads[1] % _ENTRIES:
                address, size, is_port, data = _ENTRY.unpack_from(ring, 8 + first * _ENTRY.size)
                write = write_port if is_port else write_mmio
                write(address, size, int.from_bytes(data[:size], "little"))
                first = (first + 1) % _ENTRIES
                heads[0] = first
            return first << 32 | first

    def close(self) -> None:
        """Lets go of the ring's mapping."""
        self._ring = None
