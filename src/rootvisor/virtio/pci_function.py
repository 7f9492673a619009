# SPDX-License-Identifier: Apache-2.0
"""Virtio over PCI, modern devices only (virtio 1.2, section 4.1).

One 64-bit prefetchable BAR of 16 KiB, a page each for: the common, ISR and device configuration; the notification
addresses (4 bytes per queue, each an ioeventfd while its queue is enabled); the MSI-X table; its pending bits.
"""

from __future__ import annotations

import struct

from ..pci import registers as pci
from ..pci.function import PciFunction
from .registers import (
    DEVICE_BLOCK,
    DEVICE_CONSOLE,
    DEVICE_FS,
    DEVICE_NET,
    ISR_CONFIG,
    ISR_QUEUE,
    NO_VECTOR,
    PCI_CAP_COMMON,
    PCI_CAP_DEVICE,
    PCI_CAP_ISR,
    PCI_CAP_NOTIFY,
    PCI_CAP_PCI,
    PCI_DEVICE_ID_BASE,
    PCI_VENDOR_ID,
)
from .transport import QueueRegisters, Transport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..pci.bar import Bar
    from ..pci.msix import MsixTable
    from ..pci.platform import PciPlatform
    from .device import VirtioDevice

_BAR_BYTES = 0x4000
_COMMON, _COMMON_BYTES = 0x0000, 0x40
_ISR, _ISR_BYTES = 0x0080, 0x4
_DEVICE, _DEVICE_BYTES = 0x0100, 0xF00
_NOTIFY, _NOTIFY_BYTES = 0x1000, 0x1000
_MSIX_TABLE = 0x2000
# queue_select and queue_size; the three addresses of a queue: nothing happens before queue_enable (4.1.4.3).
_PASSIVE_COMMON = ((0x16, 4), (0x20, 24))
_MSIX_PBA = 0x3000
_NOTIFY_MULTIPLIER = 4
_MAX_VECTORS = 0x1000 // pci.MSIX_ENTRY_BYTES

_CLASS_CODES = {
    DEVICE_NET: 0x020000,
    DEVICE_BLOCK: 0x010000,
    DEVICE_CONSOLE: 0x078000,
    DEVICE_FS: 0x018000,
}
_CLASS_OTHER = 0xFF0000

# struct virtio_pci_cap without the two bytes of the capability header: length, type, BAR, id, padding, offset, length.
_CAPABILITY = struct.Struct("<BBBB2xII")
_WINDOW_BAR, _WINDOW_OFFSET, _WINDOW_LENGTH, _WINDOW_DATA = 4, 8, 12, 16


