# SPDX-License-Identifier: Apache-2.0
"""A physical PCI function as the partition sees it: its own configuration space but for what others must decide.

Ours: command register, BARs, MSI and MSI-X, power state, the list of capabilities. Everything else is the device's, as
far as VFIO lets it be written (``drivers/vfio/pci/vfio_pci_config.c``). BARs are mapped into the partition, so that no
access to the device leaves it; the pages with the MSI-X table are not.
"""

from __future__ import annotations

from ..pci import registers as reg
from ..pci.config import ConfigSpace
from ..pci.function import PciFunction
from . import abi
from .errors import VfioError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from ..pci.bar import Bar
    from ..pci.platform import MsiVector, PciPlatform
    from ..pci.root import PciRoot
    from .device import VfioDevice

    class DevicePlatform(PciPlatform, Protocol):
        """A machine that can map device memory into its partition."""

        def map_device_memory(self, gpa: int, size: int, address: int, readonly: bool = False) -> int:
            """Shows ``size`` bytes at ``address`` of this process at ``gpa``; a handle for the way back."""
            ...

        def unmap_device_memory(self, handle: int) -> None:
            """Undoes :meth:`map_device_memory`."""
            ...

        def interrupt_line(self, bdf: int, pin: int) -> InterruptLine:
            """The line of INTx pin ``pin`` (from 1) of a function."""
            ...

    class InterruptLine(Protocol):
        """A level-triggered line: one eventfd raises it, another is signalled when the partition has dealt with it."""

        raised: int
        lowered: int

        def close(self) -> None:
            """Takes the line away."""
            ...


_PAGE = 4096
_CONVENTIONAL = 256
_EXTENDED = 0x100
#: How many capabilities a chain may have before it is taken for a loop.
_CHAIN_LIMIT = 64
# MSI capability (PCI 3.0, 6.8.1): message control, then address, upper address where it is wide, data.
_MSI_CONTROL, _MSI_ADDRESS = 2, 4
_MSI_ENABLE, _MSI_WIDE, _MSI_MASKABLE = 1 << 0, 1 << 7, 1 << 8
_PM_CONTROL = 4
_PM_STATE = 0x3
#: Extended capabilities that make sense only for who owns the bus, or that change what BARs are: address translation
#: services, ARI, single-root IOV, page requests, resizable BARs, PASID.
_HIDDEN_EXTENDED = frozenset((0x0E, 0x0F, 0x10, 0x13, 0x15, 0x1B, 0x24))
#: Conventional ones: compatibility with buses of old, enhanced allocation (BARs of another kind).
_HIDDEN = frozenset((0x14,))


