# SPDX-License-Identifier: Apache-2.0
"""A VFIO container: IOMMU groups with one view of memory. Their devices reach what was mapped, and nothing else."""

from __future__ import annotations

import errno
import os
import struct
from fcntl import ioctl

from . import abi
from .errors import VfioError, reason

_FOLDER = "/dev/vfio"
#: Room for the capabilities of the IOMMU's description.
_INFO_BYTES = 1024


#: Allows containers of any number of mappings; the kernel's default is 65,535.
MORE_MAPPINGS = "echo 4294967295 >/sys/module/vfio_iommu_type1/parameters/dma_entry_limit"


class Container:
    """``/dev/vfio/vfio`` with the groups that were added (``Documentation/driver-api/vfio.rst``).

    All methods raise :class:`VfioError`.
    """

    __slots__ = ("_fd", "_folder", "_groups")

    def __init__(self, folder: str = _FOLDER) -> None:
        self._folder = folder
        self._groups: dict[int, int] = {}
        self._fd = _open(f"{folder}/vfio", "the host's VFIO")
        if ioctl(self._fd, abi.GET_API_VERSION) != abi.API_VERSION or not ioctl(
            self._fd, abi.CHECK_EXTENSION, abi.TYPE1V2_IOMMU
        ):
            self.close()
            raise VfioError("this kernel's VFIO has no type 1 IOMMU", "load it: modprobe vfio_iommu_type1")

    def add_group(self, number: int) -> int:
        """Takes an IOMMU group, all of whose devices are VFIO's or nobody's; returns its file descriptor."""
        if number in self._groups:
            return self._groups[number]
        name = f"IOMMU group {number}"
        fd = _open(f"{self._folder}/{number}", name)
        try:
            status = bytearray(abi.GROUP_STATUS.pack(abi.GROUP_STATUS.size, 0))
            ioctl(fd, abi.GROUP_GET_STATUS, status)
            if not abi.GROUP_STATUS.unpack(status)[1] & abi.GROUP_VIABLE:
                raise VfioError(
                    f"{name} has devices that drivers of this machine still use",
                    "see its members with: rootvisor devices",
                )
            ioctl(fd, abi.GROUP_SET_CONTAINER, struct.pack("<i", self._fd))
            if not self._groups:
                ioctl(self._fd, abi.SET_IOMMU, abi.TYPE1V2_IOMMU)
        except OSError as error:
            os.close(fd)
            mend = "see the kernel's log: dmesg | tail"
            if error.errno == errno.EPERM:
                mend = (
                    "the IOMMU cannot remap interrupts; where every guest is trusted: "
                    "echo 1 >/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
                )
            raise VfioError(f"cannot use {name}: {reason(error)}", mend) from error
        except BaseException:
            os.close(fd)
            raise
        self._groups[number] = fd
        return fd

    def map(self, iova: int, address: int, size: int) -> None:
        """Lets devices read and write ``size`` bytes at ``address`` of this process as bus addresses from ``iova``.

        The memory is pinned; it counts as locked. All three in whole pages.
        """
        flags = abi.MAP_READ | abi.MAP_WRITE
        try:
            ioctl(self._fd, abi.IOMMU_MAP_DMA, abi.MAP_DMA.pack(abi.MAP_DMA.size, flags, address, iova, size))
        except OSError as error:
            mend = "give the partition less memory (--memory)"
            if error.errno == errno.ENOSPC:
                mend = "allow more mappings: " + MORE_MAPPINGS
            elif error.errno == errno.ENOMEM:
                mend = (
                    f"allow {size >> 10} KiB of locked memory or more (ulimit -l), run as root, or --memory"
                )
            raise VfioError(
                f"devices cannot be given {size >> 20} MiB of memory: {reason(error)}", mend
            ) from error

    def unmap(self, iova: int, size: int) -> None:
        """What was mapped there is out of the devices' reach when this returns: whole mappings, none in part."""
        request = bytearray(abi.UNMAP_DMA.pack(abi.UNMAP_DMA.size, 0, iova, size))
        try:
            ioctl(self._fd, abi.IOMMU_UNMAP_DMA, request)
        except OSError as error:
            raise VfioError(
                f"memory at {iova:#x} cannot be kept from devices: {reason(error)}",
                "see the kernel's log: dmesg | tail",
            ) from error

    def mappings_left(self) -> int | None:
        """How many more may be made; None where the kernel does not tell (before Linux 5.10)."""
        info = bytearray(_INFO_BYTES)
        abi.IOMMU_INFO.pack_into(info, 0, _INFO_BYTES, 0, 0, 0, 0)
        try:
            ioctl(self._fd, abi.IOMMU_GET_INFO, info)
        except OSError:
            return None
        _, flags, _, at, _ = abi.IOMMU_INFO.unpack_from(info)
        while flags & abi.IOMMU_CAPABILITIES and 0 < at <= _INFO_BYTES - 16:
            kind, _, following = abi.CAPABILITY_HEADER.unpack_from(info, at)
            if kind == abi.CAPABILITY_DMA_AVAILABLE:
                left: int = abi.DMA_AVAILABLE.unpack_from(info, at + abi.CAPABILITY_HEADER.size)[0]
                return left
            if following <= at:
                break
            at = following
        return None

    def close(self) -> None:
        """Gives the groups back; their devices are closed."""
        for fd in self._groups.values():
            os.close(fd)
        self._groups.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open(path: str, what: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        mend = {
            errno.ENOENT: "load the driver: modprobe vfio-pci",
            errno.ENODEV: "load the driver: modprobe vfio-pci",
            errno.EACCES: f"run as root, or: chown $USER {path}",
            errno.EBUSY: "end the other run that has it (fuser -v finds it)",
        }.get(error.errno or 0, "see: rootvisor devices")
        raise VfioError(f"cannot open {what} ({path}): {reason(error)}", mend) from error
