# SPDX-License-Identifier: Apache-2.0
"""Builds a partition's computer, the root's or a lone guest's: memory, kernel, tables, processors, the board's devices.

What is plugged in (virtio functions) is the business of :mod:`.devices`.
"""

from __future__ import annotations

from ..boot import memory_map
from ..boot.acpi import AcpiConfig
from ..boot.linux import load_linux
from ..boot.memory_map import COM1, PM1_EVENT, PM_TIMER, SCI_GSI, MemoryMap
from ..bus.address_space import GuestMemory, MemoryRegion
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
from ..hypervisor.hypercall_abi import write_page
from ..hypervisor.overlay import OwnedPages
from ..kvm.abi import MEM_READONLY
from ..kvm.memory import SharedMemory
from ..pci.ecam import Ecam
from ..pci.root import PciRoot
from ..tlfs.hypercalls import DEVICE_TYPE_IO_APIC
from ..tlfs.privileges import ACCESS_FREQUENCY_REGS
from .pci_platform import PartitionPlatform, line_gsi, pci_device_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..chips.debug_exit import DebugExit
    from ..hypervisor.computer_partition import ComputerPartition
    from ..hypervisor.hypervisor import Hypervisor
    from ..pci.function import PciFunction

#: Statistics and VP state pages come from deposits; these are spare owned pages for later overlays.
_SPARE_OWNED_PAGES = 6
#: The memory slot of PCI configuration space; 0 and 1 are RAM.
_CONFIG_SPACE_SLOT = 2


