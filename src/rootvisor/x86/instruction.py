# SPDX-License-Identifier: Apache-2.0
"""A decoded instruction, reduced to what an intercept needs: length, memory accesses, the value of a plain store.

Registers are numbers 0 to 16 in the order of :data:`REGISTERS`, segments 0 to 5 in the order of :data:`SEGMENTS`; -1 is
none. Both are the orders of KVM's structures, so that a caller can index those directly.
"""

from __future__ import annotations

REGISTERS = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip",
)  # fmt: skip
RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP = range(8)
RIP = 16
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss")
CS, DS, ES, FS, GS, SS = range(6)

# --- what an instruction takes a selector from (Instruction.selector) ---------------------------------------------
SELECTOR_NONE = 0
#: ``selector_value`` is a register
SELECTOR_REGISTER = 1
#: ``selector_value`` is the selector itself
SELECTOR_IMMEDIATE = 2
#: the selector is the 16-bit word at ``selector_offset`` of ``accesses[selector_value]``
SELECTOR_MEMORY = 3

NO_SOURCE = 0
#: ``source_value`` is a register, ``source_shift`` 8 for AH, CH, DH, BH
SOURCE_REGISTER = 1
#: ``source_value`` is the value, masked to the operand's size
SOURCE_IMMEDIATE = 2


class Access:
    """One access to memory: ``segment:[(base + index * scale + displacement) & mask]``, ``size`` bytes.

    ``mask`` is 0 for an implicit access to the stack: its address has the width of the stack, which the instruction
    does not tell. ``index_mask`` cuts the index (XLATB uses AL). ``vector`` is the number of elements of a gather or
    scatter whose index is vector register ``index`` with elements of ``vector_index`` bytes, else 0. ``bit`` is the
    register that holds the bit offset of BT, BTC, BTR, BTS, else -1: the access then lies ``size`` bytes times the
    signed quotient of that register and the operand's bits away.
    """

    __slots__ = (
        "base", "bit", "displacement", "index", "index_mask", "mask", "read", "scale", "segment", "size", "vector",
        "vector_index", "write",
    )  # fmt: skip

    def __init__(self, segment: int, base: int, displacement: int, mask: int, size: int, write: bool) -> None:
        self.segment = segment
        self.base = base
        self.index = -1
        self.index_mask = 0xFFFF_FFFF_FFFF_FFFF
        self.scale = 1
        self.displacement = displacement
        self.mask = mask
        self.size = size
        self.write = write
        self.read = not write
        self.vector = 0
        self.vector_index = 0
        self.bit = -1


class Instruction:
    """``length`` in bytes; ``accesses`` in the order in which a processor would find them forbidden: operands that are
    read, then those that are written, then the stack.

    ``string`` is the element size of a string instruction (0 for others), which moves RSI and RDI (``moves_rsi``,
    ``moves_rdi``) and counts RCX down if ``rep``; ``address_mask`` is the width of those registers. ``io`` is 0, 1 for
    an instruction that reads a port and 2 for one that writes one. ``interrupt`` is the vector of INT n, INT3, INTO
    and INT1, else -1.
    """

    __slots__ = (
        "accesses", "address_mask", "interrupt", "io", "length", "moves_rdi", "moves_rsi", "rep", "selector",
        "selector_offset", "selector_value", "source", "source_shift", "source_value", "string",
    )  # fmt: skip

    def __init__(self, length: int, accesses: tuple[Access, ...]) -> None:
        self.length = length
        self.accesses = accesses
        self.string = 0
        self.rep = False
        self.moves_rsi = False
        self.moves_rdi = False
        self.address_mask = 0xFFFF_FFFF_FFFF_FFFF
        self.io = 0
        self.interrupt = -1
        self.selector = SELECTOR_NONE
        self.selector_value = 0
        self.selector_offset = 0
        self.source = NO_SOURCE
        self.source_value = 0
        self.source_shift = 0
