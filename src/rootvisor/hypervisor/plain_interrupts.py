# SPDX-License-Identifier: Apache-2.0
"""Device interrupts of a partition without interrupt remapping: a message says itself which processor gets which
vector, and goes to KVM's local APICs as the driver wrote it.
"""

from __future__ import annotations

from ..kvm.vm import msi_message
from .interrupt_remapping import MSI_BASE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..kvm.vm import Vm


class Message:
    """A message for a local APIC."""

    __slots__ = ("target",)

    def __init__(self, address: int, data: int) -> None:
        self.target = (address, data)


class PlainInterrupts:
    """What :class:`.interrupt_remapping.InterruptRemapping` is where there is none."""

    __slots__ = ("_vm", "blocked", "changed", "delivered", "devices", "report")

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self.devices: set[int] = set()
        #: messages delivered, and those whose address is no local APIC's
        self.delivered = 0
        self.blocked = 0
        #: never called: no table changes
        self.changed: list[Callable[[int], None]] = []
        #: called with (device id, address, data) of a refused message
        self.report: Callable[[int, int, int], None] | None = None

    def resolve(self, _device_id: int, address: int, data: int) -> Message | None:
        """The message, or None if its address is no local APIC's."""
        return Message(address, data) if address >> 20 == MSI_BASE >> 20 else None

    def raise_message(self, device_id: int, address: int, data: int) -> bool:
        """Delivers a device's message; False when it goes nowhere."""
        if address >> 20 != MSI_BASE >> 20:
            self.blocked += 1
            if self.report is not None:
                self.report(device_id, address, data)
            return False
        self.delivered += 1
        self._vm.signal_msi(msi_message(address, data))
        return True
