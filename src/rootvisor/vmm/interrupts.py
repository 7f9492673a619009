# SPDX-License-Identifier: Apache-2.0
"""The guest's interrupts: messages of PCI functions (the driver turns eventfds into those) and of the I/O APIC."""

from __future__ import annotations

import os
from _thread import allocate_lock

from ..mshv import MshvError
from ..mshv.abi import MAX_GUEST_IRQS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..mshv import Partition

_APIC_MESSAGES = 0xFEE
_ADDRESS_SHIFT = 20


class MsiRoutes:
    """The partition's interrupt table: number to (address, data) of a message. The driver takes it as a whole."""

    __slots__ = ("_free", "_lock", "_next", "_routes", "partition")

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self._routes: dict[int, tuple[int, int]] = {}
        self._free: list[int] = []
        self._next = 0
        self._lock = allocate_lock()

    def take(self) -> int:
        """A number for an eventfd. OSError when the table is full."""
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._next == MAX_GUEST_IRQS:
                raise OSError(f"the guest's devices have more than {MAX_GUEST_IRQS} interrupts")
            self._next += 1
            return self._next - 1

    def give_back(self, number: int) -> None:
        """The number's eventfd is gone."""
        with self._lock:
            self._routes.pop(number, None)
            self._free.append(number)

    def set(self, number: int, address: int, data: int) -> None:
        """What the number's interrupt is from now on."""
        with self._lock:
            if self._routes.get(number) == (address, data):
                return
            self._routes[number] = (address, data)
            self.partition.set_msi_routing([(one, *message) for one, message in self._routes.items()])


class MshvVector:
    """One message of a PCI function (:class:`rootvisor.pci.platform.MsiVector`).

    While it is live its eventfd is the driver's: a signal becomes an interrupt in the kernel.
    """

    __slots__ = ("_address", "_connected", "_data", "_fd", "_lock", "_masked", "_number", "_routes")

    def __init__(self, routes: MsiRoutes) -> None:
        self._routes = routes
        self._fd = -1
        self._number = -1
        self._address = self._data = 0
        self._masked = True
        self._connected = False
        self._lock = allocate_lock()

    def program(self, address: int, data: int) -> None:
        """The guest set the message."""
        with self._lock:
            self._address, self._data = address, data
            self._update()

    def mask(self, masked: bool) -> None:
        """Signals of a masked vector stay in its eventfd."""
        with self._lock:
            self._masked = masked
            self._update()

    def trigger(self) -> None:
        """Raises the interrupt."""
        if self._fd >= 0:
            os.eventfd_write(self._fd, 1)

    def eventfd(self) -> int:
        """The eventfd, for back ends and the kernel."""
        with self._lock:
            return self._open()

    def _open(self) -> int:
        if self._fd < 0:
            self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return self._fd

    def _update(self) -> None:
        # A message that is none for local APICs goes nowhere, as on a bus where nobody listens.
        wanted = not self._masked and self._address >> _ADDRESS_SHIFT == _APIC_MESSAGES
        try:
            if wanted:
                if self._number < 0:
                    self._number = self._routes.take()
                self._routes.set(self._number, self._address, self._data)
            if wanted != self._connected:
                change = self._routes.partition.add_irqfd if wanted else self._routes.partition.remove_irqfd
                change(self._open(), self._number)
                self._connected = wanted
        except OSError:
            # The kernel has no room for it: the function has one interrupt less, which its driver will miss.
            self._connected = False

    def close(self) -> None:
        """Closes the eventfd; the function is gone."""
        with self._lock:
            self._masked = True
            self._update()
            if self._number >= 0:
                self._routes.give_back(self._number)
                self._number = -1
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


class ApicMessages:
    """How the I/O APIC's messages reach local APICs: by hypercall. What the guest addresses to nobody is lost."""

    __slots__ = ("_partition",)

    def __init__(self, partition: Partition) -> None:
        self._partition = partition

    def deliver(self, destination: int, logical: bool, mode: int, vector: int, level: bool) -> None:
        """A message (``mode``: delivery mode as in a redirection entry)."""
        try:
            self._partition.assert_interrupt(vector, destination, mode, level=level, logical=logical)
        except MshvError:
            pass  # a vector or a destination that is none
