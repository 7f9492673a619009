# SPDX-License-Identifier: Apache-2.0
"""Segment and table registers: KVM's ``struct kvm_segment`` and the interface's ``hv_x64_segment_register``.

The interface packs base u64, limit u32, selector u16 and attributes u16 (type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13,
D 14, G 15); KVM has a byte per attribute. Tables are limit u16 at 6 and base u64 at 8.
"""

from __future__ import annotations

from struct import Struct

from ..kvm import abi

_KVM = Struct("<QIHBBBBBBBBBx")
_TABLE = Struct("<QH")
_LIMIT = 0xFFFFFFFF

#: Offsets in ``struct kvm_run`` in the order of the interface: ES CS SS DS FS GS LDTR TR.
AT = tuple(
    abi.SYNC_SREGS_AT + offset
    for offset in (
        abi.SREGS_ES, abi.SREGS_CS, abi.SREGS_SS, abi.SREGS_DS, abi.SREGS_FS, abi.SREGS_GS, abi.SREGS_LDT,
        abi.SREGS_TR,
    )
)  # fmt: skip
_FIRST = abi.SYNC_SREGS_AT
_USER = slice(_FIRST, _FIRST + 144)  # CS DS ES FS GS SS
#: What was packed before, by KVM's bytes: registers rarely change between two intercepts of a kernel.
_packed: dict[bytes, bytes] = {}
_PACKED_LIMIT = 512


def attributes(kind: int, present: int, dpl: int, db: int, s: int, long: int, g: int, avl: int) -> int:
    """The attribute word from KVM's bytes."""
    return (
        kind & 0xF
        | (s & 1) << 4
        | (dpl & 3) << 5
        | (present & 1) << 7
        | (avl & 1) << 12
        | (long & 1) << 13
        | (db & 1) << 14
        | (g & 1) << 15
    )


def read(run: memoryview, at: int) -> int:
    """The segment at byte ``at`` of ``struct kvm_run`` as a 128-bit register value."""
    base, limit, selector, kind, present, dpl, db, s, long, g, avl, _unusable = _KVM.unpack_from(run, at)
    words = attributes(kind, present, dpl, db, s, long, g, avl)
    return int(base | limit << 64 | selector << 96 | words << 112)


def write(run: memoryview, at: int, value: int) -> None:
    """Stores a 128-bit register value as the segment at byte ``at``. A segment that is not present is unusable."""
    words = value >> 112
    present = words >> 7 & 1
    _KVM.pack_into(
        run, at,
        value & 0xFFFF_FFFF_FFFF_FFFF, value >> 64 & _LIMIT, value >> 96 & 0xFFFF,
        words & 0xF, present, words >> 5 & 3, words >> 14 & 1, words >> 4 & 1, words >> 13 & 1, words >> 15 & 1,
        words >> 12 & 1, present ^ 1,
    )  # fmt: skip


def read_table(run: memoryview, at: int) -> int:
    """IDTR or GDTR at byte ``at`` of ``struct kvm_run`` as a 128-bit register value."""
    base, limit = _TABLE.unpack_from(run, at)
    return int(limit << 48 | base << 64)


def write_table(run: memoryview, at: int, value: int) -> None:
    """Stores a 128-bit register value as IDTR or GDTR."""
    _TABLE.pack_into(run, at, value >> 64, value >> 48 & 0xFFFF)


def pack(run: memoryview, at: int) -> bytes:
    """16 bytes of :func:`read`."""
    block = bytes(run[at : at + 24])
    packed = _packed.get(block)
    if packed is None:
        packed = read(run, at).to_bytes(16, "little")
        if len(_packed) >= _PACKED_LIMIT:
            _packed.clear()
        _packed[block] = packed
    return packed


def pack_table(run: memoryview, at: int) -> bytes:
    """16 bytes of :func:`read_table`."""
    block = bytes(run[at : at + 10])
    return b"\0\0\0\0\0\0" + block[8:] + block[:8]


def pack_user_segments(run: memoryview) -> bytes:
    """ES CS SS DS FS GS as 96 bytes of the register page."""
    block = bytes(run[_USER])
    packed = _packed.get(block)
    if packed is None:
        packed = b"".join(read(run, at).to_bytes(16, "little") for at in AT[:6])
        if len(_packed) >= _PACKED_LIMIT:
            _packed.clear()
        _packed[block] = packed
    return packed


def unpack_user_segments(run: memoryview, packed: memoryview) -> None:
    """Stores 96 bytes of the register page as ES CS SS DS FS GS."""
    for index in range(6):
        write(run, AT[index], int.from_bytes(packed[index * 16 : index * 16 + 16], "little"))
