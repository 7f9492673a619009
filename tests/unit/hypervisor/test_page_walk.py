# SPDX-License-Identifier: Apache-2.0
"""Page walks in every paging mode, against a model that was written from the manual's tables instead of the code."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from rootvisor.hypervisor.page_walk import translate
from rootvisor.kvm import abi
from rootvisor.tlfs import translation as tlfs

PRESENT, WRITE, USER, ACCESSED, DIRTY, LARGE, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
PG, WP, PE = 1 << 31, 1 << 16, 1
PSE, PAE, LA57, SMEP, SMAP = 1 << 4, 1 << 5, 1 << 12, 1 << 20, 1 << 21
LMA, NXE = 1 << 10, 1 << 11
AC = 1 << 18

UNMAPPED, NO_ACCESS, READ_ONLY, WRITABLE = range(4)


class Memory:
    """Pages by number, with a state."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}
        self.states: dict[int, int] = {}

    def state(self, gpa: int) -> int:
        return self.states.get(gpa >> 12, UNMAPPED)

    def page(self, gfn: int) -> memoryview | None:
        return memoryview(self.pages[gfn]) if self.states.get(gfn, UNMAPPED) >= READ_ONLY else None

    def view(self, gpa: int, length: int) -> memoryview:
        if self.state(gpa) != WRITABLE:
            raise ValueError
        return memoryview(self.pages[gpa >> 12])[gpa & 0xFFF : (gpa & 0xFFF) + length]

    def put(self, gpa: int, value: int, size: int = 8) -> None:
        page = self.pages.setdefault(gpa >> 12, bytearray(4096))
        self.states.setdefault(gpa >> 12, WRITABLE)
        page[gpa & 0xFFF : (gpa & 0xFFF) + size] = value.to_bytes(size, "little")

    def get(self, gpa: int, size: int = 8) -> int:
        return int.from_bytes(self.pages[gpa >> 12][gpa & 0xFFF : (gpa & 0xFFF) + size], "little")