class VirtioPciFunction(PciFunction):
    """The PCI function of a virtio device. `transport` is its status, `device` the device itself."""

    def __init__(self, device: VirtioDevice, platform: PciPlatform) -> None:
        super().__init__(
            PCI_VENDOR_ID,
            PCI_DEVICE_ID_BASE + device.device_type,
            _CLASS_CODES.get(device.device_type, _CLASS_OTHER),
            revision=1,
            subsystem_vendor_id=PCI_VENDOR_ID,
            subsystem_id=PCI_DEVICE_ID_BASE + device.device_type,
        )
        self.device = device
        self._bus_master = False
        self._bar = bar = self.add_bar(0, _BAR_BYTES, wide=True, prefetchable=True)
        msix = self.add_msix(min(device.vectors, _MAX_VECTORS), bar, _MSIX_TABLE, _MSIX_PBA)
        self.transport = transport = PciTransport(device, platform, bar, msix)
        transport.set_dma(False)
        self._platform = platform
        # Ranges (offset, bytes) whose writes take effect with a later access elsewhere, and where they are mapped.
        self._passive = [*_PASSIVE_COMMON, *((_MSIX_TABLE + 16 * n, 12) for n in range(msix.count))]
        self._passive_at: int | None = None
        bar.add_region(_COMMON, _COMMON_BYTES, _CommonConfig(transport))
        bar.add_region(_ISR, _ISR_BYTES, _IsrStatus(transport))
        bar.add_region(_DEVICE, _DEVICE_BYTES, _DeviceConfig(device))
        bar.add_region(_NOTIFY, _NOTIFY_BYTES, _Notify(transport))
        self._add_window(PCI_CAP_COMMON, _COMMON, _COMMON_BYTES)
        self._add_window(PCI_CAP_ISR, _ISR, _ISR_BYTES)
        self._add_window(PCI_CAP_DEVICE, _DEVICE, _DEVICE_BYTES)
        self._add_window(PCI_CAP_NOTIFY, _NOTIFY, _NOTIFY_BYTES, _NOTIFY_MULTIPLIER.to_bytes(4, "little"))
        self._window = self._add_window(PCI_CAP_PCI, 0, 0, bytes(4))
        self.config.set_mask(self._window + _WINDOW_BAR, 1, 0xFF)
        self.config.set_mask(self._window + _WINDOW_OFFSET, 8, (1 << 64) - 1)
        self.config.set_mask(self._window + _WINDOW_DATA, 4, 0xFFFFFFFF)

    @property
    def config_is_plain(self) -> bool:
        """Not while the PCI_CFG window is open: its data is the BAR's."""
        return self._window_access() is None

    def config_read(self, offset: int, size: int) -> int:
        """As any function; a read of the PCI_CFG window's data reads the BAR (4.1.4.9)."""
        data = self._window + _WINDOW_DATA
        if offset < data + 4 and offset + size > data:
            access = self._window_access()
            if access is not None:
                self.config.set(data, 4, self._bar.read(*access))
        return super().config_read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """As any function; a write of the PCI_CFG window's data writes the BAR."""
        super().config_write(offset, size, value)
        data = self._window + _WINDOW_DATA
        if offset < data + 4 and offset + size > data:
            access = self._window_access()
            if access is not None:
                self._bar.write(*access, self.config.get(data, access[1]))
        if offset <= pci.COMMAND < offset + size:
            bus_master = bool(self.command & pci.COMMAND_BUS_MASTER)
            if bus_master != self._bus_master:
                self._bus_master = bus_master
                self.transport.set_dma(bus_master)

    def reset(self) -> None:
        """Function and device back to the state after power-on."""
        self.transport.reset()
        self._bus_master = False
        self.transport.set_dma(False)
        super().reset()

    def bar_moved(self, bar: Bar) -> None:
        """Notification addresses and the registers that need no exit move with the BAR."""
        self.transport.move_ioeventfds()
        for offset, size in self._passive:
            if self._passive_at is not None:
                self._platform.coalesce_writes(self._passive_at + offset, size, False)
            if bar.mapped_at is not None:
                self._platform.coalesce_writes(bar.mapped_at + offset, size, True)
        self._passive_at = bar.mapped_at

    def pause(self) -> None:
        """See `Transport.pause`."""
        self.transport.pause()

    def resume(self) -> None:
        """See `Transport.resume`."""
        self.transport.resume()

    def save(self) -> dict[str, object]:
        """Function and device; while paused."""
        return {**super().save(), "virtio": self.transport.save()}

    def restore(self, state: dict[str, Any]) -> None:
        """Function and device; paused until `resume`. Raises `ValueError`."""
        virtio = state.get("virtio")
        if not isinstance(virtio, dict):
            raise ValueError(f"the saved state of {self.describe()} lacks its device")
        self.transport.restore(virtio)
        try:
            super().restore(state)
        except ValueError:
            self.reset()
            raise
        self._bus_master = bool(self.command & pci.COMMAND_BUS_MASTER)
        self.transport.set_dma(self._bus_master)

    def close(self) -> None:
        """Stop the device and release its resources."""
        self.transport.close()

    def _add_window(self, kind: int, offset: int, length: int, more: bytes = b"") -> int:
        body = _CAPABILITY.pack(16 + len(more), kind, self._bar.index, 0, offset, length) + more
        return self.config.add_capability(pci.CAP_VENDOR, body)

    def _window_access(self) -> tuple[int, int] | None:
        config, window = self.config, self._window
        offset = config.get(window + _WINDOW_OFFSET, 4)
        size = config.get(window + _WINDOW_LENGTH, 4)
        if config.get(window + _WINDOW_BAR, 1) != self._bar.index or size not in (1, 2, 4) or offset % size:
            return None
        return offset, size


