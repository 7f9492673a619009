# SPDX-License-Identifier: Apache-2.0
"""A device's life as its driver sees it, whatever the transport: status, features, queues (virtio 1.2, 2 and 3)."""

from __future__ import annotations

import os

from .packed_ring import PackedQueue
from .queue import Queue, QueueAddresses, QueueError
from .registers import (
    F_RING_PACKED,
    F_RING_RESET,
    F_VERSION_1,
    NO_VECTOR,
    STATUS_DRIVER_OK,
    STATUS_FAILED,
    STATUS_FEATURES_OK,
    STATUS_NEEDS_RESET,
)
from .split_ring import SplitQueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..pci.platform import GuestMemory
    from .device import VirtioDevice

_MASK_64 = (1 << 64) - 1


class QueueRegisters:
    """What the driver wrote about one queue, and the queue made of it."""

    __slots__ = (
        "desc",
        "device",
        "driver",
        "enabled",
        "index",
        "kick_fd",
        "max_size",
        "queue",
        "size",
        "vector",
    )

    def __init__(self, index: int, max_size: int) -> None:
        self.index = index
        self.max_size = max_size
        self.kick_fd = -1
        self.queue: Queue | None = None
        self.clear()

    def clear(self) -> None:
        """Back to the values after a reset."""
        self.size = self.max_size
        self.desc = 0
        self.driver = 0
        self.device = 0
        self.vector = NO_VECTOR
        self.enabled = False
        self.queue = None

    def save(self, position: list[int] | None) -> list[object]:
        """As `restore` takes it, with the place in the ring."""
        addresses = [self.desc, self.driver, self.device]
        return [self.size, *addresses, self.vector, self.enabled, position]

    def restore(self, saved: list[Any]) -> list[int] | None:
        """Take saved registers; returns the place in the ring."""
        size, desc, driver, device, vector, enabled, position = saved
        if not 0 < size <= self.max_size:
            raise ValueError(f"queue {self.index} has at most {self.max_size} entries, not {size}")
        self.size = size
        self.desc, self.driver, self.device = desc & _MASK_64, driver & _MASK_64, device & _MASK_64
        self.vector = vector & 0xFFFF
        self.enabled = bool(enabled)
        return position if position is None else list(position)


