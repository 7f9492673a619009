# SPDX-License-Identifier: Apache-2.0
"""The guest's half for tests: RAM in a memfd, the driver's side of both ring formats, a platform that records."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rootvisor.pci import registers as pci
from rootvisor.pci.root import PciRoot
from rootvisor.virtio.device import VirtioDevice
from rootvisor.virtio.pci_function import VirtioPciFunction
from rootvisor.virtio.registers import DESC_INDIRECT, DESC_NEXT, DESC_WRITE

if TYPE_CHECKING:
    from rootvisor.pci.platform import IoHandler

RAM_BASE = 0x10_0000
RAM_BYTES = 4 << 20
CANARY_BYTES = 1 << 16
CANARY = bytes(range(1, 257 - 1)) * (CANARY_BYTES // 255) + bytes(CANARY_BYTES % 255)
MMIO32 = (0xC000_0000, 0x1000_0000)
MMIO64 = (0x40_0000_0000, 0x1000_0000)
ECAM = 0xB000_0000


class Region:
    def __init__(self, gpa: int, size: int, fd: int, fd_offset: int, address: int) -> None:
        self.gpa, self.size, self.fd, self.fd_offset, self.address = gpa, size, fd, fd_offset, address


class Memory:
    """One region of RAM at `RAM_BASE`, with a bump allocator, between pages of the same file that nobody may touch."""

    def __init__(self, size: int = RAM_BYTES) -> None:
        fd = os.memfd_create("guest")
        os.ftruncate(fd, size + 2 * CANARY_BYTES)
        whole = memoryview(mmap.mmap(fd, size + 2 * CANARY_BYTES))
        self._canaries = whole[:CANARY_BYTES], whole[-CANARY_BYTES:]
        for canary in self._canaries:
            canary[:] = CANARY
        self.map = whole[CANARY_BYTES:-CANARY_BYTES]
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.regions = (Region(RAM_BASE, size, fd, CANARY_BYTES, address),)
        self._free = RAM_BASE

    def view(self, gpa: int, length: int) -> memoryview:
        offset = gpa - RAM_BASE
        if offset < 0 or length < 0 or offset + length > len(self.map):
            raise ValueError(f"no RAM at {gpa:#x}+{length:#x}")
        return self.map[offset : offset + length]

    def allocate(self, size: int, alignment: int = 16) -> int:
        gpa = self._free + alignment - 1 & -alignment
        self._free = gpa + size
        assert self._free <= RAM_BASE + len(self.map)
        return gpa

    def place(self, data: bytes) -> int:
        gpa = self.allocate(max(len(data), 1))
        self.view(gpa, len(data))[:] = data
        return gpa

    def read(self, gpa: int, length: int) -> bytes:
        return bytes(self.view(gpa, length))

    def close(self) -> None:
        assert all(canary == CANARY for canary in self._canaries), "memory outside the guest's was written"
        os.close(self.regions[0].fd)


class Space:
    """An address space of handlers."""

    def __init__(self) -> None:
        self.ranges: dict[int, tuple[int, IoHandler]] = {}

    def add(self, base: int, length: int, handler: IoHandler) -> None:
        for start, (size, _) in self.ranges.items():
            if base < start + size and start < base + length:
                raise ValueError(f"{base:#x} is taken")
        self.ranges[base] = (length, handler)

    def remove(self, base: int) -> None:
        del self.ranges[base]

    def _find(self, address: int, size: int) -> tuple[int, IoHandler] | None:
        for base, (length, handler) in self.ranges.items():
            if base <= address and address + size <= base + length:
                return address - base, handler
        return None

    def read(self, address: int, size: int) -> int:
        found = self._find(address, size)
        return pci.all_ones(size) if found is None else found[1].read(found[0], size)

    def write(self, address: int, size: int, value: int) -> None:
        found = self._find(address, size)
        if found is not None:
            found[1].write(found[0], size, value)


class Vector:
    """An interrupt vector that records what it is told."""

    def __init__(self, bdf: int) -> None:
        self.bdf = bdf
        self.calls: list[tuple[object, ...]] = []
        self.raised = threading.Semaphore(0)
        self.count = 0
        self.masked = True
        self.fd = -1

    def program(self, address: int, data: int) -> None:
        self.calls.append(("program", address, data))

    def mask(self, masked: bool) -> None:
        self.masked = masked
        self.calls.append(("mask", masked))

    def trigger(self) -> None:
        self.count += 1
        self.raised.release()

    def eventfd(self) -> int:
        if self.fd < 0:
            self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return self.fd


class Platform:
    def __init__(self, memory: Memory | None = None) -> None:
        self.mmio = Space()
        self.ports = Space()
        self.memory = memory or Memory()
        self.vectors: list[Vector] = []
        self.ioeventfds: dict[int, int] = {}

    def msi_vector(self, bdf: int) -> Vector:
        self.vectors.append(Vector(bdf))
        return self.vectors[-1]

    def add_ioeventfd(self, gpa: int, size: int, fd: int, datamatch: int | None) -> None:
        assert gpa not in self.ioeventfds and datamatch is None
        self.ioeventfds[gpa] = fd

    def coalesce_writes(self, gpa: int, size: int, enable: bool) -> None:
        pass

    def remove_ioeventfd(self, gpa: int, size: int, fd: int, datamatch: int | None) -> None:
        assert self.ioeventfds.pop(gpa) == fd


Buffer = tuple[int, int, bool]  # address, length, device writes


class SplitDriver:
    """Driver's side of a split ring."""

    def __init__(self, memory: Memory, size: int, event_idx: bool = False) -> None:
        self.memory, self.size, self.event_idx = memory, size, event_idx
        self.desc = memory.allocate(16 * size)
        self.driver = memory.allocate(6 + 2 * size)
        self.device = memory.allocate(6 + 8 * size)
        for gpa, length in ((self.desc, 16 * size), (self.driver, 6 + 2 * size), (self.device, 6 + 8 * size)):
            memory.view(gpa, length)[:] = bytes(length)
        self.free = list(range(size))
        self.chains: dict[int, list[int]] = {}
        self.avail_index = 0
        self.used_index = 0

    def set_descriptor(self, index: int, address: int, length: int, flags: int, following: int) -> None:
        struct.pack_into(
            "<QIHH",
            self.memory.view(self.desc, 16 * self.size),
            16 * index,
            address,
            length,
            flags,
            following,
        )

    def offer(self, head: int) -> None:
        area = self.memory.view(self.driver, 6 + 2 * self.size)
        struct.pack_into("<H", area, 4 + 2 * (self.avail_index % self.size), head)
        self.avail_index = self.avail_index + 1 & 0xFFFF
        struct.pack_into("<H", area, 2, self.avail_index)

    def add(self, buffers: Sequence[Buffer], indirect: bool = False) -> int:
        if indirect:
            gpa = self.memory.allocate(16 * len(buffers))
            for i, (address, length, writes) in enumerate(buffers):
                flags = (DESC_WRITE if writes else 0) | (DESC_NEXT if i + 1 < len(buffers) else 0)
                struct.pack_into(
                    "<QIHH", self.memory.view(gpa, 16 * len(buffers)), 16 * i, address, length, flags, i + 1
                )
            slots = [self.free.pop(0)]
            self.set_descriptor(slots[0], gpa, 16 * len(buffers), DESC_INDIRECT, 0)
        else:
            slots = [self.free.pop(0) for _ in buffers]
            for i, (address, length, writes) in enumerate(buffers):
                last = i + 1 == len(buffers)
                flags = (DESC_WRITE if writes else 0) | (0 if last else DESC_NEXT)
                self.set_descriptor(slots[i], address, length, flags, 0 if last else slots[i + 1])
        self.chains[slots[0]] = slots
        self.offer(slots[0])
        return slots[0]

    def used(self) -> list[tuple[int, int]]:
        """New (head, length) pairs."""
        area = self.memory.view(self.device, 6 + 8 * self.size)
        found = []
        while struct.unpack_from("<H", area, 2)[0] != self.used_index:
            head, length = struct.unpack_from("<II", area, 4 + 8 * (self.used_index % self.size))
            self.used_index = self.used_index + 1 & 0xFFFF
            self.free += self.chains.pop(head)
            found.append((head, length))
        if self.event_idx:
            struct.pack_into(
                "<H", self.memory.view(self.driver, 6 + 2 * self.size), 4 + 2 * self.size, self.used_index
            )
        return found