class PciTransport(Transport):
    """Interrupts by MSI-X, notifications by ioeventfd."""

    def __init__(self, device: VirtioDevice, platform: PciPlatform, bar: Bar, msix: MsixTable) -> None:
        super().__init__(device, platform.memory)
        self.config_vector = NO_VECTOR
        self.feature_select = 0
        self.driver_feature_select = 0
        self.queue_select = 0
        self._isr = 0
        self._platform = platform
        self._bar = bar
        self._msix = msix
        self._ioeventfds: dict[int, int] = {}

    def save(self) -> dict[str, object]:
        """With the registers of the PCI form."""
        select = [self.feature_select, self.driver_feature_select, self.queue_select]
        return {**super().save(), "select": select, "config_vector": self.config_vector, "isr": self._isr}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self.feature_select, self.driver_feature_select, self.queue_select = map(int, state["select"])
        self.config_vector = self.vector(int(state["config_vector"]))
        self._isr = int(state["isr"])
        for registers in self.registers:
            registers.vector = self.vector(registers.vector)

    def read_isr(self) -> int:
        """The ISR status; reading clears it."""
        isr, self._isr = self._isr, 0
        return isr

    def vector(self, value: int) -> int:
        """A vector as the driver chose it, NO_VECTOR for one that does not exist."""
        return value if value < self._msix.count else NO_VECTOR

    def queue_interrupt(self, registers: QueueRegisters) -> None:
        """Raise the queue's vector."""
        self._isr |= ISR_QUEUE
        if registers.vector != NO_VECTOR:
            self._msix.trigger(registers.vector)

    def config_interrupt(self) -> None:
        """Raise the configuration vector."""
        self._isr |= ISR_CONFIG
        if self.config_vector != NO_VECTOR:
            self._msix.trigger(self.config_vector)

    def call_fd(self, registers: QueueRegisters) -> int:
        """The eventfd of the queue's vector."""
        return -1 if registers.vector == NO_VECTOR else self._msix.eventfd(registers.vector)

    def queue_live(self, registers: QueueRegisters, live: bool) -> None:
        """Have the platform turn notifications into eventfd signals without us."""
        if live:
            self._add_ioeventfd(registers)
        else:
            self._remove_ioeventfd(registers)

    def move_ioeventfds(self) -> None:
        """The BAR was mapped elsewhere or not at all."""
        with self.device.lock:
            for registers in self.registers:
                self._remove_ioeventfd(registers)
                if registers.enabled:
                    self._add_ioeventfd(registers)

    def reset(self) -> None:
        """Device reset; the driver's register choices go too."""
        with self.device.lock:
            super().reset()
            self.config_vector = NO_VECTOR
            self._isr = 0

    def _add_ioeventfd(self, registers: QueueRegisters) -> None:
        if self._bar.mapped_at is None:
            return
        gpa = self._bar.mapped_at + _NOTIFY + _NOTIFY_MULTIPLIER * registers.index
        try:
            self._platform.add_ioeventfd(gpa, 0, registers.kick_fd, None)
        except OSError:
            return  # then the write comes to `_Notify`
        self._ioeventfds[registers.index] = gpa

    def _remove_ioeventfd(self, registers: QueueRegisters) -> None:
        gpa = self._ioeventfds.pop(registers.index, None)
        if gpa is not None:
            self._platform.remove_ioeventfd(gpa, 0, registers.kick_fd, None)


