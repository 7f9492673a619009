# SPDX-License-Identifier: Apache-2.0
"""What PCI functions need of the partition: address spaces, memory, and interrupts through the remapping table."""

from __future__ import annotations

import os
from _thread import allocate_lock

from ..hypervisor.interrupt_remapping import message_index
from ..kvm.abi import MEM_READONLY
from ..kvm.errors import KvmError
from ..tlfs.hypercalls import DEVICE_TYPE_PCI

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..bus.address_space import GuestMemory, MmioSpace, PortSpace
    from ..hypervisor.computer_partition import ComputerPartition
    from ..kvm.vm import Vm

#: GSIs below are IO-APIC pins.
_FIRST_ROUTE = 24
#: Its upper pins are for INTx.
_FIRST_LINE, _LINES = 16, 8
#: Memory slots from here on show devices' memory; those of RAM and configuration space come before.
_FIRST_DEVICE_SLOT = 32


def pci_device_id(bdf: int) -> int:
    """The device id that Linux gives a function of segment 0 in hypercalls (union hv_device_id)."""
    return DEVICE_TYPE_PCI << 62 | bdf


class RemappedVector:
    """One interrupt message of a function: what the driver programmed, resolved by the remapping table when raised.

    With an eventfd (a vhost-user back end raises the interrupt) KVM delivers by itself: the route of its GSI follows
    the table, and while there is no valid entry the eventfd is not connected.
    """

    __slots__ = (
        "_address",
        "_connected",
        "_data",
        "_device_id",
        "_fd",
        "_gsi",
        "_lock",
        "_masked",
        "_platform",
    )

    def __init__(self, platform: PartitionPlatform, bdf: int) -> None:
        self._platform = platform
        self._device_id = pci_device_id(bdf)
        self._address = 0
        self._data = 0
        self._masked = True
        self._fd = -1
        self._gsi = 0
        self._connected = False
        self._lock = allocate_lock()

    def program(self, address: int, data: int) -> None:
        """The driver wrote the message."""
        self._address = address
        self._data = data
        self.refresh()

    def mask(self, masked: bool) -> None:
        """The driver masked or unmasked the vector."""
        self._masked = masked
        self.refresh()

    def trigger(self) -> None:
        """Raises the message; the table decides where it goes."""
        self._platform.partition.interrupts.raise_message(self._device_id, self._address, self._data)

    def eventfd(self) -> int:
        """An eventfd that raises the message."""
        with self._lock:
            if self._fd < 0:
                self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._gsi = self._platform.new_route(self)
        self.refresh()
        return self._fd

    def uses(self, index: int) -> bool:
        """Whether the message names entry ``index`` of the table."""
        return self._fd >= 0 and message_index(self._address, self._data) == index

    def refresh(self) -> None:
        """Makes KVM's route agree with the message, the mask and the table."""
        if self._fd < 0:
            return
        partition = self._platform.partition
        with self._lock:
            entry = partition.interrupts.resolve(self._device_id, self._address, self._data)
            connect = entry is not None and not self._masked
            if entry is not None:
                partition.vm.set_msi_route(self._gsi, entry.target)
            if connect != self._connected:
                # Assigning an eventfd that was signalled meanwhile delivers at once.
                partition.vm.irqfd(self._fd, self._gsi, connect)
                self._connected = connect

    def close(self) -> None:
        """Closes the eventfd."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class InterruptLine:
    """An INTx line into the I/O APIC: ``raised`` signals it, ``lowered`` is signalled at the partition's EOI."""

    __slots__ = ("_gsi", "_vm", "lowered", "raised")

    def __init__(self, vm: Vm, gsi: int) -> None:
        self._vm = vm
        self._gsi = gsi
        self.raised = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.lowered = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        vm.irqfd(self.raised, gsi, resample=self.lowered)

    def close(self) -> None:
        """The line is nobody's any more."""
        if self.raised >= 0:
            self._vm.irqfd(self.raised, self._gsi, False, self.lowered)
            os.close(self.raised)
            os.close(self.lowered)
            self.raised = self.lowered = -1


def line_gsi(bdf: int, pin: int) -> int:
    """The I/O APIC pin of a function's INTx pin (from 1), eight for all of them, as bridges swizzle."""
    return _FIRST_LINE + ((bdf >> 3) + pin - 1) % _LINES


class PartitionPlatform:
    """The :class:`rootvisor.pci.platform.PciPlatform` of a partition."""

    __slots__ = ("_device_slots", "_routed", "partition")

    def __init__(self, partition: ComputerPartition) -> None:
        self.partition = partition
        self._routed: list[RemappedVector] = []
        self._device_slots: dict[int, int] = {}
        partition.interrupts.changed.append(self._entry_changed)

    @property
    def mmio(self) -> MmioSpace:
        """Device memory."""
        return self.partition.mmio

    @property
    def ports(self) -> PortSpace:
        """I/O ports."""
        return self.partition.ports

    @property
    def memory(self) -> GuestMemory:
        """RAM."""
        return self.partition.memory

    def msi_vector(self, bdf: int) -> RemappedVector:
        """A vector of function ``bdf``."""
        return RemappedVector(self, bdf)

    def new_route(self, vector: RemappedVector) -> int:
        """A GSI for a vector's eventfd."""
        self._routed.append(vector)
        return _FIRST_ROUTE + len(self._routed) - 1

    def add_ioeventfd(self, gpa: int, size: int, fd: int, datamatch: int | None) -> None:
        """Guest writes to ``gpa`` signal ``fd``. OSError when KVM takes no more of them: the writes then exit."""
        try:
            self.partition.vm.ioeventfd(gpa, size, fd, datamatch)
        except KvmError as error:
            raise OSError(str(error)) from error

    def remove_ioeventfd(self, gpa: int, size: int, fd: int, datamatch: int | None) -> None:
        """Undoes :meth:`add_ioeventfd`."""
        self.partition.vm.ioeventfd(gpa, size, fd, datamatch, assign=False)

    def coalesce_writes(self, gpa: int, size: int, enable: bool) -> None:
        """Guest writes to the range wait for the next exit, or no longer do."""
        zones = self.partition.vm.coalesced
        if enable:
            zones.add(gpa, size)
        else:
            zones.remove(gpa, size)

    def interrupt_line(self, bdf: int, pin: int) -> InterruptLine:
        """The INTx line of function ``bdf``."""
        return InterruptLine(self.partition.vm, line_gsi(bdf, pin))

    def map_device_memory(self, gpa: int, size: int, address: int, readonly: bool = False) -> int:
        """Shows memory of a device in the partition. Writes to what is ``readonly`` are exits."""
        slot = next(n for n in range(_FIRST_DEVICE_SLOT, 1 << 16) if n not in self._device_slots)
        self.partition.vm.set_memory(slot, gpa, size, address, MEM_READONLY if readonly else 0)
        self._device_slots[slot] = gpa
        return slot

    def unmap_device_memory(self, handle: int) -> None:
        """Undoes :meth:`map_device_memory`."""
        self.partition.vm.set_memory(handle, self._device_slots.pop(handle), 0, 0)

    def _entry_changed(self, index: int) -> None:
        for vector in self._routed:
            if vector.uses(index):
                vector.refresh()

    def close(self) -> None:
        """Closes what the vectors hold."""
        for vector in self._routed:
            vector.close()