class PackedDriver:
    """Driver's side of a packed ring."""

    def __init__(self, memory: Memory, size: int, event_idx: bool = False) -> None:
        self.memory, self.size, self.event_idx = memory, size, event_idx
        self.desc = memory.allocate(16 * size)
        self.driver = memory.allocate(4)
        self.device = memory.allocate(4)
        for gpa, length in ((self.desc, 16 * size), (self.driver, 4), (self.device, 4)):
            memory.view(gpa, length)[:] = bytes(length)
        self.next, self.wrap = 0, True
        self.used_next, self.used_wrap = 0, True
        self.ids = list(range(size))
        self.slots: dict[int, int] = {}

    def add(self, buffers: Sequence[Buffer], indirect: bool = False) -> int:
        ring = self.memory.view(self.desc, 16 * self.size)
        buffer_id = self.ids.pop(0)
        entries: list[tuple[int, int, int]] = []
        if indirect:
            gpa = self.memory.allocate(16 * len(buffers))
            for i, (address, length, writes) in enumerate(buffers):
                struct.pack_into(
                    "<QIHH",
                    self.memory.view(gpa, 16 * len(buffers)),
                    16 * i,
                    address,
                    length,
                    0,
                    DESC_WRITE if writes else 0,
                )
            entries.append((gpa, 16 * len(buffers), DESC_INDIRECT))
        else:
            for i, (address, length, writes) in enumerate(buffers):
                flags = (DESC_WRITE if writes else 0) | (DESC_NEXT if i + 1 < len(buffers) else 0)
                entries.append((address, length, flags))
        first, first_flags = self.next, 0
        for i, (address, length, flags) in enumerate(entries):
            flags |= 1 << 7 if self.wrap else 1 << 15
            struct.pack_into("<QIH", ring, 16 * self.next, address, length, buffer_id)
            if i:
                struct.pack_into("<H", ring, 16 * self.next + 14, flags)
            else:
                first_flags = flags
            self.next += 1
            if self.next == self.size:
                self.next, self.wrap = 0, not self.wrap
        struct.pack_into("<H", ring, 16 * first + 14, first_flags)
        self.slots[buffer_id] = len(entries)
        return buffer_id

    def used(self) -> list[tuple[int, int]]:
        ring = self.memory.view(self.desc, 16 * self.size)
        found = []
        while True:
            length, buffer_id, flags = struct.unpack_from("<IHH", ring, 16 * self.used_next + 8)
            if bool(flags & 1 << 7) != self.used_wrap or bool(flags & 1 << 15) != self.used_wrap:
                break
            self.used_next += self.slots.pop(buffer_id)
            if self.used_next >= self.size:
                self.used_next, self.used_wrap = self.used_next - self.size, not self.used_wrap
            self.ids.append(buffer_id)
            found.append((buffer_id, length))
        if self.event_idx:
            struct.pack_into(
                "<HH", self.memory.view(self.driver, 4), 0, self.used_next | self.used_wrap << 15, 2
            )
        return found