class _Notify:
    __slots__ = ("_transport",)

    def __init__(self, transport: PciTransport) -> None:
        self._transport = transport

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._transport.notify(offset // _NOTIFY_MULTIPLIER)


class _IsrStatus:
    __slots__ = ("_transport",)

    def __init__(self, transport: PciTransport) -> None:
        self._transport = transport

    def read(self, offset: int, size: int) -> int:
        return self._transport.read_isr() if offset == 0 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Read-only."""


class _DeviceConfig:
    __slots__ = ("_device",)

    def __init__(self, device: VirtioDevice) -> None:
        self._device = device

    def read(self, offset: int, size: int) -> int:
        return self._device.read_config(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._device.lock:
            self._device.write_config(offset, size, value)


# struct virtio_pci_common_cfg (4.1.4.3) with queue_notify_data and queue_reset; padded to 64 bytes.
_SNAPSHOT = struct.Struct("<IIIIHHBBHHHHHQQQHH4x")
_ADDRESS_AREAS = {32: "desc", 40: "driver", 48: "device"}


class _CommonConfig:
    """The common configuration structure. Drivers use each field's own width; other writes are dropped."""

    __slots__ = ("_transport",)

    def __init__(self, transport: PciTransport) -> None:
        self._transport = transport

    def read(self, offset: int, size: int) -> int:
        transport = self._transport
        if offset == 20 and size == 1:
            return transport.status
        if offset == 4 and size == 4:
            return self._offered()
        return int.from_bytes(self._snapshot()[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        transport = self._transport
        if size == 4 and offset < 16:
            if offset == 0:
                transport.feature_select = value
            elif offset == 8:
                transport.driver_feature_select = value
            elif offset == 12 and transport.driver_feature_select < 2:
                transport.set_driver_features(value, 32 * transport.driver_feature_select)
        elif size == 2:
            self._write_16(offset, value)
        elif size == 1:
            if offset == 20:
                transport.set_status(value)
        elif 32 <= offset < 56 and offset % size == 0:
            registers = self._selected()
            if registers is not None:
                shift = 8 * (offset & 7)
                transport.set_queue_address(registers, _ADDRESS_AREAS[offset & ~7], shift, size, value)

    def _write_16(self, offset: int, value: int) -> None:
        transport = self._transport
        if offset == 16:
            transport.config_vector = transport.vector(value)
            return
        if offset == 22:
            transport.queue_select = value
            return
        registers = self._selected()
        if registers is None:
            return
        if offset == 24:
            transport.set_queue_size(registers, value)
        elif offset == 26:
            registers.vector = transport.vector(value)
        elif offset == 28 and value == 1:
            transport.enable_queue(registers)
        elif offset == 58 and value == 1:
            transport.reset_queue(registers)

    def _selected(self) -> QueueRegisters | None:
        transport = self._transport
        index = transport.queue_select
        return transport.registers[index] if index < len(transport.registers) else None

    def _offered(self) -> int:
        transport = self._transport
        select = transport.feature_select
        return transport.device.features >> 32 * select & 0xFFFFFFFF if select < 2 else 0

    def _snapshot(self) -> bytes:
        transport = self._transport
        select = transport.driver_feature_select
        chosen = transport.driver_features >> 32 * select & 0xFFFFFFFF if select < 2 else 0
        queue = self._selected() or _NO_QUEUE
        return _SNAPSHOT.pack(
            transport.feature_select,
            self._offered(),
            select,
            chosen,
            transport.config_vector,
            len(transport.registers),
            transport.status,
            transport.generation,
            transport.queue_select,
            queue.size,
            queue.vector,
            queue.enabled,
            queue.index,
            queue.desc,
            queue.driver,
            queue.device,
            queue.index,
            0,
        )


_NO_QUEUE = QueueRegisters(0, 0)
