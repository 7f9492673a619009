# SPDX-License-Identifier: Apache-2.0
"""Segment and table registers as the interface has them: 16 bytes, here integers of 128 bits."""

from __future__ import annotations

_CODE64 = 0xA09B
_CODE32 = 0xC09B
_CODE16 = 0x009B
_DATA = 0xC093
_DATA16 = 0x0093
_TSS = 0x008B
_LDT = 0x0082


class Segment:
    """A segment register: ``base``, ``limit`` in bytes, ``selector``, ``attributes``.

    Attributes: type in bits 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15.
    """

    __slots__ = ("attributes", "base", "limit", "selector")

    def __init__(self, base: int, limit: int, selector: int, attributes: int) -> None:
        self.base = base
        self.limit = limit
        self.selector = selector
        self.attributes = attributes

    @classmethod
    def from_value(cls, value: int) -> Segment:
        """The segment in a register's value."""
        return cls(
            value & 0xFFFF_FFFF_FFFF_FFFF,
            value >> 64 & 0xFFFF_FFFF,
            value >> 96 & 0xFFFF,
            value >> 112 & 0xFFFF,
        )

    @classmethod
    def code64(cls, selector: int = 0x08) -> Segment:
        """A 64-bit code segment of ring 0."""
        return cls(0, 0xFFFF_FFFF, selector, _CODE64)

    @classmethod
    def code32(cls, selector: int = 0x08) -> Segment:
        """A flat 32-bit code segment of ring 0."""
        return cls(0, 0xFFFF_FFFF, selector, _CODE32)

    @classmethod
    def data(cls, selector: int = 0x10) -> Segment:
        """A flat data segment of ring 0."""
        return cls(0, 0xFFFF_FFFF, selector, _DATA)

    @classmethod
    def real_code(cls, selector: int, base: int | None = None) -> Segment:
        """A code segment of real mode; ``base`` is the selector times 16 unless told."""
        return cls(selector << 4 if base is None else base, 0xFFFF, selector, _CODE16)

    @classmethod
    def real_data(cls, selector: int) -> Segment:
        """A data segment of real mode."""
        return cls(selector << 4, 0xFFFF, selector, _DATA16)

    @classmethod
    def tss(cls, base: int = 0, limit: int = 0x67, selector: int = 0x18) -> Segment:
        """A busy 64-bit task state segment, which processors want in TR."""
        return cls(base, limit, selector, _TSS)

    @classmethod
    def ldt(cls) -> Segment:
        """An empty local descriptor table."""
        return cls(0, 0xFFFF, 0, _LDT)

    def __int__(self) -> int:
        return self.base | self.limit << 64 | self.selector << 96 | self.attributes << 112

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Segment) and int(self) == int(other)

    def __hash__(self) -> int:
        return hash(int(self))

    def __repr__(self) -> str:
        return f"Segment({self.base:#x}, {self.limit:#x}, {self.selector:#x}, {self.attributes:#x})"


class Table:
    """GDTR or IDTR: ``base`` and ``limit`` (the table's size less one)."""

    __slots__ = ("base", "limit")

    def __init__(self, base: int, limit: int) -> None:
        self.base = base
        self.limit = limit

    @classmethod
    def from_value(cls, value: int) -> Table:
        """The table in a register's value: limit in bits 63:48, base in 127:64."""
        return cls(value >> 64, value >> 48 & 0xFFFF)

    def __int__(self) -> int:
        return self.base << 64 | self.limit << 48

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and int(self) == int(other)

    def __hash__(self) -> int:
        return hash(int(self))

    def __repr__(self) -> str:
        return f"Table({self.base:#x}, {self.limit:#x})"