class Transport:
    """Status, features and queues of one device. A transport turns register accesses into calls of these methods.

    Methods that change anything take the device's lock, so they wait for a request that is being served.
    """

    def __init__(self, device: VirtioDevice, memory: GuestMemory) -> None:
        self.device = device
        self.status = 0
        self.generation = 0
        self.driver_features = 0
        self.registers = [QueueRegisters(index, size) for index, size in enumerate(device.queue_sizes)]
        self._memory = memory
        self._dma = True
        self._closed = False
        self._paused = False
        self._restored = False
        device.memory = memory
        device.config_changed = self.config_changed
        device.request_reset = self._needs_reset

    # What a concrete transport provides.

    def queue_interrupt(self, registers: QueueRegisters) -> None:
        """Tell the driver that a queue has used buffers."""
        raise NotImplementedError

    def config_interrupt(self) -> None:
        """Tell the driver that the configuration (or the status) changed."""
        raise NotImplementedError

    def call_fd(self, registers: QueueRegisters) -> int:
        """An eventfd for other processes that does what `queue_interrupt` does, -1 when there is no vector."""
        raise NotImplementedError

    def queue_live(self, registers: QueueRegisters, live: bool) -> None:
        """`registers.kick_fd` is to be signalled by the driver's notifications from now on, or no more."""

    # What it calls.

    def set_driver_features(self, value: int, shift: int) -> None:
        """32 bits of the driver's choice, at bit `shift`; too late once FEATURES_OK is set."""
        with self.device.lock:
            if not self.status & STATUS_FEATURES_OK and shift < 64:
                self.driver_features &= ~(0xFFFFFFFF << shift)
                self.driver_features |= value << shift

    def set_status(self, value: int) -> None:
        """The driver wrote the device status; 0 resets. Bits once set stay until then."""
        with self.device.lock:
            if value == 0:
                self.reset()
                return
            old = self.status
            new = old | value & ~(STATUS_NEEDS_RESET | STATUS_FEATURES_OK | STATUS_DRIVER_OK)
            if value & STATUS_FEATURES_OK and (old & STATUS_FEATURES_OK or self._features_ok()):
                new |= STATUS_FEATURES_OK
            if value & STATUS_DRIVER_OK and new & STATUS_FEATURES_OK:
                new |= STATUS_DRIVER_OK
            self.status = new
            started = new & ~old & STATUS_DRIVER_OK
            if started and not new & (STATUS_FAILED | STATUS_NEEDS_RESET):
                self._activate()

    def enable_queue(self, registers: QueueRegisters) -> None:
        """The driver wrote 1 to queue_enable. A queue outside guest RAM breaks the device."""
        with self.device.lock:
            if registers.enabled or not self.status & STATUS_FEATURES_OK or not registers.size:
                return
            if self.status & STATUS_NEEDS_RESET or self._closed:
                return
            try:
                registers.queue = self._make_queue(registers)
            except QueueError as error:
                self.device.fail(str(error))
                return
            registers.queue.dma = self._dma and not self._paused
            registers.enabled = True
            self.queue_live(registers, True)
            if self.device.active:
                self.device.start_queue(registers.queue)

    def reset_queue(self, registers: QueueRegisters) -> None:
        """The driver wrote 1 to queue_reset (feature RING_RESET)."""
        with self.device.lock:
            if self.driver_features & F_RING_RESET and self.status & STATUS_FEATURES_OK:
                self._stop_queue(registers)
                registers.clear()

    def set_queue_size(self, registers: QueueRegisters, size: int) -> None:
        """A size the ring format cannot have, or above the maximum, is not taken."""
        packed = self.driver_features & F_RING_PACKED
        if not registers.enabled and 0 < size <= registers.max_size and (packed or not size & size - 1):
            registers.size = size

    def set_queue_address(
        self, registers: QueueRegisters, area: str, shift: int, size: int, value: int
    ) -> None:
        """Part (or all) of one area's address; ignored while the queue is enabled."""
        if not registers.enabled:
            mask = ((1 << 8 * size) - 1) << shift
            address = getattr(registers, area) & ~mask | value << shift & mask
            setattr(registers, area, address & _MASK_64)

    def notify(self, index: int) -> None:
        """The driver's notification arrived as a register write instead of through the eventfd."""
        if index < len(self.registers):
            registers = self.registers[index]
            if registers.enabled and registers.kick_fd >= 0:
                os.eventfd_write(registers.kick_fd, 1)

    def set_dma(self, enabled: bool) -> None:
        """The device may, or may not, touch guest memory and raise interrupts."""
        with self.device.lock:
            if enabled != self._dma:
                self._dma = enabled
                if not self._paused:
                    self._apply_dma()

    def pause(self) -> None:
        """Touch no guest memory and have no request under way, until `resume`. The processors are stopped.

        Raises `VhostError` when a backend does not come to an end with its requests; then nothing has changed.
        """
        with self.device.lock:
            if not self._paused:
                self.device.pause()
                self._paused = True
                self._apply_dma()

    def resume(self) -> None:
        """Go on after `pause`, or begin after `restore`."""
        with self.device.lock:
            if not self._paused:
                return
            self._paused = False
            restored, self._restored = self._restored, False
            if restored and self._runs():
                self._activate()
            self._apply_dma()
            if restored and self.device.active:
                # What was done before the snapshot may not have been told; one interrupt too many does no harm.
                for registers in self.registers:
                    if registers.queue is not None and self._dma:
                        self.queue_interrupt(registers)

    def save(self) -> dict[str, object]:
        """Everything about device and driver that `restore` needs, as plain data that `marshal` takes.

        Only while paused.
        """
        with self.device.lock:
            if not self._paused:
                raise RuntimeError(f"{self.device.name} is saved while it runs")
            queues: list[object] = []
            for registers in self.registers:
                queue = registers.queue
                position = None if queue is None else self.device.save_ring(queue)
                queues.append(registers.save(position))
            return {
                "type": self.device.device_type,
                "status": self.status,
                "generation": self.generation,
                "features": self.driver_features,
                "queues": queues,
                "device": self.device.save(),
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Make a device that no driver has touched what another one was when it was saved; paused until `resume`.

        Raises `ValueError` when the state is another device's, or the driver uses what this one does not offer.
        """
        device = self.device
        with device.lock:
            try:
                self._restore(state)
            except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
                self.reset()
                raise ValueError(f"the saved state of {device.name} is damaged: {error!r}") from error
            except QueueError as error:
                self.reset()
                raise ValueError(f"the saved state of {device.name}: {error}") from error
            except ValueError:
                self.reset()
                raise

    def _restore(self, state: dict[str, Any]) -> None:
        device = self.device
        if self.status or device.active:
            raise ValueError(f"{device.name} is in use")
        queues, features = state["queues"], state["features"]
        if state["type"] != device.device_type or len(queues) > len(self.registers):
            raise ValueError(f"the saved state is of another device than {device.name}")
        missing = features & ~device.features
        if missing:
            raise ValueError(f"{device.name} lacks features that the guest uses: {missing:#x}")
        self._paused = True
        self._restored = True
        self.status, self.generation = state["status"] & 0xFF, state["generation"] & 0xFF
        self.driver_features = features
        device.restore(state["device"])
        for registers, saved in zip(self.registers, queues, strict=False):
            position = registers.restore(saved)
            if registers.enabled:
                registers.queue = self._make_queue(registers)
                registers.queue.dma = False
                if position is not None:
                    device.restore_ring(registers.queue, position)
                self.queue_live(registers, True)

    def _runs(self) -> bool:
        stopped = self.status & (STATUS_FAILED | STATUS_NEEDS_RESET)
        return bool(self.status & STATUS_DRIVER_OK) and not stopped

    def _apply_dma(self) -> None:
        enabled = self._dma and not self._paused
        for registers in self.registers:
            if registers.queue is not None:
                registers.queue.dma = enabled
        self.device.set_dma(enabled)

    def _make_queue(self, registers: QueueRegisters) -> Queue:
        """Raises `QueueError`."""
        if registers.kick_fd < 0:
            registers.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        kind = PackedQueue if self.driver_features & F_RING_PACKED else SplitQueue
        return kind(
            self._memory,
            registers.index,
            QueueAddresses(registers.size, registers.desc, registers.driver, registers.device),
            self.driver_features,
            kick_fd=registers.kick_fd,
            interrupt=lambda: self.queue_interrupt(registers),
            call_fd=lambda: self.call_fd(registers),
            counters=self.device.counters[registers.index],
        )

    def config_changed(self) -> None:
        """The device's configuration structure reads differently now."""
        with self.device.lock:
            self.generation = self.generation + 1 & 0xFF
            if self.status & STATUS_DRIVER_OK:
                self.config_interrupt()

    def reset(self) -> None:
        """Forget everything the driver did."""
        with self.device.lock:
            self.device.reset()
            for registers in self.registers:
                self._stop_queue(registers)
                registers.clear()
            self.status = 0
            self.driver_features = 0
            self._restored = False

    def close(self) -> None:
        """Stop the device for good and release its descriptors."""
        with self.device.lock:
            self.reset()
            self._closed = True
        self.device.close()
        for registers in self.registers:
            fd, registers.kick_fd = registers.kick_fd, -1
            if fd >= 0:
                os.close(fd)

    def _features_ok(self) -> bool:
        features = self.driver_features
        if features & ~self.device.features or not features & F_VERSION_1:
            return False
        return self.device.accepts(features)

    def _activate(self) -> None:
        self.device.activate([registers.queue for registers in self.registers], self.driver_features)

    def _stop_queue(self, registers: QueueRegisters) -> None:
        queue = registers.queue
        if queue is not None:
            self.queue_live(registers, False)
            if self.device.queues[registers.index] is queue:
                self.device.stop_queue(queue)
            registers.queue = None
            try:
                os.eventfd_read(registers.kick_fd)
            except BlockingIOError:
                pass

    def _needs_reset(self) -> None:
        with self.device.lock:
            self.status |= STATUS_NEEDS_RESET
            if self.status & STATUS_DRIVER_OK:
                self.config_interrupt()