def make(
    cr0: int = PG | PE | WP, cr3: int = 0x1000, cr4: int = PAE, efer: int = LMA | NXE, rflags: int = 2
) -> Any:
    run = memoryview(bytearray(4096))
    u64 = run.cast("Q")
    sregs = abi.SYNC_SREGS_AT
    for at, value in (
        (abi.SREGS_CR0, cr0),
        (abi.SREGS_CR3, cr3),
        (abi.SREGS_CR4, cr4),
        (abi.SREGS_EFER, efer),
    ):
        u64[(sregs + at) // 8] = value
    u64[abi.SYNC_REGS_AT // 8 + 17] = rflags
    return SimpleNamespace(u64=u64, partition=SimpleNamespace(memory=Memory()))


def build(vp: Any, gva: int, levels: list[int], flags: list[int], leaf: int, size: int = 8) -> list[int]:
    """Tables for one address: ``levels`` are the shifts from the top, ``flags`` of each entry, ``leaf`` the frame of
    the last. Table n lies at (n + 1) * 0x1000. Gives the GPAs of the entries."""
    memory = vp.partition.memory
    where = []
    for number, (shift, flag) in enumerate(zip(levels, flags, strict=True)):
        bits = (
            10
            if size == 4
            else 2
            if shift == 30 and len(levels) == 3 and size == 8 and levels[0] == 30
            else 9
        )
        at = (number + 1) * 0x1000 + (gva >> shift & (1 << bits) - 1) * size
        last = number == len(levels) - 1
        memory.put(at, (leaf if last else (number + 2) * 0x1000) | flag, size)
        where.append(at)
    return where


ALL = PRESENT | WRITE | USER
FOUR = [39, 30, 21, 12]
FIVE = [48, 39, 30, 21, 12]

MODES: dict[str, tuple[dict[str, int], list[int], int, int, int]] = {
    # name: registers, shifts, entry size, address, frame
    "4 KiB": ({}, FOUR, 8, 0x7FFF_1234_5678, 0x12_3456_7000),
    "2 MiB": ({}, FOUR[:3], 8, 0x7FFF_1234_5678, 0x12_3440_0000),
    "1 GiB": ({}, FOUR[:2], 8, 0x7FFF_1234_5678, 0x40_0000_0000),
    "upper half": ({}, FOUR, 8, 0xFFFF_8000_1234_5678, 0x5000),
    "5 levels": ({"cr4": PAE | LA57}, FIVE, 8, 0x00FF_7FFF_1234_5678, 0x7000),
    "5 levels, upper half": ({"cr4": PAE | LA57}, FIVE, 8, 0xFF12_8000_1234_5678, 0x7000),
    "5 levels, 2 MiB": ({"cr4": PAE | LA57}, FIVE[:4], 8, 0x00FF_7FFF_1234_5678, 0x60_0000),
    "32 bits": ({"cr4": 0, "efer": 0}, [22, 12], 4, 0x1234_5678, 0x7000),
    "4 MiB": ({"cr4": PSE, "efer": 0}, [22], 4, 0x1234_5678, 0x1240_0000),
    "PAE": ({"efer": NXE}, [30, 21, 12], 8, 0xF234_5678, 0x9_0000_7000),
    "PAE, 2 MiB": ({"efer": NXE}, [30, 21], 8, 0xF234_5678, 0x9_0020_0000),
}


def flags_of(name: str, leaf: int = ALL) -> list[int]:
    _registers, levels, _size, _gva, _frame = MODES[name]
    flags = [ALL] * (len(levels) - 1) + [leaf]
    if levels[0] == 30:
        flags[0] = PRESENT
    if levels[-1] != 12:
        flags[-1] |= LARGE
    return flags


@pytest.mark.parametrize("name", MODES)
def test_address_in_every_mode(name: str) -> None:
    registers, levels, size, gva, frame = MODES[name]
    vp = make(**registers)
    where = build(vp, gva, levels, flags_of(name), frame, size)
    trail: list[int] = []
    walk = translate(vp, gva, write=True, execute=True, user=True, trail=trail)
    assert (walk.code, walk.fault_gpa) == (tlfs.SUCCESS, -1)
    assert walk.gpa == frame | gva & (1 << levels[-1]) - 1
    assert trail == where


def test_without_paging_the_address_is_physical() -> None:
    walk = translate(make(cr0=PE), 0x1_2345_6789)
    assert (walk.code, walk.gpa) == (tlfs.SUCCESS, 0x2345_6789)


def test_large_page_of_32_bit_paging_reaches_40_bits() -> None:
    vp = make(cr4=PSE, efer=0)
    vp.partition.memory.put(0x1000, 0x0040_0000 | 0xAB << 13 | ALL | LARGE, 4)
    assert translate(vp, 0x12345).gpa == 0xAB_0040_0000 | 0x12345


def test_large_bit_without_pse_is_a_table() -> None:
    vp = make(cr4=0, efer=0)
    vp.partition.memory.put(0x1000, 0x2000 | ALL | LARGE, 4)
    vp.partition.memory.put(0x2000, 0x5000 | ALL, 4)
    assert translate(vp, 0x123).gpa == 0x5123


@pytest.mark.parametrize("gva", [0x0000_8000_0000_0000, 0x8000_0000_0000_0000, 0xFFFF_7FFF_FFFF_FFFF])
def test_address_that_is_not_canonical(gva: int) -> None:
    assert translate(make(), gva).code == tlfs.PAGE_NOT_PRESENT


@pytest.mark.parametrize("name", MODES)
def test_entry_that_is_not_present_at_each_level(name: str) -> None:
    registers, levels, size, gva, frame = MODES[name]
    for level in range(len(levels)):
        vp = make(**registers)
        flags = flags_of(name)
        flags[level] &= ~PRESENT
        build(vp, gva, levels, flags, frame, size)
        assert translate(vp, gva).code == tlfs.PAGE_NOT_PRESENT


@pytest.mark.parametrize("name", MODES)
def test_table_without_memory_at_each_level(name: str) -> None:
    registers, levels, size, gva, frame = MODES[name]
    for state, code in ((UNMAPPED, tlfs.GPA_UNMAPPED), (NO_ACCESS, tlfs.GPA_NO_READ_ACCESS)):
        for level in range(len(levels)):
            vp = make(**registers)
            where = build(vp, gva, levels, flags_of(name), frame, size)
            vp.partition.memory.states[where[level] >> 12] = state
            walk = translate(vp, gva)
            assert (walk.code, walk.fault_gpa) == (code, where[level])


@pytest.mark.parametrize(
    ("shift", "entry"), [(39, LARGE), (30, LARGE | 0x20_0000), (21, LARGE | 0x2000), (12, NX)]
)
def test_reserved_bits(shift: int, entry: int) -> None:
    efer = LMA if entry & NX else LMA | NXE
    levels = FOUR[: FOUR.index(shift) + 1]
    vp = make(efer=efer)
    build(vp, 0x1234, levels, [ALL] * (len(levels) - 1) + [ALL | entry], 0x4000_0000)
    assert translate(vp, 0x1234).code == tlfs.INVALID_PAGE_TABLE_FLAGS


def test_pat_bit_of_a_large_page_is_allowed() -> None:
    vp = make()
    build(vp, 0x1234, FOUR[:3], [ALL, ALL, ALL | LARGE | 0x1000], 0x4000_0000)
    assert translate(vp, 0x1234).gpa == 0x4000_1234


@pytest.mark.parametrize("name", ["4 KiB", "5 levels, 2 MiB", "32 bits", "PAE"])
@pytest.mark.parametrize("set_bits", [False, True])
def test_accessed_and_dirty_bits(name: str, set_bits: bool) -> None:
    registers, levels, size, gva, frame = MODES[name]
    for write in (False, True):
        vp = make(**registers)
        where = build(vp, gva, levels, flags_of(name), frame, size)
        translate(vp, gva, write=write, set_bits=set_bits)
        for level, at in enumerate(where):
            wanted = 0
            if set_bits and not (level == 0 and levels[0] == 30):
                wanted = ACCESSED | (DIRTY if write and level == len(where) - 1 else 0)
            assert vp.partition.memory.get(at, size) & (ACCESSED | DIRTY) == wanted


def test_bits_in_a_table_that_may_not_be_written() -> None:
    vp = make()
    where = build(vp, 0x1234, FOUR, [ALL | ACCESSED] * 3 + [ALL], 0x5000)
    vp.partition.memory.states[where[3] >> 12] = READ_ONLY
    assert translate(vp, 0x1234).code == tlfs.SUCCESS
    walk = translate(vp, 0x1234, set_bits=True)
    assert (walk.code, walk.fault_gpa) == (tlfs.GPA_NO_WRITE_ACCESS, where[3])
    vp.partition.memory.put(where[3], 0x5000 | ALL | ACCESSED)
    assert translate(vp, 0x1234, set_bits=True).code == tlfs.SUCCESS
    assert translate(vp, 0x1234, write=True, set_bits=True).code == tlfs.GPA_NO_WRITE_ACCESS


# --- rights, against a model --------------------------------------------------------------------------------------
def allowed(
    levels: list[int], flags: list[int], *, write: bool, execute: bool, user: bool | None,
    wp: bool, smep: bool, smap: bool, ac: bool,
) -> bool:  # fmt: skip
    """AMD64 APM 2, 5.6: combined rights of all levels."""
    checked = flags[1:] if levels[0] == 30 else flags
    writable = all(flag & WRITE for flag in checked)
    user_page = all(flag & USER for flag in checked)
    executable = not any(flag & NX for flag in checked)
    if execute and not executable:
        return False
    if user is True:
        return user_page and (writable or not write)
    if write and wp and not writable:
        return False
    if user is False and user_page:
        if execute:
            return not smep
        return not smap or ac
    return True


@pytest.mark.parametrize("name", MODES)
def test_rights_agree_with_the_model(name: str) -> None:
    registers, levels, size, gva, frame = MODES[name]
    randomness = random.Random(name)
    outcomes = set()
    choose: Callable[[], bool] = lambda: bool(randomness.getrandbits(1))  # noqa: E731
    for _ in range(600):
        wp, smep, smap, ac = choose(), choose(), choose(), choose()
        write = choose()
        execute = not write and choose()
        user = randomness.choice([True, False, None])
        base = dict(registers)
        base["cr4"] = base.get("cr4", PAE) | (SMEP if smep else 0) | (SMAP if smap else 0)
        vp = make(cr0=PG | PE | (WP if wp else 0), rflags=2 | (AC if ac else 0), **base)
        flags = []
        for number, flag in enumerate(flags_of(name)):
            if not (levels[0] == 30 and number == 0):
                for bit in (WRITE, USER):
                    if randomness.random() < 0.25:
                        flag &= ~bit
                if size == 8 and randomness.random() < 0.15:
                    flag |= NX
            flags.append(flag)
        build(vp, gva, levels, flags, frame, size)
        expected = allowed(
            levels, flags, write=write, execute=execute, user=user, wp=wp, smep=smep, smap=smap, ac=ac
        )
        code = translate(vp, gva, write=write, execute=execute, user=user).code
        assert code == (tlfs.SUCCESS if expected else tlfs.PRIVILEGE_VIOLATION)
        outcomes.add(expected)
    assert outcomes == {True, False}


def test_random_tables_never_raise() -> None:
    randomness = random.Random(1)
    for _ in range(300):
        mode = randomness.choice(list(MODES.values()))
        vp = make(**mode[0])
        memory = vp.partition.memory
        for page in range(1, 8):
            memory.pages[page] = bytearray(
                b"".join(
                    struct.pack(
                        "<Q",
                        randomness.getrandbits(64) & ~0x000F_FFFF_FFFF_F000 | randomness.randrange(9) << 12,
                    )
                    for _ in range(512)
                )
            )
            memory.states[page] = randomness.choice([NO_ACCESS, READ_ONLY, WRITABLE, WRITABLE])
        walk = translate(
            vp, randomness.getrandbits(64), write=bool(randomness.getrandbits(1)), user=True, set_bits=True
        )
        assert walk.code in range(9)
        assert (walk.fault_gpa >= 0) == (walk.code in (4, 5, 6))
