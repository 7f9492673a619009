# SPDX-License-Identifier: Apache-2.0
"""The guest's board: what is there without being plugged in. I/O APIC, serial port, clock, power, PCI root, ACPI."""

from __future__ import annotations

from ..boot import memory_map
from ..boot.acpi import AcpiConfig
from ..boot.memory_map import COM1, GPE_BLOCK, PCI_HOTPLUG, PM1_EVENT, PM_TIMER, SCI_GSI
from ..chips import hotplug, ioapic
from ..chips.clock import PmTimer, RealTimeClock
from ..chips.power import (
    KEYBOARD_COMMAND_PORT,
    RESET_PORT,
    RESET_VALUE,
    KeyboardReset,
    PowerManagement,
    ResetControl,
)
from ..chips.serial import SerialPort
from ..mshv import Memory
from ..pci.ecam import Ecam
from ..pci.root import PciRoot
from .interrupts import ApicMessages
from .pci_platform import MshvPlatform

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from ..boot.memory_map import MemoryMap
    from ..bus.address_space import GuestMemory
    from ..mshv import Partition, Region


class Board:
    """Made for a partition that is initialized. ``end(how, detail)`` ends the machine: the guest's wish.
    ``ejected(number)``: it has let go what is in a slot.

    ``serial``: there is a serial port; ``serial_output``: descriptor that takes what the guest writes to it, or None.
    """

    __slots__ = (
        "_config_region", "_config_space", "_partition", "_sci", "clock", "ecam", "events", "hotplug", "io_apic",
        "layout", "pci", "platform", "pm_timer", "power", "serial",
    )  # fmt: skip

    def __init__(
        self,
        partition: Partition,
        layout: MemoryMap,
        memory: GuestMemory,
        end: Callable[[str, str], None],
        ejected: Callable[[int], None],
        serial: bool,
        serial_output: int | None,
    ) -> None:
        self._partition = partition
        self.layout = layout
        self.platform = platform = MshvPlatform(partition, memory)
        self.pci = PciRoot(
            platform,
            memory_map.ECAM,
            memory_map.MMIO32,
            layout.mmio64,
            io_ports=memory_map.IO_WINDOW,
        )
        self._config_space = Memory(self.pci.ecam_bytes, name="pci-config")
        self._config_region: Region | None = None
        # No configuration ports 0xCF8/0xCFC: kernels would prefer them, at two exits an access.
        self.ecam = Ecam(self.pci, self._config_space.view, self._show_config_space)
        platform.mmio.add(memory_map.ECAM, self.pci.ecam_bytes, self.ecam)
        self.io_apic = ioapic.IoApic(ApicMessages(partition).deliver, memory_map.IOAPIC_ID)
        platform.mmio.add(memory_map.IOAPIC, ioapic.SIZE, self.io_apic)
        ports = platform.ports
        ports.add(RESET_PORT, 1, ResetControl(end))
        ports.add(KEYBOARD_COMMAND_PORT, 1, KeyboardReset(end))
        self.clock = RealTimeClock()
        ports.add(0x70, 2, self.clock)
        self._sci = [0, 0]
        self.power = PowerManagement(lambda level: self._drive_sci(0, level), end)
        ports.add(PM1_EVENT, 6, self.power)
        self.events = hotplug.GeneralEvents(lambda level: self._drive_sci(1, level))
        ports.add(GPE_BLOCK, hotplug.GPE_BYTES, self.events)
        self.hotplug = hotplug.PciSlots(self.events, ejected)
        ports.add(PCI_HOTPLUG, hotplug.REGISTER_BYTES, self.hotplug)
        self.pm_timer = PmTimer()
        ports.add(PM_TIMER, 4, self.pm_timer)
        self.serial: SerialPort | None = None
        if serial:
            self.serial = SerialPort(
                lambda level: self.io_apic.set_pin(COM1[1], level), serial_output, buffered=False
            )
            ports.add(COM1[0], 8, self.serial)

    def acpi(self, vps: int) -> AcpiConfig:
        """The board in the words of its ACPI tables."""
        return AcpiConfig(
            apic_ids=list(range(vps)),
            reset=(RESET_PORT, RESET_VALUE),
            ecam=(memory_map.ECAM, 1),
            io_window=memory_map.IO_WINDOW,
            mmio32=memory_map.MMIO32,
            mmio64=self.layout.mmio64,
            serial=COM1 if self.serial is not None else None,
            pic=False,
            hotplug=True,
        )

    def _drive_sci(self, source: int, level: int) -> None:
        """The system control interrupt is asserted while one of its sources asserts it."""
        self._sci[source] = level
        self.io_apic.set_pin(SCI_GSI, int(any(self._sci)))

    def _show_config_space(self, shown: bool) -> None:
        if shown:
            self._config_region = self._partition.map(memory_map.ECAM, self._config_space, writable=False)
        elif self._config_region is not None:
            self._config_region.unmap()
            self._config_region = None

    def save(self) -> dict[str, object]:
        """The chips' state."""
        return {name: chip.save() for name, chip in self._chips()}

    def restore(self, state: dict[str, Any]) -> None:
        """Back to that."""
        for name, chip in self._chips():
            chip.restore(state[name])

    def _chips(self) -> Iterator[tuple[str, Any]]:
        yield "io_apic", self.io_apic
        yield "clock", self.clock
        yield "power", self.power
        yield "events", self.events
        yield "hotplug", self.hotplug
        if self.serial is not None:
            yield "serial", self.serial

    def close(self) -> None:
        """Frees what the board holds; the processors are stopped."""
        self.platform.close()

    def free(self) -> None:
        """Frees the memory that the partition had; the partition is gone."""
        self._config_space.close()