class AssignedFunction(PciFunction):
    """The device behind ``device`` at a place of the partition's bus. It signals eventfds; ``platform`` routes them."""

    def __init__(self, device: VfioDevice, platform: DevicePlatform, report: Callable[[str], None]) -> None:
        """``report`` is told of what the partition's driver will miss."""
        read = device.config
        class_code = read(reg.CLASS_CODE, 3)
        super().__init__(
            read(reg.VENDOR_ID, 2),
            read(reg.DEVICE_ID, 2),
            class_code,
            revision=read(reg.REVISION_ID, 1),
            express=False,
        )
        self.device = device
        self._report = report
        self._platform = platform
        #: which bits of configuration space are ours; the others are the device's
        self._ours = ConfigSpace()
        self._mapped: dict[Bar, list[int]] = {}
        self._mappable: dict[Bar, list[tuple[int, int]]] = {}
        self._addresses: dict[tuple[int, int], int] = {}
        self._connected: set[int] = set()
        self._eventfds: dict[int, int] = {}
        self._msi = 0
        self._msi_vector: MsiVector | None = None
        self._msi_live = False
        self._line: InterruptLine | None = None
        self._line_used = False
        for offset, size in (
            (reg.VENDOR_ID, 4),
            (reg.COMMAND, 2),
            (reg.REVISION_ID, 4),
            (reg.HEADER_TYPE, 1),
            (reg.BAR_0, 4 * reg.BAR_COUNT),
            (reg.SUBSYSTEM_VENDOR_ID, 4),
            (reg.ROM_BASE, 4),
            (reg.CAPABILITY_POINTER, 1),
            (reg.INTERRUPT_LINE, 2),
        ):
            self._own(offset, size)
        self.config.set(reg.SUBSYSTEM_VENDOR_ID, 4, read(reg.SUBSYSTEM_VENDOR_ID, 4))
        pin = read(reg.INTERRUPT_PIN, 1)
        if 1 <= pin <= 4 and device.irq_count(abi.IRQ_INTX)[0]:
            self.config.set(reg.INTERRUPT_PIN, 1, pin)
        self._add_bars()
        self._walk_capabilities()
        self._walk_extended()
        device.write(abi.REGION_CONFIG, reg.COMMAND, 2, self._command_of_device(0))

    def _own(self, offset: int, size: int, mask: int | None = None) -> None:
        """These bits are kept here and not in the device."""
        self._ours.set(
            offset, size, self._ours.get(offset, size) | ((1 << 8 * size) - 1 if mask is None else mask)
        )

    # --- what the device has ------------------------------------------------------------------------------------------
    def _add_bars(self) -> None:
        index = 0
        while index < reg.BAR_COUNT:
            region = self.device.regions[index]
            low = self.device.config(reg.BAR_0 + 4 * index, 4)
            io = bool(low & reg.BAR_IO)
            wide = not io and low & 0x6 == reg.BAR_MEMORY_64
            if region.size:
                prefetchable = not io and bool(low & reg.BAR_PREFETCHABLE)
                self._mappable[
                    self.add_bar(index, region.size, io=io, wide=wide, prefetchable=prefetchable)
                ] = []
            index += 2 if wide else 1
        rom = self.device.regions[abi.REGION_ROM]
        if rom.size >= reg.ROM_MIN_BYTES and not rom.size & rom.size - 1:
            self._mappable[self.add_rom(rom.size)] = []

    def _walk_capabilities(self) -> None:
        """The device's capabilities at their own places, as drivers may know them by heart."""
        read, config = self.device.config, self.config
        tail = reg.CAPABILITY_POINTER
        at = read(reg.CAPABILITY_POINTER, 1) & 0xFC if read(reg.STATUS, 2) & reg.STATUS_CAPABILITY_LIST else 0
        msix = 0
        for _ in range(_CHAIN_LIMIT):
            if at < reg.FIRST_CAPABILITY:
                break
            kind = read(at, 1)
            if kind not in _HIDDEN and (kind != reg.CAP_MSIX or self._msix_is_sound(at)):
                config.set(tail, 1, at)
                self._own(at, 2)
                config.set(at, 1, kind)
                tail = at + 1
                if kind == reg.CAP_MSI:
                    self._add_msi(at)
                elif kind == reg.CAP_MSIX:
                    msix = at
                elif kind == reg.CAP_POWER:
                    # Its memory is out of reach in a low-power state; the partition's accesses would be ours to answer.
                    self._own(at + _PM_CONTROL, 2, _PM_STATE)
                    config.set_mask(at + _PM_CONTROL, 2, _PM_STATE)
            at = read(at + 1, 1) & 0xFC
        self._add_regions(msix)

    def _walk_extended(self) -> None:
        if self.device.regions[abi.REGION_CONFIG].size <= _EXTENDED:
            self._own(_EXTENDED, 4)
            return
        at = _EXTENDED
        for _ in range(_CHAIN_LIMIT):
            header = self.device.config(at, 4)
            if header in (0, 0xFFFFFFFF):
                self._own(at, 4)
                return
            if header & 0xFFFF in _HIDDEN_EXTENDED:
                self._own(at, 4)  # a capability of no kind, which leads to the next
                self.config.set(at, 4, header & 0xFFF00000)
            at = header >> 20 & 0xFFC
            if at < _EXTENDED:
                return

    def _msix_is_sound(self, at: int) -> bool:
        """Whether table and pending bits lie in BARs that the device has, apart from each other."""
        count = (self.device.config(at + reg.MSIX_CONTROL, 2) & 0x7FF) + 1
        places = []
        for place, size in (
            (reg.MSIX_TABLE, count * reg.MSIX_ENTRY_BYTES),
            (reg.MSIX_PBA, (count + 63) // 64 * 8),
        ):
            value = self.device.config(at + place, 4)
            bars = (bar for bar in self.bars if bar.index < reg.BAR_COUNT and not bar.io)
            bar = next((bar for bar in bars if bar.index == value & 7), None)
            if bar is None or (value & ~7) + size > bar.size:
                return False
            places.append((bar.index, value & ~7, size))
        (bar1, table, size1), (bar2, pending, size2) = places
        return bar1 != bar2 or table + size1 <= pending or pending + size2 <= table

    def _add_regions(self, msix: int) -> None:
        """Handlers for the pages of the MSI-X table and the pending bits, and for what cannot be mapped."""
        special: dict[int, list[tuple[int, int]]] = {}
        if msix:
            read = self.device.config
            control = read(msix + reg.MSIX_CONTROL, 2)
            table, pending = read(msix + reg.MSIX_TABLE, 4), read(msix + reg.MSIX_PBA, 4)
            self._own(msix, 12)
            self.config.set(msix + reg.MSIX_CONTROL, 2, control & 0x7FF)
            self.config.set(msix + reg.MSIX_TABLE, 4, table)
            self.config.set(msix + reg.MSIX_PBA, 4, pending)
            bars = {bar.index: bar for bar in self.bars}
            vectors = self.place_msix(
                msix, (control & 0x7FF) + 1, (bars[table & 7], table & ~7), (bars[pending & 7], pending & ~7)
            )
            vectors.on_live = self._msix_vector_is_live
            special.setdefault(table & 7, []).append((table & ~7, vectors.table_bytes))
            special.setdefault(pending & 7, []).append((pending & ~7, vectors.pba_bytes))
        for bar in self.bars:
            if bar.index == abi.REGION_ROM:
                bar.add_region(0, bar.size, _Rom(self.device))
                self._mappable[bar] = [(0, bar.size)] if bar.size >= _PAGE else []
                continue
            taken = sorted(special.get(bar.index, ()))
            pages = [(at & -_PAGE, (at + size + _PAGE - 1 & -_PAGE)) for at, size in taken]
            mappable = [] if bar.io else self.device.regions[bar.index].mappable
            self._mappable[bar] = parts = _without(mappable, pages)
            for start, end in _gaps(bar.size, taken + [(at, size) for at, size in parts]):
                bar.add_region(start, end - start, _DeviceRegisters(self.device, bar.index, start))

    def _add_msi(self, at: int) -> None:
        """One message: Linux in a root partition cannot have more without an interrupt for each."""
        control = self.device.config(at + _MSI_CONTROL, 2) & _MSI_WIDE
        size = 14 if control else 10
        whole = size + 10 if self.device.config(at + _MSI_CONTROL, 2) & _MSI_MASKABLE else size
        self._own(at, min(whole, _CONVENTIONAL - at))
        self.config.set(at + _MSI_CONTROL, 2, control)
        self.config.set_mask(at + _MSI_CONTROL, 2, _MSI_ENABLE)
        self.config.set_mask(at + _MSI_ADDRESS, 4, 0xFFFFFFFC)
        if control:
            self.config.set_mask(at + _MSI_ADDRESS + 4, 4, 0xFFFFFFFF)
        self.config.set_mask(at + size - 2, 2, 0xFFFF)
        self._msi = at

    # --- configuration space ------------------------------------------------------------------------------------------
    @property
    def config_is_plain(self) -> bool:
        """Never: the device's registers change by themselves."""
        return False

    def config_read(self, offset: int, size: int) -> int:
        """Our bits, and the device's."""
        ours = self._ours.get(offset, size)
        value = self.config.get(offset, size) & ours
        if ours != (1 << 8 * size) - 1:
            value |= self.device.config(offset, size) & ~ours
        return value

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Ours takes effect here, the rest is written to the device as it is."""
        super().config_write(offset, size, value)
        if offset <= reg.COMMAND + 1 and offset + size > reg.COMMAND:
            self.device.write(abi.REGION_CONFIG, reg.COMMAND, 2, self._command_of_device(self.command))
        if self._msi and offset < self._msi + 16 and offset + size > self._msi:
            self._update_msi()
        self._write_to_device(offset, size, value)

    def _write_to_device(self, offset: int, size: int, value: int) -> None:
        ours = self._ours.get(offset, size)
        if not ours:
            self.device.write(abi.REGION_CONFIG, offset, size, value)
            return
        if ours == (1 << 8 * size) - 1:
            return
        for at in range(size):  # a register that is partly ours: by bytes, ours unchanged
            byte = ours >> 8 * at & 0xFF
            if byte != 0xFF:
                new = value >> 8 * at & 0xFF & ~byte
                if byte:
                    new |= self.device.config(offset + at, 1) & byte
                self.device.write(abi.REGION_CONFIG, offset + at, 1, new)

    @staticmethod
    def _command_of_device(command: int) -> int:
        """It decodes always: while the partition does not, it has no way there, and VFIO shows BARs only so."""
        return command & reg.COMMAND_WRITABLE | reg.COMMAND_IO | reg.COMMAND_MEMORY

    # --- interrupts ---------------------------------------------------------------------------------------------------
    def attach(self, root: PciRoot, bdf: int) -> None:
        """As any function; and its one MSI gets a vector, its pin a line."""
        super().attach(root, bdf)
        if self._msi:
            self._msi_vector = self._platform.msi_vector(bdf)
        if self.interrupt_pin:
            self._line = self._platform.interrupt_line(bdf, self.interrupt_pin)
            self._update_line()

    def _msix_vector_is_live(self, index: int, vector: MsiVector) -> None:
        """The driver unmasked a vector: the device shall signal it. Later masks are the eventfd's matter."""
        if index in self._connected:
            return
        count, can_grow = self.device.irq_count(abi.IRQ_MSIX)
        if index >= count:
            return
        self._connected.add(index)
        self._update_line()  # a device has interrupts of one kind only
        eventfds = self._eventfds
        eventfds[index] = vector.eventfd()
        try:
            if can_grow or len(self._connected) == 1:
                self.device.connect(abi.IRQ_MSIX, index, [eventfds[index]])
            else:
                self.device.disconnect(abi.IRQ_MSIX)
                self.device.connect(
                    abi.IRQ_MSIX, 0, [eventfds.get(n, -1) for n in range(max(self._connected) + 1)]
                )
        except VfioError as error:
            self._report(str(error))

    def _update_msix(self) -> None:
        super()._update_msix()
        if self.msix is not None and self._connected and not self.msix.enabled:
            self._connected.clear()
            self.device.disconnect(abi.IRQ_MSIX)
            self._update_line()

    def _update_line(self) -> None:
        """The pin is used while no messages are."""
        line = self._line
        wanted = line is not None and not self._connected and not self._msi_live
        if line is None or wanted == self._line_used:
            return
        self._line_used = wanted
        if not wanted:
            self.device.disconnect(abi.IRQ_INTX)
            return
        try:
            self.device.connect(abi.IRQ_INTX, 0, [line.raised])
            self.device.connect_unmask(abi.IRQ_INTX, line.lowered)
        except VfioError as error:
            self._report(str(error))

    def _update_msi(self) -> None:
        vector = self._msi_vector
        if vector is None:
            return
        at, config = self._msi, self.config
        control = config.get(at + _MSI_CONTROL, 2)
        live = bool(control & _MSI_ENABLE)
        if live:
            wide = bool(control & _MSI_WIDE)
            vector.program(
                config.get(at + _MSI_ADDRESS, 8 if wide else 4), config.get(at + (12 if wide else 8), 2)
            )
        if live != self._msi_live:
            self._msi_live = live
            vector.mask(not live)
            if live:
                self._update_line()
                try:
                    self.device.connect(abi.IRQ_MSI, 0, [vector.eventfd()])
                except VfioError as error:
                    self._report(str(error))
            else:
                self.device.disconnect(abi.IRQ_MSI)
                self._update_line()

    # --- memory -------------------------------------------------------------------------------------------------------
    def bar_moved(self, bar: Bar) -> None:
        """The partition moved a BAR, or switched its decoding."""
        for handle in self._mapped.pop(bar, ()):
            self._platform.unmap_device_memory(handle)
        if bar.mapped_at is None or bar.mapped_at % _PAGE:
            return
        handles = []
        for offset, size in self._mappable[bar]:
            address = self._addresses.get((bar.index, offset))
            rom = bar.index == abi.REGION_ROM
            if address is None:
                device = self.device
                address = device.rom_address() if rom else device.map(bar.index, offset, size)
                self._addresses[bar.index, offset] = address
            handles.append(self._platform.map_device_memory(bar.mapped_at + offset, size, address, rom))
        self._mapped[bar] = handles

    def reset(self) -> None:
        """The device is reset, too."""
        super().reset()
        self._connected.clear()
        self.device.disconnect(abi.IRQ_MSIX)
        self._update_msi()
        self._update_line()
        self.device.reset()
        self.device.write(abi.REGION_CONFIG, reg.COMMAND, 2, self._command_of_device(0))

    def describe(self) -> str:
        """Its ids and where the host has it."""
        return f"{super().describe()} ({self.device.address})"

    def close(self) -> None:
        """Interrupts off, memory out of the partition, the device back to VFIO."""
        self.device.disconnect(abi.IRQ_MSIX)
        self.device.disconnect(abi.IRQ_MSI)
        if self._line is not None:
            self.device.disconnect(abi.IRQ_INTX)
            self._line.close()
            self._line = None
        for handles in self._mapped.values():
            for handle in handles:
                self._platform.unmap_device_memory(handle)
        self._mapped.clear()
        self.device.reset()
        self.device.close()


class _DeviceRegisters:
    """Registers that are reached through VFIO, an exit each: less than a page, IO ports, neighbours of the table."""

    __slots__ = ("_device", "_offset", "_region")

    def __init__(self, device: VfioDevice, region: int, offset: int) -> None:
        self._device = device
        self._region = region
        self._offset = offset

    def read(self, offset: int, size: int) -> int:
        return self._device.read(self._region, self._offset + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._device.write(self._region, self._offset + offset, size, value)


class _Rom:
    """The expansion ROM where it cannot be mapped, and writes to it."""

    __slots__ = ("_device",)

    def __init__(self, device: VfioDevice) -> None:
        self._device = device

    def read(self, offset: int, size: int) -> int:
        return self._device.read(abi.REGION_ROM, offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Dropped: it is memory to read only."""


def _without(parts: list[tuple[int, int]], holes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """``parts`` (offset, size) in whole pages without the ``holes`` (start, end), which are whole pages too."""
    result = []
    for offset, size in parts:
        start, end = offset + _PAGE - 1 & -_PAGE, offset + size & -_PAGE
        for low, high in sorted(holes):
            if low < end and start < high:
                if start < low:
                    result.append((start, low - start))
                start = max(start, high)
        if start < end:
            result.append((start, end - start))
    return result


def _gaps(size: int, taken: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, end) of what ``taken`` (offset, size) leaves of ``size`` bytes."""
    result = []
    at = 0
    for offset, length in sorted(taken):
        if at < offset:
            result.append((at, offset))
        at = max(at, offset + length)
    if at < size:
        result.append((at, size))
    return result
