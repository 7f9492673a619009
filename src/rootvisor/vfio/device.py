# SPDX-License-Identifier: Apache-2.0
"""One PCI function of the host, as VFIO hands it out: regions, interrupts, reset."""

from __future__ import annotations

import mmap
import os
import struct
from fcntl import ioctl

from . import abi
from .errors import VfioError, reason

_PAGE = 4096
#: Room for the capabilities of a region's description.
_INFO_BYTES = 1024


class Region:
    """A BAR, the ROM or configuration space: ``size`` bytes at ``offset`` of the device's file.

    ``mappable`` are its parts (offset, size), whole pages, that can be mapped into a partition.
    """

    __slots__ = ("mappable", "offset", "size")

    def __init__(self, size: int, offset: int, mappable: list[tuple[int, int]]) -> None:
        self.size = size
        self.offset = offset
        self.mappable = mappable


class VfioDevice:
    """A device that was taken from its group (VFIO_GROUP_GET_DEVICE_FD). All methods raise :class:`VfioError`,
    but those that a partition's accesses lead to."""

    __slots__ = ("_can_reset", "_maps", "address", "fd", "regions")

    def __init__(self, group_fd: int, address: str) -> None:
        self.address = address
        self._maps: list[mmap.mmap] = []
        try:
            self.fd = ioctl(group_fd, abi.GROUP_GET_DEVICE_FD, bytearray(address.encode() + b"\0"))
        except OSError as error:
            raise VfioError(
                f"cannot take {address}: {reason(error)}", "see the kernel's log: dmesg | tail"
            ) from error
        try:
            os.set_inheritable(self.fd, False)
            self._can_reset, count = self._info()
            self.regions = [self._region(index) for index in range(min(count, abi.REGION_CONFIG + 1))]
            if len(self.regions) <= abi.REGION_CONFIG:
                raise VfioError(f"{address} has no configuration space", "give another device")
        except BaseException:
            os.close(self.fd)
            raise

    def _ioctl(self, request: int, argument: bytearray, what: str) -> int:
        try:
            result: int = ioctl(self.fd, request, argument)
        except OSError as error:
            raise VfioError(
                f"{self.address}: {what}: {reason(error)}", "see the kernel's log: dmesg | tail"
            ) from error
        return result

    def _info(self) -> tuple[bool, int]:
        info = bytearray(abi.DEVICE_INFO.pack(abi.DEVICE_INFO.size, 0, 0, 0, 0, 0))
        self._ioctl(abi.DEVICE_GET_INFO, info, "cannot be described")
        _, flags, regions, _, _, _ = abi.DEVICE_INFO.unpack(info)
        if not flags & abi.DEVICE_IS_PCI:
            raise VfioError(f"{self.address} is no PCI device for VFIO", "give another device")
        return bool(flags & abi.DEVICE_CAN_RESET), regions

    def _region(self, index: int) -> Region:
        info = bytearray(_INFO_BYTES)
        abi.REGION_INFO.pack_into(info, 0, _INFO_BYTES, 0, index, 0, 0, 0)
        try:
            ioctl(self.fd, abi.DEVICE_GET_REGION_INFO, info)
        except OSError:  # a device has no such region
            return Region(0, 0, [])
        _, flags, _, capability, size, offset = abi.REGION_INFO.unpack_from(info)
        mappable = [(0, size)] if flags & abi.REGION_MMAP and size >= _PAGE else []
        while mappable and flags & abi.REGION_CAPABILITIES and 0 < capability <= _INFO_BYTES - 16:
            kind, _, following = abi.CAPABILITY_HEADER.unpack_from(info, capability)
            if kind == abi.CAPABILITY_SPARSE_MMAP:
                count, _ = abi.SPARSE_MMAP.unpack_from(info, capability + 8)
                at = capability + 16
                count = min(count, (_INFO_BYTES - at) // abi.SPARSE_AREA.size)
                mappable = [abi.SPARSE_AREA.unpack_from(info, at + 16 * n) for n in range(count)]
            capability = following
        return Region(size, offset, mappable)

    # --- what the partition does ------------------------------------------------------------------------------------
    def read(self, region: int, offset: int, size: int) -> int:
        """Registers as the device gives them; all ones where it does not answer."""
        where = self.regions[region]
        try:
            data = os.pread(self.fd, size, where.offset + offset)
        except OSError:
            data = b""
        return int.from_bytes(data.ljust(size, b"\xff"), "little")

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        """A write to registers; what the device or VFIO does not take is dropped."""
        try:
            os.pwrite(self.fd, value.to_bytes(size, "little"), self.regions[region].offset + offset)
        except OSError:
            pass

    # --- set-up -----------------------------------------------------------------------------------------------------
    def config(self, offset: int, size: int) -> int:
        """Configuration space of the device, as VFIO shows it."""
        return self.read(abi.REGION_CONFIG, offset, size)

    def map(self, region: int, offset: int, size: int) -> int:
        """Maps a part of a region into this process; the address. It stays until the device is closed."""
        import ctypes

        try:
            mapping = mmap.mmap(
                self.fd,
                size,
                mmap.MAP_SHARED,
                mmap.PROT_READ | mmap.PROT_WRITE,
                offset=self.regions[region].offset + offset,
            )
        except OSError as error:
            raise VfioError(
                f"{self.address}: cannot map {size:#x} bytes of region {region}: {reason(error)}",
                "see the kernel's log: dmesg | tail",
            ) from error
        self._maps.append(mapping)
        return ctypes.addressof(ctypes.c_char.from_buffer(mapping))

    def rom_address(self) -> int:
        """The expansion ROM, copied into this process, for VFIO does not let it be mapped; the address.

        Bytes that the device does not give are all ones. It stays until the device is closed.
        """
        import ctypes

        where = self.regions[abi.REGION_ROM]
        copy = mmap.mmap(-1, where.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._maps.append(copy)
        at = 0
        try:
            while at < where.size:
                data = os.pread(self.fd, where.size - at, where.offset + at)
                if not data:
                    break
                copy[at : at + len(data)] = data
                at += len(data)
        except OSError:
            pass
        copy[at:] = b"\xff" * (where.size - at)
        return ctypes.addressof(ctypes.c_char.from_buffer(copy))

    def irq_count(self, index: int) -> tuple[int, bool]:
        """How many interrupts of a kind (``abi.IRQ_*``) there are, and whether each can be added by itself."""
        info = bytearray(abi.IRQ_INFO.pack(abi.IRQ_INFO.size, 0, index, 0))
        try:
            ioctl(self.fd, abi.DEVICE_GET_IRQ_INFO, info)
        except OSError:
            return 0, False
        _, flags, _, count = abi.IRQ_INFO.unpack(info)
        return (count, not flags & abi.IRQ_NORESIZE) if flags & abi.IRQ_EVENTFD else (0, False)

    def connect(self, index: int, start: int, eventfds: list[int]) -> None:
        """Interrupts of kind ``index`` from ``start`` on signal these eventfds (-1: nobody)."""
        size = abi.IRQ_SET.size + 4 * len(eventfds)
        flags = abi.SET_DATA_EVENTFD | abi.SET_ACTION_TRIGGER
        self._ioctl(
            abi.DEVICE_SET_IRQS,
            bytearray(abi.IRQ_SET.pack(size, flags, index, start, len(eventfds)))
            + struct.pack(f"<{len(eventfds)}i", *eventfds),
            "its interrupts cannot be had",
        )

    def connect_unmask(self, index: int, eventfd: int) -> None:
        """A signal of ``eventfd`` unmasks a level-triggered interrupt that VFIO has masked when it came."""
        flags = abi.SET_DATA_EVENTFD | abi.SET_ACTION_UNMASK
        self._ioctl(
            abi.DEVICE_SET_IRQS,
            bytearray(abi.IRQ_SET.pack(abi.IRQ_SET.size + 4, flags, index, 0, 1))
            + struct.pack("<i", eventfd),
            "its interrupt line cannot be had",
        )

    def disconnect(self, index: int) -> None:
        """No interrupt of this kind any more. An error means that there was none."""
        flags = abi.SET_DATA_NONE | abi.SET_ACTION_TRIGGER
        try:
            ioctl(
                self.fd,
                abi.DEVICE_SET_IRQS,
                abi.IRQ_SET.pack(abi.IRQ_SET.size, flags, index, 0, 0),
            )
        except OSError:
            pass

    def reset(self) -> bool:
        """Resets the function; whether it can."""
        if not self._can_reset:
            return False
        try:
            ioctl(self.fd, abi.DEVICE_RESET)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Unmaps and gives the device back to its group; VFIO resets it."""
        for mapping in self._maps:
            mapping.close()
        self._maps.clear()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