class Computer:
    """The machine around one partition: the root, or with ``guest`` an ordinary one in its place.

    :meth:`load` needs the PCI functions to be in place.
    """

    __slots__ = (
        "_config_space",
        "_ecam",
        "_memory",
        "_set_memory",
        "debug_exit",
        "layout",
        "partition",
        "pci",
        "platform",
        "power",
        "serial",
        "vps",
    )

    def __init__(
        self,
        hypervisor: Hypervisor,
        memory_bytes: int,
        vps: int,
        serial_output: int | None,
        guest: bool = False,
        hide: tuple[str, ...] = (),
    ) -> None:
        bits = 40
        for leaf, _index, _flags, eax, _ebx, _ecx, _edx in hypervisor.kvm.supported_cpuid():
            if leaf == 0x80000008:
                bits = eax & 0xFF
        owned = 0 if guest else OwnedPages.needed(vps) + _SPARE_OWNED_PAGES
        self.vps = vps
        #: the port through which a bare-metal kernel ends the run, if it is one
        self.debug_exit: DebugExit | None = None
        self.layout = layout = MemoryMap(memory_bytes, bits, owned)
        self._memory = SharedMemory("ram", memory_bytes)
        view = self._memory.view
        address = self._memory.address
        regions = [MemoryRegion(0, layout.low, view[: layout.low], self._memory.fd, 0, address)]
        if layout.high:
            regions.append(
                MemoryRegion(
                    memory_map.HIGH_RAM_START,
                    layout.high,
                    view[layout.low :],
                    self._memory.fd,
                    layout.low,
                    address + layout.low,
                )
            )
        memory = GuestMemory(tuple(regions))
        partition: ComputerPartition
        if guest:
            partition = guest_partition = hypervisor.create_guest(memory, vps, bits)
            #: gives KVM the configuration space, around which a guest may lay pages
            self._set_memory = guest_partition.overlays.show_window
            guest_partition.hide(hide)
        else:
            partition = hypervisor.create_root(memory, (layout.owned_gpa, owned))
            self._set_memory = partition.vm.set_memory
            partition.vm.set_memory(0, 0, layout.low, self._memory.address)
            if layout.high:
                partition.vm.set_memory(
                    1, memory_map.HIGH_RAM_START, layout.high, self._memory.address + layout.low
                )
            write_page(partition.hypercall_page.view)
        self.partition = partition
        vm = partition.vm
        self.platform = PartitionPlatform(partition)
        self.pci = PciRoot(
            self.platform,
            memory_map.ECAM,
            memory_map.MMIO32,
            layout.mmio64,
            io_ports=memory_map.IO_WINDOW,
        )
        # No configuration ports 0xCF8/0xCFC: kernels would prefer them, at two exits an access.
        self._config_space = SharedMemory("pci-config", self.pci.ecam_bytes)
        self._ecam = Ecam(self.pci, self._config_space.view, self._show_config_space)
        partition.mmio.add(memory_map.ECAM, self.pci.ecam_bytes, self._ecam)
        partition.interrupts.devices.add(DEVICE_TYPE_IO_APIC << 62 | memory_map.IOAPIC_ID)
        ports = partition.ports
        ports.add(RESET_PORT, 1, ResetControl(partition.end))
        ports.add(KEYBOARD_COMMAND_PORT, 1, KeyboardReset(partition.end))
        ports.add(0x70, 2, RealTimeClock())
        # The clock's index means nothing before its register is touched; kernels write to 0x80 for a delay, and probe
        # for 0xCF8 where nobody is. (A reset through 0xCF9 comes a little later so: see Machine.run.)
        vm.coalesced.add(0x70, 1, ports=True)
        vm.coalesced.add(0x80, 1, ports=True)
        vm.coalesced.add(0xCF8, 4, ports=True)
        # The UART's FIFO and line control: what they change shows at the next access to one of its other registers.
        vm.coalesced.add(COM1[0] + 2, 2, ports=True)
        self.power = PowerManagement(lambda level: vm.irq_line(SCI_GSI, level), partition.end)
        ports.add(PM1_EVENT, 6, self.power)
        ports.add(PM_TIMER, 4, PmTimer())
        self.serial = SerialPort(lambda level: vm.irq_line(COM1[1], level), serial_output)
        ports.add(COM1[0], 8, self.serial)

    def _show_config_space(self, shown: bool) -> None:
        size, flags = (self._config_space.size, MEM_READONLY) if shown else (0, 0)
        self._set_memory(_CONFIG_SPACE_SLOT, memory_map.ECAM, size, self._config_space.address, flags)

    def add_function(self, function: PciFunction) -> int:
        """Plugs a PCI function in; returns its bus/device/function number."""
        bdf = self.pci.add(function)
        self.partition.interrupts.devices.add(pci_device_id(bdf))
        return bdf

    def load(self, kernel: str, initrds: list[str], command_line: str, xsave: bool) -> None:
        """Puts kernel, initial ramdisk and tables into memory and the boot VP at the kernel's entry.

        Raises BootError for files or sizes that do not work.
        """
        partition = self.partition
        if not partition.privileges & ACCESS_FREQUENCY_REGS:
            # It would have to measure its clocks, and nothing here is quick enough to measure them by.
            command_line = f"tsc_early_khz={partition.vm.tsc_khz()} {command_line}"
        layout = self.layout
        self.pci.assign_bars()
        self._ecam.follow()
        entry = load_linux(
            self._memory.view[: layout.low],
            layout,
            kernel=kernel,
            initrds=initrds,
            command_line=command_line,
            acpi=self._acpi(),
        )
        partition.create_vps(self.vps, xsave)
        vcpu = partition.vps[0].vcpu
        vcpu.set_sregs(
            entry.segments,
            {"gdt": (entry.gdt_base, entry.gdt_limit), "idt": (0, 0)},
            cr0=entry.cr0,
            cr3=entry.cr3,
            cr4=entry.cr4,
            efer=entry.efer,
        )
        vcpu.set_regs(rip=entry.rip, rsi=entry.rsi, rflags=entry.rflags)

    def load_bare_metal(self, kernel: str, modules: list[str], command_line: str, xsave: bool) -> None:
        """A kernel by the multiboot specification, with the devices that test kernels expect.

        Raises BootError for files or sizes that do not work.
        """
        from ..boot.acpi import build_acpi
        from ..boot.multiboot import BOOTED, CR0, SEGMENTS, load_multiboot, name_of
        from ..chips import debug_exit, fw_cfg
        from . import synic_test_device

        partition = self.partition
        self.pci.assign_bars()
        self._ecam.follow()
        ports = partition.ports
        self.debug_exit = debug_exit.DebugExit(partition.end)
        ports.add(debug_exit.PORT, 4, self.debug_exit)
        ports.add(fw_cfg.PORT, 2, fw_cfg.FirmwareConfiguration(self.layout.size, self.vps))
        ports.add(synic_test_device.PORT, 4, synic_test_device.SynicTestDevice(partition))
        low = self._memory.view[: self.layout.low]
        words = f"{name_of(kernel)} {command_line}".rstrip()
        entry = load_multiboot(low, self.layout, kernel=kernel, modules=modules, command_line=words)
        tables = build_acpi(self._acpi(), memory_map.ACPI_TABLES)
        low[memory_map.ACPI_TABLES : memory_map.ACPI_TABLES + len(tables)] = tables
        partition.create_vps(self.vps, xsave)
        vcpu = partition.vps[0].vcpu
        vcpu.set_sregs(SEGMENTS, {"gdt": (0, 0), "idt": (0, 0)}, cr0=CR0, cr3=0, cr4=0, efer=0)
        vcpu.set_regs(rip=entry.rip, rax=BOOTED, rbx=entry.ebx, rflags=2)

    def _acpi(self) -> AcpiConfig:
        return AcpiConfig(
            apic_ids=list(range(self.vps)),
            reset=(RESET_PORT, RESET_VALUE),
            ecam=(memory_map.ECAM, 1),
            io_window=memory_map.IO_WINDOW,
            mmio32=memory_map.MMIO32,
            mmio64=self.layout.mmio64,
            interrupt_pins=[
                (bdf >> 3, function.interrupt_pin, line_gsi(bdf, function.interrupt_pin))
                for bdf, function in self.pci.functions.items()
                if function.interrupt_pin
            ],
        )

    def close(self) -> None:
        """Frees what the computer holds; the partition is stopped. The hypervisor closes the partition itself."""
        self.platform.close()
        self._config_space.close()
        self._memory.close()
