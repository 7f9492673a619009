# SPDX-License-Identifier: Apache-2.0
"""DMA that the IOMMU refused, as the host's kernel tells it. VFIO has no other word for it than the kernel's log.

Intel: ``drivers/iommu/intel/dmar.c:dmar_fault_do_one``; AMD: ``drivers/iommu/amd/iommu.c:amd_iommu_report_page_fault``.
Both kernels say ten at most in five seconds, and drop the rest.
"""

from __future__ import annotations

import os

_RECORD_BYTES = 8192
_AMD_WRITE = 1 << 5


class DmaFault:
    """``device`` (as sysfs writes it) wanted to write, or else read, at bus address ``iova``."""

    __slots__ = ("device", "iova", "write")

    def __init__(self, device: str, iova: int, write: bool) -> None:
        self.device = device
        self.iova = iova
        self.write = write


class FaultLog:
    """Faults of some devices from now on. ``fd`` becomes readable; -1 where the log may not be read."""

    __slots__ = ("_devices", "fd")

    def __init__(self, devices: list[str], path: str = "/dev/kmsg") -> None:
        self._devices = devices
        self.fd = -1
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self.fd, 0, os.SEEK_END)
        except OSError:
            self.close()

    def read(self) -> list[DmaFault]:
        """The faults that were told since the last call."""
        found = []
        while self.fd >= 0:
            try:
                record = os.read(self.fd, _RECORD_BYTES)
            except BlockingIOError:
                break
            except BrokenPipeError:  # what stood there has been overwritten: on to the oldest there is
                continue
            except OSError:
                self.close()
                break
            if not record:
                break
            fault = parse(record.decode("utf-8", "replace"), self._devices)
            if fault is not None:
                found.append(fault)
        return found

    def close(self) -> None:
        """Hears no more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def parse(record: str, devices: list[str]) -> DmaFault | None:
    """The fault that a record of ``/dev/kmsg`` tells of one of ``devices``; None for anything else."""
    text = record.partition(";")[2].partition("\n")[0]
    try:
        if text.startswith("DMAR: [DMA "):
            # Intel writes bus, device and function without the segment; its IOMMUs of other segments say so elsewhere
            place = text.partition("Request device [")[2].partition("]")[0]
            device = next((one for one in devices if one.endswith(f":{place}") and place), "")
            iova = int(text.partition("fault addr ")[2].split()[0], 16)
            return DmaFault(device, iova, text.startswith("DMAR: [DMA Write")) if device else None
        if "AMD-Vi: Event logged [IO_PAGE_FAULT" in text:
            device = next((one for one in devices if f" {one}: " in text), "")
            iova = int(text.partition("address=")[2].split()[0], 16)
            flags = int(text.partition("flags=")[2].partition("]")[0], 16)
            return DmaFault(device, iova, bool(flags & _AMD_WRITE)) if device else None
    except (ValueError, IndexError):
        pass
    return None
