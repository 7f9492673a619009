# SPDX-License-Identifier: Apache-2.0
"""VFIO's user-space interface as numbers (``include/uapi/linux/vfio.h``)."""

from __future__ import annotations

import struct

API_VERSION = 0
#: Version 2 of the type 1 IOMMU: unmapping does not reach beyond what was mapped.
TYPE1V2_IOMMU = 3

# --- ioctls: _IO(';', 100 + n) --------------------------------------------------------------------------------------
GET_API_VERSION = 0x3B64
CHECK_EXTENSION = 0x3B65
SET_IOMMU = 0x3B66
GROUP_GET_STATUS = 0x3B67
GROUP_SET_CONTAINER = 0x3B68
GROUP_GET_DEVICE_FD = 0x3B6A
DEVICE_GET_INFO = 0x3B6B
DEVICE_GET_REGION_INFO = 0x3B6C
DEVICE_GET_IRQ_INFO = 0x3B6D
DEVICE_SET_IRQS = 0x3B6E
DEVICE_RESET = 0x3B6F
IOMMU_GET_INFO = 0x3B70
IOMMU_MAP_DMA = 0x3B71
IOMMU_UNMAP_DMA = 0x3B72

#: u32 argsz, flags.
GROUP_STATUS = struct.Struct("<II")
GROUP_VIABLE = 1 << 0

#: u32 argsz, flags, regions, interrupts, capability offset, padding.
DEVICE_INFO = struct.Struct("<IIIIII")
DEVICE_CAN_RESET = 1 << 0
DEVICE_IS_PCI = 1 << 1

#: u32 argsz, flags, index, capability offset; u64 size, offset in the device's file.
REGION_INFO = struct.Struct("<IIIIQQ")
REGION_MMAP = 1 << 2
REGION_CAPABILITIES = 1 << 3
#: u16 id, version; u32 offset of the next one.
CAPABILITY_HEADER = struct.Struct("<HHI")
CAPABILITY_SPARSE_MMAP = 1
#: u32 areas, reserved; then u64 offset, size of each.
SPARSE_MMAP = struct.Struct("<II")
SPARSE_AREA = struct.Struct("<QQ")

#: u32 argsz, flags, index, count.
IRQ_INFO = struct.Struct("<IIII")
IRQ_EVENTFD = 1 << 0
#: Vectors cannot be added while others are in use.
IRQ_NORESIZE = 1 << 3

#: u32 argsz, flags, index, start, count; data follow.
IRQ_SET = struct.Struct("<IIIII")
SET_DATA_NONE = 1 << 0
SET_DATA_EVENTFD = 1 << 2
SET_ACTION_UNMASK = 1 << 4
SET_ACTION_TRIGGER = 1 << 5

#: u32 argsz, flags; u64 page sizes; u32 capability offset, padding.
IOMMU_INFO = struct.Struct("<IIQII")
IOMMU_CAPABILITIES = 1 << 1
#: A capability of the IOMMU, after its header: u32 mappings that may still be made.
CAPABILITY_DMA_AVAILABLE = 3
DMA_AVAILABLE = struct.Struct("<I")

#: u32 argsz, flags; u64 IO virtual address, size, which comes back as what was unmapped.
UNMAP_DMA = struct.Struct("<IIQQ")
#: u32 argsz, flags; u64 virtual address, IO virtual address, size.
MAP_DMA = struct.Struct("<IIQQQ")
MAP_READ = 1 << 0
MAP_WRITE = 1 << 1

# --- regions and interrupts of a PCI device -------------------------------------------------------------------------
REGION_ROM = 6
REGION_CONFIG = 7
IRQ_INTX = 0
IRQ_MSI = 1
IRQ_MSIX = 2
