# SPDX-License-Identifier: Apache-2.0
"""Processor state for the 64-bit entry of Linux, as plain numbers, and the tables in memory behind it.

The 64-bit boot protocol (kernel ``Documentation/arch/x86/boot.rst``) asks for: long mode with paging, an
identity map of the kernel, zero page and command line, CS 0x10 executable and DS/ES/SS 0x18 writable (flat),
interrupts off, RSI = the zero page.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

ENTRY_TABLES_SIZE: Final = 7 * 4096
"""Bytes that :func:`write_entry_tables` fills: a page with the GDT, a PML4, a PDPT and four page
directories."""
IDENTITY_MAP_BYTES: Final = 4 << 30
"""Guest memory that the page tables map one to one, with 2 MiB pages."""

CR0: Final = 0x80050033
"""PG, AM, WP, NE, ET, MP, PE."""
CR4: Final = 0x20
"""PAE."""
EFER: Final = 0x500
"""LME, LMA."""
RFLAGS: Final = 0x2
"""Only the bit that is always one: interrupts off."""

CODE_SELECTOR: Final = 0x10
DATA_SELECTOR: Final = 0x18
TASK_SELECTOR: Final = 0x20

_GDT = struct.pack(
    "<6Q",
    0,
    0,
    0x00AF9B000000FFFF,  # 0x10: 64-bit code, accessed
    0x00CF93000000FFFF,  # 0x18: data, accessed
    0x00008B0000000067,  # 0x20: busy 64-bit TSS at 0
    0,
)
_PRESENT_WRITABLE = 0x3
_LARGE = 0x80
_PAGE = 4096
_2_MIB = 2 << 20
_SEGMENT_CODE = (0, 0xFFFFFFFF, CODE_SELECTOR, 0xB, 1, 0, 0, 1, 1, 1, 0)
_SEGMENT_DATA = (0, 0xFFFFFFFF, DATA_SELECTOR, 0x3, 1, 0, 1, 1, 0, 1, 0)
_SEGMENT_TASK = (0, 0x67, TASK_SELECTOR, 0xB, 1, 0, 0, 0, 0, 0, 0)
_SEGMENT_LDT = (0, 0, 0, 0x2, 1, 0, 0, 0, 0, 0, 0)

SEGMENTS: Final = {
    "cs": _SEGMENT_CODE,
    "ds": _SEGMENT_DATA,
    "es": _SEGMENT_DATA,
    "fs": _SEGMENT_DATA,
    "gs": _SEGMENT_DATA,
    "ss": _SEGMENT_DATA,
    "tr": _SEGMENT_TASK,
    "ldt": _SEGMENT_LDT,
}
"""Segment registers in the field order of KVM's ``struct kvm_segment``: base, limit, selector, type, present,
dpl, db, s, l, g, avl."""


class EntryState:
    """State of the boot processor at the first instruction; every field is a plain number.

    ``gdt_base``/``gdt_limit`` describe the GDT, ``segments`` is :data:`SEGMENTS`; the IDT is empty (limit 0).
    """

    __slots__ = ("cr0", "cr3", "cr4", "efer", "gdt_base", "gdt_limit", "rflags", "rip", "rsi", "segments")

    def __init__(self, rip: int, zero_page_gpa: int, tables_gpa: int) -> None:
        self.rip = rip
        self.rsi = zero_page_gpa
        self.rflags = RFLAGS
        self.cr0 = CR0
        self.cr3 = tables_gpa + _PAGE
        self.cr4 = CR4
        self.efer = EFER
        self.gdt_base = tables_gpa
        self.gdt_limit = len(_GDT) - 1
        self.segments = SEGMENTS


def write_entry_tables(ram: memoryview, gpa: int) -> None:
    """Write GDT and identity page tables at the page-aligned ``gpa``, :data:`ENTRY_TABLES_SIZE` bytes."""
    if gpa % _PAGE:
        raise ValueError(f"entry tables at {gpa:#x} are not page aligned")
    pml4, pdpt, directories = gpa + _PAGE, gpa + 2 * _PAGE, gpa + 3 * _PAGE
    count = IDENTITY_MAP_BYTES >> 30
    ram[gpa : gpa + len(_GDT)] = _GDT
    struct.pack_into("<Q", ram, pml4, pdpt | _PRESENT_WRITABLE)
    for index in range(count):
        struct.pack_into("<Q", ram, pdpt + 8 * index, directories + _PAGE * index | _PRESENT_WRITABLE)
    # struct and not array, whose import brings collections along (5 ms, in the appliance 100)
    entries = range(_PRESENT_WRITABLE | _LARGE, IDENTITY_MAP_BYTES, _2_MIB)
    struct.pack_into(f"<{len(entries)}Q", ram, directories, *entries)
