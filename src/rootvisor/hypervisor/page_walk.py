# SPDX-License-Identifier: Apache-2.0
"""The page tables of a child VP, walked as its processor would (AMD64 APM volume 2, chapter 5).

All paging modes: none, 32-bit, PAE, 4 and 5 levels, with large pages. Control registers come from the VP's shared run
page, entries from :class:`~.child_memory.ChildMemory`; protection keys are not looked at. Callers hold
``Hypervisor.lock`` and the VP is parked, or it is the VP's own thread.
"""

from __future__ import annotations

from ..kvm import abi
from ..tlfs import translation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .child_vp import ChildVp

_SREGS = abi.RUN_SYNC + 144
_CR0 = (_SREGS + abi.SREGS_CR0) // 8
_CR3 = (_SREGS + abi.SREGS_CR3) // 8
_CR4 = (_SREGS + abi.SREGS_CR4) // 8
_EFER = (_SREGS + abi.SREGS_EFER) // 8
_RFLAGS = abi.RUN_SYNC // 8 + 17

_CR0_WP = 1 << 16
_CR0_PG = 1 << 31
_CR4_PSE = 1 << 4
_CR4_PAE = 1 << 5
_CR4_LA57 = 1 << 12
_CR4_SMEP = 1 << 20
_CR4_SMAP = 1 << 21
_EFER_LMA = 1 << 10
_EFER_NXE = 1 << 11
_RFLAGS_AC = 1 << 18

_PRESENT = 1
_WRITABLE = 1 << 1
_USER = 1 << 2
_ACCESSED = 1 << 5
_DIRTY = 1 << 6
_LARGE = 1 << 7
_NO_EXECUTE = 1 << 63
_ADDRESS = 0x000F_FFFF_FFFF_F000


class Walk:
    """The outcome of a walk.

    ``code`` is a result code of :mod:`rootvisor.tlfs.translation`, ``gpa`` the exact address if it is SUCCESS.
    ``fault_gpa`` is the table entry that could not be read (GPA_UNMAPPED, GPA_NO_READ_ACCESS) or written
    (GPA_NO_WRITE_ACCESS), else -1.
    """

    __slots__ = ("code", "fault_gpa", "gpa")

    def __init__(self, code: int, gpa: int, fault_gpa: int) -> None:
        self.code = code
        self.gpa = gpa
        self.fault_gpa = fault_gpa


def translate(
    vp: ChildVp,
    gva: int,
    write: bool = False,
    execute: bool = False,
    user: bool | None = None,
    set_bits: bool = False,
    trail: list[int] | None = None,
) -> Walk:
    """Walks to linear address ``gva``.

    ``user`` says for whom rights are checked: user mode, supervisor mode, or (None) without regard to privilege.
    ``set_bits`` sets accessed and dirty bits as an access would. ``trail`` collects the GPAs of the entries read. The
    state of the page that the walk leads to is not looked at: a GPA without memory is a valid outcome.
    """
    u64 = vp.u64
    cr0 = u64[_CR0]
    if not cr0 & _CR0_PG:
        return Walk(translation.SUCCESS, gva & 0xFFFF_FFFF, -1)
    cr4 = u64[_CR4]
    efer = u64[_EFER]
    cr3 = u64[_CR3]
    size = 8
    if efer & _EFER_LMA:
        top = 57 if cr4 & _CR4_LA57 else 48
        high = gva >> (top - 1)
        if high and high != (1 << (65 - top)) - 1:
            return Walk(translation.PAGE_NOT_PRESENT, 0, -1)
        shift = top - 9
        table = cr3 & _ADDRESS
        mask = 0x1FF
    elif cr4 & _CR4_PAE:
        gva &= 0xFFFF_FFFF
        shift = 30
        table = cr3 & 0xFFFF_FFE0
        mask = 0x3
    else:
        gva &= 0xFFFF_FFFF
        size = 4
        shift = 22
        table = cr3 & 0xFFFF_F000
        mask = 0x3FF
    page_of = vp.partition.memory.page
    rights = _WRITABLE | _USER
    no_execute = 0
    entries: list[tuple[int, int]] = []
    while True:
        at = table + (gva >> shift & mask) * size
        page = page_of(at >> 12)
        if trail is not None:
            trail.append(at)
        if page is None:
            return _unreadable(vp, at)
        offset = at & 0xFFF
        entry = int.from_bytes(page[offset : offset + size], "little")
        if not entry & _PRESENT:
            return Walk(translation.PAGE_NOT_PRESENT, 0, -1)
        if mask == 0x3:  # a PAE page directory pointer has no rights, no accessed bit and is never large
            shift = 21
            table = entry & _ADDRESS
            mask = 0x1FF
            continue
        if size == 8 and entry & _NO_EXECUTE:
            if not efer & _EFER_NXE:
                return Walk(translation.INVALID_PAGE_TABLE_FLAGS, 0, -1)
            no_execute = 1
        rights &= entry
        entries.append((at, entry))
        if shift == 12:
            break
        if entry & _LARGE:
            if size == 4:
                if cr4 & _CR4_PSE:
                    break
            elif shift <= 30:
                if entry & _ADDRESS & (1 << shift) - 1 & ~0x1000:  # bit 12 is PAT
                    return Walk(translation.INVALID_PAGE_TABLE_FLAGS, 0, -1)
                break
            else:
                return Walk(translation.INVALID_PAGE_TABLE_FLAGS, 0, -1)
        table = entry & (_ADDRESS if size == 8 else 0xFFFF_F000)
        shift -= 9 if size == 8 else 10
    if (
        (execute and no_execute)
        or (user and not rights & _USER)
        or (write and not rights & _WRITABLE and (user or cr0 & _CR0_WP))
        or (
            user is False
            and rights & _USER
            and (cr4 & _CR4_SMEP if execute else cr4 & _CR4_SMAP and not u64[_RFLAGS] & _RFLAGS_AC)
        )
    ):
        return Walk(translation.PRIVILEGE_VIOLATION, 0, -1)
    if set_bits:
        leaf = entries[-1][0]
        for at, entry in entries:
            wanted = _ACCESSED | (_DIRTY if write and at == leaf else 0)
            if wanted & ~entry:
                try:
                    view = vp.partition.memory.view(at, 1)
                except ValueError:
                    return Walk(translation.GPA_NO_WRITE_ACCESS, 0, at)
                view[0] |= wanted
    if shift == 22:  # a 4 MiB page: address bits 39:32 lie in bits 20:13 of the entry
        base = entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32
    else:
        base = entry & _ADDRESS & ~((1 << shift) - 1)
    return Walk(translation.SUCCESS, base | gva & (1 << shift) - 1, -1)


def _unreadable(vp: ChildVp, gpa: int) -> Walk:
    """A table lies where the child may not read."""
    mapped = vp.partition.memory.state(gpa)
    return Walk(translation.GPA_NO_READ_ACCESS if mapped else translation.GPA_UNMAPPED, 0, gpa)
