# SPDX-License-Identifier: Apache-2.0
"""Where everything lies in the physical address space of a computer of ours: the root partition's, or a VMM's guest.

    0            RAM; 0x9FC00..0x100000 reserved (tables)     1 MiB .. low end: RAM
    0xC0000000   32-bit PCI window    0xE0000000 ECAM    0xFEC00000 IO-APIC    0xFEE00000 local APICs
    4 GiB        RAM above 3 GiB      half of the address width: 64-bit PCI window

The root partition has pages that the hypervisor owns: RAM near the end of the low part, behind a setup_data node. Linux
reserves such nodes for ever and keeps them in its direct map, which both kinds of owned pages need. Ordinary RAM
follows them, because Linux 6.12 leaves reserved nodes out when it looks for the end of memory, and then stumbles over
pages without a memory map (``e820__end_of_ram_pfn``, ``free_area_init``).
"""

from __future__ import annotations

from .zero_page import E820_RAM, E820_RESERVED

PAGE = 4096
MIB = 1 << 20
GIB = 1 << 30

ZERO_PAGE = 0x7000
COMMAND_LINE = 0x8000
ENTRY_TABLES = 0x10000
LOW_RESERVED = 0x9FC00
ACPI_TABLES = 0xE0000
HIGH_RAM_START = 4 * GIB
LOW_RAM_MAX = 0xC0000000
MMIO32 = (0xC0000000, 0x20000000)
ECAM = 0xE0000000
IOAPIC = 0xFEC00000
IOAPIC_ID = 0
IO_WINDOW = (0xC000, 0x3000)
COM1 = (0x3F8, 4)
SCI_GSI = 9
PM1_EVENT = 0x600
PM1_CONTROL = 0x604
PM_TIMER = 0x608
GPE_BLOCK = 0x610
PCI_HOTPLUG = 0x620

#: RAM behind the owned pages.
ABOVE_OWNED = 2 * MIB
HYPERVISOR_NODE_HEADER = (
    PAGE  # the node's 16-byte header has a page of its own, so that owned pages are aligned
)


class MemoryMap:
    """RAM of ``size`` bytes, ``owned_pages`` of it for the hypervisor; GPAs have ``address_bits``.

    ``low`` and ``high``: bytes of RAM below and above 4 GiB. ``node_gpa``: the set-up data node in front of
    ``owned_gpa``, both 0 when nothing is owned. ``initrd_end``: where an initial ramdisk ends at the latest.
    """

    __slots__ = ("high", "initrd_end", "low", "mmio64", "node_gpa", "owned_gpa", "owned_pages", "size")

    def __init__(self, size: int, address_bits: int, owned_pages: int = 0) -> None:
        self.size = size
        self.low = min(size, LOW_RAM_MAX)
        self.high = size - self.low
        self.owned_pages = owned_pages
        self.node_gpa = self.owned_gpa = 0
        self.initrd_end = self.low
        if owned_pages:
            self.node_gpa = self.low - ABOVE_OWNED - owned_pages * PAGE - HYPERVISOR_NODE_HEADER
            self.owned_gpa = self.node_gpa + HYPERVISOR_NODE_HEADER
            self.initrd_end = self.node_gpa
        half = 1 << (min(address_bits, 46) - 1)
        base = max(half, HIGH_RAM_START + self.high + GIB - 1 & ~(GIB - 1))
        self.mmio64 = (base, min(64 * GIB, (1 << min(address_bits, 46)) - base))

    def e820(self) -> list[tuple[int, int, int]]:
        """The map for the kernel: (base, size, type)."""
        entries = [
            (0, LOW_RESERVED, E820_RAM),
            (LOW_RESERVED, MIB - LOW_RESERVED, E820_RESERVED),
            (MIB, self.low - MIB, E820_RAM),
            (ECAM, MIB, E820_RESERVED),
        ]
        if self.high:
            entries.append((HIGH_RAM_START, self.high, E820_RAM))
        return entries
