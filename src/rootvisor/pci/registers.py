# SPDX-License-Identifier: Apache-2.0
"""PCI configuration space: offsets and bits (PCI Local Bus 3.0 chapter 6, PCI Express Base 3.0 chapter 7)."""

from __future__ import annotations

CONFIG_SPACE_BYTES = 4096

# Type 0 header.
VENDOR_ID = 0x00
DEVICE_ID = 0x02
COMMAND = 0x04
STATUS = 0x06
REVISION_ID = 0x08
CLASS_CODE = 0x09
CACHE_LINE_SIZE = 0x0C
HEADER_TYPE = 0x0E
BAR_0 = 0x10
SUBSYSTEM_VENDOR_ID = 0x2C
SUBSYSTEM_ID = 0x2E
ROM_BASE = 0x30
CAPABILITY_POINTER = 0x34
INTERRUPT_LINE = 0x3C
INTERRUPT_PIN = 0x3D
FIRST_CAPABILITY = 0x40
BAR_COUNT = 6

COMMAND_IO = 1 << 0
COMMAND_MEMORY = 1 << 1
COMMAND_BUS_MASTER = 1 << 2
# IO, memory, bus master, parity error response, SERR, INTx disable.
COMMAND_WRITABLE = 0x0547

STATUS_CAPABILITY_LIST = 1 << 4

# Low bits of a BAR (PCI 3.0, 6.2.5.1).
BAR_IO = 0x1
BAR_MEMORY_64 = 0x4
BAR_PREFETCHABLE = 0x8

# The expansion ROM's base address register (PCI 3.0, 6.2.5.2).
ROM_ENABLE = 1 << 0
ROM_MIN_BYTES = 2048

# Capability ids.
CAP_POWER = 0x01
CAP_MSI = 0x05
CAP_VENDOR = 0x09
CAP_EXPRESS = 0x10
CAP_MSIX = 0x11

# MSI-X capability, offsets from its start, and message control bits (PCI 3.0, 6.8.2).
MSIX_CONTROL = 2
MSIX_TABLE = 4
MSIX_PBA = 8
MSIX_CONTROL_ENABLE = 1 << 15
MSIX_CONTROL_FUNCTION_MASK = 1 << 14
MSIX_ENTRY_BYTES = 16
MSIX_ENTRY_MASKED = 1 << 0
MSIX_MAX_VECTORS = 2048

# PCI Express capability (PCIe 3.0, 7.8): version 2, root complex integrated endpoint.
EXPRESS_BYTES = 0x3C
EXPRESS_FLAGS = 2 | 9 << 4
EXPRESS_DEVICE_CAPABILITIES = 1 << 15  # role-based error reporting, which the specification demands
EXPRESS_DEVICE_CONTROL = 8
EXPRESS_DEVICE_CONTROL_WRITABLE = 0x78FF


def all_ones(size: int) -> int:
    """What a read of `size` bytes gives where nothing answers."""
    return (1 << 8 * size) - 1
