# SPDX-License-Identifier: Apache-2.0
"""Processor feature banks of a partition (hv_partition_processor_features of the TLFS), and where CPUID
shows each feature. Properties 0x6000A (bank 0), 0x6000B (bank 1) and 0x60002 (XSAVE features).

``BANK[bit]`` is a tuple of places ``(leaf, subleaf, register, bit)``; register 0 .. 3 is EAX .. EDX. The feature is
there when one of the places has it. Features without a place in CPUID are left out: no partition has them here.
"""

from __future__ import annotations

EAX, EBX, ECX, EDX = range(4)
_AMD1 = 0x80000001
_AMD8 = 0x80000008

Place = tuple[int, int, int, int]


def _row(leaf: int, subleaf: int, register: int, bits: dict[int, int]) -> dict[int, tuple[Place, ...]]:
    """Feature bit -> CPUID bit, all in one register."""
    return {feature: ((leaf, subleaf, register, bit),) for feature, bit in bits.items()}


BANK0: dict[int, tuple[Place, ...]] = {
    **_row(1, 0, ECX, {0: 0, 2: 9, 3: 19, 4: 20, 7: 23, 8: 13, 16: 25, 17: 1, 18: 17, 20: 29, 21: 30, 29: 22}),
    **_row(_AMD1, 0, ECX, {1: 0, 5: 6, 6: 11, 9: 4, 10: 5, 11: 7, 19: 16, 34: 8}),
    **_row(_AMD1, 0, EDX, {12: 22, 13: 31, 14: 30, 15: 26, 38: 27}),
    **_row(
        7, 0, EBX,
        {22: 0, 23: 7, 24: 9, 25: 3, 26: 8, 31: 13, 32: 18, 33: 19, 35: 20, 36: 4, 37: 11, 39: 23, 40: 24, 41: 29,
         43: 10},
    ),
    **_row(7, 0, ECX, {57: 22, 58: 2}),
    **_row(7, 0, EDX, {49: 4, 50: 28, 60: 10}),
    44: ((7, 0, EDX, 26), (_AMD8, 0, EBX, 14)),  # IBRS
    45: ((7, 0, EDX, 27), (_AMD8, 0, EBX, 15)),  # STIBP
    46: ((_AMD8, 0, EBX, 12), (7, 0, EDX, 26)),  # IBPB
    48: ((7, 0, EDX, 31), (_AMD8, 0, EBX, 24)),  # SSBD
    56: ((_AMD8, 0, EBX, 25),),
}  # fmt: skip

BANK1: dict[int, tuple[Place, ...]] = {
    **_row(0x80000007, 0, EDX, {1: 8}),
    **_row(_AMD8, 0, EBX, {2: 0, 3: 4, 7: 28, 29: 29, 30: 30, 31: 17}),
    **_row(0x80000021, 0, EAX, {54: 27, 55: 28, 56: 29, 57: 30}),
    **_row(7, 0, EBX, {18: 1}),
    **_row(7, 0, ECX, {4: 16, 8: 7, 11: 29, 12: 5, 13: 27, 14: 28, 15: 25}),
    **_row(7, 0, EDX, {9: 20, 16: 14, 22: 16}),
    **_row(7, 1, EAX, {19: 10, 20: 11, 21: 12, 40: 7, 46: 0, 50: 1, 51: 2}),
    **_row(7, 1, EDX, {45: 14}),
    **_row(7, 2, EDX, {44: 4}),
    **_row(1, 0, ECX, {17: 24}),
}
#: IBPB shares its Intel place with IBRS: switching it off takes only its own.
BANK0_CLEARED: dict[int, tuple[Place, ...]] = {46: ((_AMD8, 0, EBX, 12),)}

XSAVE: dict[int, tuple[Place, ...]] = {
    **_row(1, 0, ECX, {0: 26, 2: 28, 4: 12}),
    **_row(0xD, 1, EAX, {1: 0, 11: 1, 12: 3, 13: 2, 26: 4}),
    **_row(7, 0, EBX, {3: 5, 5: 14, 6: 16, 7: 17, 8: 28, 9: 30, 10: 31, 15: 21}),
    **_row(7, 0, ECX, {14: 12, 16: 1, 17: 6, 18: 11, 19: 8, 20: 9, 21: 14, 22: 10}),
    **_row(7, 0, EDX, {24: 8, 25: 23, 27: 24, 28: 22, 29: 25}),
    **_row(7, 1, EAX, {23: 5, 30: 4, 31: 23, 37: 21}),
    **_row(7, 1, EDX, {32: 5, 33: 4, 34: 10, 35: 19, 38: 21}),
}
XSAVE_XSAVE = 1 << 0
XSAVE_AVX = 1 << 2
XSAVE_XSAVES = 1 << 12
#: What lives in state components beyond AVX: MPX, AVX-512, AVX10, AMX and APX.
XSAVE_LARGE = (
    1 << 5 | 0x1F << 6 | 1 << 14 | 1 << 15 | 1 << 16 | 1 << 17 | 1 << 18 | 1 << 21 | 1 << 23 | 3 << 24 | 1 << 26
    | 7 << 27 | 1 << 35 | 1 << 37 | 1 << 38
)  # fmt: skip
#: What needs AVX state.
XSAVE_NEEDS_AVX = XSAVE_LARGE | 1 << 3 | 1 << 4 | 1 << 20 | 1 << 22 | 0x1F << 30
#: Features of bank 0 that need AVX state: XOP, FMA4, F16C.
BANK0_NEEDS_AVX = 1 << 6 | 1 << 19 | 1 << 20