class Guest:
    """A driver of one virtio-pci function behind a root complex."""

    def __init__(self, device: VirtioDevice, platform: Platform | None = None) -> None:
        self.platform = platform or Platform()
        self.memory = self.platform.memory
        self.root = PciRoot(self.platform, ECAM, MMIO32, MMIO64)
        self.device = device
        self.function = VirtioPciFunction(device, self.platform)
        self.bdf = self.root.add(self.function)
        self.root.assign_bars()
        self.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER)
        self.bar = self.function.bar_address(self.function.bars[0])
        self.rings: dict[int, SplitDriver | PackedDriver] = {}
        self.vectors: dict[int, Vector] = {}

    def config_read(self, offset: int, size: int) -> int:
        return self.root.read(self.bdf << 12 | offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        self.root.write(self.bdf << 12 | offset, size, value)

    def capability(self, kind: int) -> int:
        """Offset of the first capability of this id."""
        offset = self.config_read(pci.CAPABILITY_POINTER, 1)
        while offset and self.config_read(offset, 1) != kind:
            offset = self.config_read(offset + 1, 1)
        return offset

    def read(self, offset: int, size: int) -> int:
        return self.platform.mmio.read(self.bar + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.platform.mmio.write(self.bar + offset, size, value)

    @property
    def status(self) -> int:
        return self.read(20, 1)

    def offered(self) -> int:
        self.write(0, 4, 0)
        low = self.read(4, 4)
        self.write(0, 4, 1)
        return low | self.read(4, 4) << 32

    def negotiate(self, features: int) -> bool:
        self.write(20, 1, 0)
        self.write(20, 1, 1)
        self.write(20, 1, 3)
        for select in (0, 1):
            self.write(8, 4, select)
            self.write(12, 4, features >> 32 * select & 0xFFFFFFFF)
        self.write(20, 1, 11)
        return bool(self.status & 8)

    def enable_msix(self) -> None:
        control = self.capability(pci.CAP_MSIX) + pci.MSIX_CONTROL
        count = (self.config_read(control, 2) & 0x7FF) + 1
        self.config_write(control, 2, pci.MSIX_CONTROL_ENABLE)
        for index in range(count):
            before = len(self.platform.vectors)
            self.write(0x2000 + 16 * index, 4, 0xFEE00000)
            self.write(0x2008 + 16 * index, 4, 0x40 + index)
            self.write(0x200C + 16 * index, 4, 0)
            if len(self.platform.vectors) > before:
                self.vectors[index] = self.platform.vectors[before]

    def set_queue(
        self, index: int, size: int, *, vector: int = 1, packed: bool = False, event_idx: bool = False
    ) -> SplitDriver | PackedDriver:
        ring: SplitDriver | PackedDriver
        ring = (PackedDriver if packed else SplitDriver)(self.memory, size, event_idx)
        self.rings[index] = ring
        self.write(22, 2, index)
        self.write(24, 2, size)
        self.write(26, 2, vector)
        for offset, address in ((32, ring.desc), (40, ring.driver), (48, ring.device)):
            self.write(offset, 4, address & 0xFFFFFFFF)
            self.write(offset + 4, 4, address >> 32)
        self.write(28, 2, 1)
        return ring

    def start(self, features: int, sizes: Sequence[int]) -> None:
        """Negotiate, set all queues up on vector 1, configuration changes on vector 0, DRIVER_OK."""
        assert self.negotiate(features)
        self.enable_msix()
        self.write(16, 2, 0)
        for index, size in enumerate(sizes):
            self.set_queue(index, size, packed=bool(features & 1 << 34), event_idx=bool(features & 1 << 29))
        self.write(20, 1, 15)

    def kick(self, index: int) -> None:
        fd = self.platform.ioeventfds.get(self.bar + 0x1000 + 4 * index)
        if fd is None:
            self.write(0x1000 + 4 * index, 2, index)
        else:
            os.eventfd_write(fd, 1)

    def wait(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        """Wait until `condition` holds, looking after every interrupt."""
        wait_until(condition, seconds)

    def request(self, index: int, buffers: Sequence[Buffer], indirect: bool = False) -> int:
        """One request on its own; returns the used length."""
        ring = self.rings[index]
        head = ring.add(buffers, indirect)
        self.kick(index)
        done: list[tuple[int, int]] = []

        def finished() -> bool:
            done.extend(ring.used())
            return bool(done)

        self.wait(finished)
        assert done[0][0] == head
        return done[0][1]

    def close(self) -> None:
        self.function.close()
        self.memory.close()


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Poll with a deadline."""
    import time

    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.0005)
