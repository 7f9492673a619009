# SPDX-License-Identifier: Apache-2.0
"""RFLAGS: the status flags of a result, and conditions on them."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

CF, PF, AF, ZF, SF, DF, OF = 1, 4, 0x10, 0x40, 0x80, 0x400, 0x800
STATUS = CF | PF | AF | ZF | SF | OF

#: PF of a result's low byte.
PARITY = bytes(0 if bin(byte).count("1") & 1 else PF for byte in range(256))


def result_flags(result: int, sign: int) -> int:
    """PF, ZF and SF of a result; ``sign`` is its highest bit."""
    return PARITY[result & 0xFF] | (0 if result else ZF) | (SF if result & sign else 0)


def condition(number: int) -> Callable[[int], bool]:
    """The test of RFLAGS that an opcode's low four bits stand for."""
    test = _CONDITIONS[number >> 1 & 7]
    if number & 1:
        return lambda flags: not test(flags)
    return test


def _less(flags: int) -> bool:
    return bool(flags & SF) != bool(flags & OF)


_CONDITIONS: tuple[Callable[[int], bool], ...] = (
    lambda flags: bool(flags & OF),
    lambda flags: bool(flags & CF),
    lambda flags: bool(flags & ZF),
    lambda flags: bool(flags & (CF | ZF)),
    lambda flags: bool(flags & SF),
    lambda flags: bool(flags & PF),
    _less,
    lambda flags: bool(flags & ZF) or _less(flags),
)
