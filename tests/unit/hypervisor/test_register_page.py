# SPDX-License-Identifier: Apache-2.0
"""The register page: what it shows, and what is taken from it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from rootvisor.hypervisor import register_page, vp_registers
from rootvisor.kvm import abi
from rootvisor.tlfs import registers as names

from .parked_vp import ParkedVp

GENERAL = {names.RAX + n: names.PAGE_GENERAL + 8 * n for n in range(16)}
SHOWN = {
    **GENERAL,
    names.RIP: names.PAGE_RIP, names.RFLAGS: names.PAGE_RFLAGS, names.CR0: names.PAGE_CR0, names.CR3: names.PAGE_CR3,
    names.CR4: names.PAGE_CR4, names.CR8: names.PAGE_CR8, names.EFER: names.PAGE_EFER, names.DR7: names.PAGE_DR7,
    names.PENDING_INTERRUPTION: names.PAGE_PENDING_INTERRUPTION, names.INTERRUPT_STATE: names.PAGE_INTERRUPT_STATE,
    names.XFEM: names.PAGE_XFEM,
}  # fmt: skip


@pytest.fixture
def vp() -> Any:
    made = ParkedVp()
    made.register_page = memoryview(bytearray(4096))
    return made


def get(vp: Any, name: int) -> int:
    return vp_registers.get(vp, name)


def put(vp: Any, name: int, value: int) -> None:
    vp_registers.set(vp, name, value, None)  # type: ignore[arg-type]


def shown(vp: Any, offset: int, size: int = 8) -> int:
    return int.from_bytes(vp.register_page[offset : offset + size], "little")


def write(vp: Any, offset: int, value: int, dirty: int, size: int = 8) -> None:
    vp.register_page[offset : offset + size] = value.to_bytes(size, "little")
    vp.register_page[4] |= dirty


def test_the_page_shows_every_register_at_its_place(vp: Any) -> None:
    rng = random.Random(1)
    for n in range(16):
        put(vp, names.RAX + n, rng.getrandbits(64))
    put(vp, names.RIP, 0x1234)
    put(vp, names.CR3, 0x5000)
    put(vp, names.DR7, 0x455)
    put(vp, names.XFEM, 3)
    put(vp, names.INTERRUPT_STATE, 1)
    put(vp, names.PENDING_INTERRUPTION, 1 | 0x31 << 16)
    for n in range(6):
        put(vp, names.XMM0 + n, rng.getrandbits(128))
        put(vp, names.ES + n, rng.getrandbits(112) | 0xA09B << 112)
    register_page.fill(vp)
    assert vp.register_page[0:8] == bytes((1, 0, 1, 0, 0, 0, 0, 0))
    for name, offset in SHOWN.items():
        assert shown(vp, offset) == get(vp, name), names.register_name(name)
    for n in range(6):
        assert shown(vp, names.PAGE_XMM + 16 * n, 16) == get(vp, names.XMM0 + n)
        assert shown(vp, names.PAGE_SEGMENTS + 16 * n, 16) == get(vp, names.ES + n)


def test_refresh_clears_dirty_and_makes_the_page_valid(vp: Any) -> None:
    vp.register_page[0:8] = bytes(8)
    vp.register_page[4:8] = b"\x1f\0\0\0"
    register_page.refresh(vp)
    assert vp.register_page[0:8] == bytes((1, 0, 1, 0, 0, 0, 0, 0))


@pytest.mark.parametrize("dirty", range(32))
def test_only_marked_classes_are_absorbed(vp: Any, dirty: int) -> None:
    register_page.refresh(vp)
    before = {name: get(vp, name) for name in (*SHOWN, names.CS, names.GS, names.XMM0, names.XMM0 + 5)}
    for name, offset in SHOWN.items():
        write(vp, offset, 0x2 if name == names.RFLAGS else 0x40, dirty)
    write(vp, names.PAGE_RFLAGS, 0x202, dirty)
    write(vp, names.PAGE_XMM + 80, 0x99, dirty, 16)
    write(vp, names.PAGE_SEGMENTS + 80, 0x4093 << 112 | 7, dirty, 16)
    register_page.absorb(vp)
    expected = dict(before)
    if dirty & names.DIRTY_GENERAL:
        expected |= dict.fromkeys(GENERAL, 0x40)
    if dirty & names.DIRTY_RIP:
        expected[names.RIP] = 0x40
    if dirty & names.DIRTY_RFLAGS:
        expected[names.RFLAGS] = 0x202
    if dirty & names.DIRTY_XMM:
        expected[names.XMM0 + 5] = 0x99
    if dirty & names.DIRTY_SEGMENTS:
        expected[names.GS] = 0x4093 << 112 | 7
        expected[names.CS] = shown(vp, names.PAGE_SEGMENTS + 16, 16)
    assert {name: get(vp, name) for name in before} == expected
    assert vp.register_page[4:8] == bytes(4)
    assert bool(vp.dirty & abi.SYNC_REGS) == bool(dirty & 0x13)


def test_control_registers_are_never_taken_from_the_page(vp: Any) -> None:
    register_page.refresh(vp)
    write(vp, names.PAGE_CR3, 0x7777000, 0xFF)
    vp.register_page[4:8] = b"\xff\xff\xff\xff"
    register_page.absorb(vp)
    assert get(vp, names.CR3) == 0


def test_reserved_flags_from_the_page_are_dropped(vp: Any) -> None:
    register_page.refresh(vp)
    write(vp, names.PAGE_RFLAGS, 0xFFFF_FFFF_FFFF_FFFF, names.DIRTY_RFLAGS)
    register_page.absorb(vp)
    assert get(vp, names.RFLAGS) == vp_registers.RFLAGS_VALID


def test_rip_from_the_page_ends_the_interrupt_shadow(vp: Any) -> None:
    put(vp, names.INTERRUPT_STATE, 1)
    vp.intercept_suspend = True
    register_page.refresh(vp)
    write(vp, names.PAGE_RIP, 0x10, names.DIRTY_RIP)
    register_page.absorb(vp)
    assert get(vp, names.INTERRUPT_STATE) == 0


def test_marks_made_while_the_vp_runs_wait(vp: Any) -> None:
    register_page.refresh(vp)
    write(vp, names.PAGE_RIP, 0x10, names.DIRTY_RIP)
    vp.running = True
    register_page.absorb(vp)
    vp.running = False
    assert get(vp, names.RIP) == 0xFFF0
    register_page.absorb(vp)
    assert get(vp, names.RIP) == 0x10


def test_the_resume_absorbs(vp: Any) -> None:
    register_page.refresh(vp)
    write(vp, names.PAGE_GENERAL, 0x55, names.DIRTY_GENERAL)
    put(vp, names.EXPLICIT_SUSPEND, 0)
    assert vp.u64[abi.SYNC_REGS_AT // 8] == 0x55


def test_the_end_of_explicit_suspension_fills_the_page(vp: Any) -> None:
    register_page.refresh(vp)
    put(vp, names.EXPLICIT_SUSPEND, 0)
    vp.u64[abi.SYNC_REGS_AT // 8 + 16] = 0x4444  # it ran
    put(vp, names.EXPLICIT_SUSPEND, 1)
    assert shown(vp, names.PAGE_RIP) == 0x4444


def test_without_a_page_nothing_happens() -> None:
    vp: Any = ParkedVp()
    register_page.refresh(vp)
    register_page.absorb(vp)
    assert vp.vcpu.reads_of_xsave == 0


def test_nothing_but_the_fields_is_written(vp: Any) -> None:
    vp.register_page[:] = b"\xa5" * 4096
    register_page.refresh(vp)
    assert vp.register_page[0x98:0xA0] == b"\xa5" * 8
    assert vp.register_page[0x1B0:] == b"\xa5" * (4096 - 0x1B0)


def test_a_second_fill_of_one_stop_needs_no_ioctl(vp: Any) -> None:
    register_page.refresh(vp)
    vp.vcpu.dr7 = vp.vcpu.xcr0 = vp.vcpu.xsave = None
    register_page.fill(vp)
    put(vp, names.CR3, 0x1000)
    register_page.fill(vp)
    assert shown(vp, names.PAGE_CR3) == 0x1000


def test_every_kind_of_change_shows_in_a_page_that_was_filled_before(vp: Any) -> None:
    register_page.refresh(vp)
    for name, value, offset in (
        (names.RAX, 5, names.PAGE_GENERAL), (names.RIP, 6, names.PAGE_RIP), (names.XMM0 + 1, 7, names.PAGE_XMM + 16),
        (names.DR7, 0x455, names.PAGE_DR7), (names.XFEM, 3, names.PAGE_XFEM), (names.CR3, 0x3000, names.PAGE_CR3),
        (names.INTERRUPT_STATE, 2, names.PAGE_INTERRUPT_STATE), (names.ES, 9, names.PAGE_SEGMENTS),
        (names.PENDING_INTERRUPTION, 0x31_0001, names.PAGE_PENDING_INTERRUPTION),
    ):  # fmt: skip
        put(vp, name, value)
        register_page.fill(vp)
        assert shown(vp, offset) == value, names.register_name(name)
        vp_registers.before_run(vp)
        vp.vcpu.commit_sync_area()
        register_page.refresh(vp)
        assert shown(vp, offset) == value, names.register_name(name)
