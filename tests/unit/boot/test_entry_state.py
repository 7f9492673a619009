# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct

import pytest

from rootvisor.boot.entry_state import ENTRY_TABLES_SIZE, SEGMENTS, EntryState, write_entry_tables

GPA = 0x10000


def translate(ram: memoryview, cr3: int, address: int) -> int:
    table = cr3
    for shift in (39, 30, 21):
        (entry,) = struct.unpack_from("<Q", ram, table + 8 * (address >> shift & 511))
        assert entry & 3 == 3, f"{address:#x} not present at level {shift}"
        table = entry & ~0xFFF
    assert entry & 0x80
    return int((entry & ~0x1FFFFF) + (address & 0x1FFFFF))


def test_identity_map_covers_4_gib_and_nothing_else_is_touched() -> None:
    backing = bytearray(b"\xee" * (GPA + ENTRY_TABLES_SIZE + 4096))
    backing[GPA : GPA + ENTRY_TABLES_SIZE] = bytes(ENTRY_TABLES_SIZE)
    ram = memoryview(backing)
    write_entry_tables(ram, GPA)
    state = EntryState(0x1000200, 0x7000, GPA)
    for address in (0, 0x7000, 0x1000200, 0x3FFFFFFF, 0x40000000, 0xFFFFFFFF):
        assert translate(ram, state.cr3, address) == address
    assert bytes(ram[:GPA]) == b"\xee" * GPA
    assert bytes(ram[GPA + ENTRY_TABLES_SIZE :]) == b"\xee" * 4096


def test_segments_agree_with_the_gdt() -> None:
    ram = memoryview(bytearray(GPA + ENTRY_TABLES_SIZE))
    write_entry_tables(ram, GPA)
    state = EntryState(0, 0, GPA)
    for name in ("cs", "ds"):
        _, _, selector, kind, present, dpl, db, s, long_mode, granular, _ = SEGMENTS[name]
        (entry,) = struct.unpack_from("<Q", ram, state.gdt_base + selector)
        assert entry >> 40 & 0xF == kind
        assert entry >> 44 & 1 == s
        assert entry >> 45 & 3 == dpl
        assert entry >> 47 & 1 == present
        assert entry >> 53 & 1 == long_mode
        assert entry >> 54 & 1 == db
        assert entry >> 55 & 1 == granular
        assert selector + 7 <= state.gdt_limit


def test_unaligned_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="not page aligned"):
        write_entry_tables(memoryview(bytearray(0x10000)), 0x123)
