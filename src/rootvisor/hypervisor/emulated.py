# SPDX-License-Identifier: Apache-2.0
"""Accesses that KVM's instruction emulator could not make (KVM_EXIT_MMIO): which instruction, and back to its start.

Guests get here with a string port instruction whose operand is not mapped, and with addresses beyond the child's
address width; on processors that cannot run real mode natively with more. RIP is at the instruction for a read and
behind it for a write, which KVM takes for done.
"""

from __future__ import annotations

from ..kvm import abi
from ..tlfs import intercepts as tlfs
from ..x86.decoder import LONGEST, decode
from ..x86.instruction import RSP, SS
from . import memory_access, string_io
from .child_memory import READ_ONLY, UNMAPPED, WRITABLE
from .memory_access import MemoryAccess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..x86.instruction import Access, Instruction
    from .child_vp import ChildVp

_REGS = abi.SYNC_REGS_AT // 8
_RIP = _REGS + 16
_CS_BASE = abi.SYNC_SREGS_AT // 8
_REGS_BYTES = slice(abi.SYNC_REGS_AT, abi.SYNC_SREGS_AT)
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


def access(vp: ChildVp, gpa: int, write: bool) -> MemoryAccess | None:
    """The access of the instruction at RIP that hit ``gpa``; None if ``gpa`` allows it by now."""
    memory = vp.partition.memory
    state = memory.state(gpa) if gpa < 1 << memory.width else UNMAPPED
    if state >= (WRITABLE if write else READ_ONLY):
        return None
    kind = tlfs.ACCESS_WRITE if write else tlfs.ACCESS_READ
    found = MemoryAccess(gpa, 0, 0, kind, state)
    found.code = memory_access.fetch(vp, vp.u64[_CS_BASE] + vp.u64[_RIP] & _MASK64)
    found.instruction = decode(found.code, memory_access.code_bits(vp)) if found.code else None
    if found.instruction is not None:
        operand = _operand(vp, found.instruction, gpa, write)
        if operand is not None:
            found.operand = operand
            found.size = operand.size
            linear = memory_access.linear_address(vp, operand)
            found.gva = linear & ~0xFFF | gpa & 0xFFF if (linear ^ gpa) & 0xFFF else linear
            found.info = tlfs.MEMORY_GVA_VALID | tlfs.MEMORY_GVA_GPA_VALID
    return found


def _operand(vp: ChildVp, instruction: Instruction, gpa: int, write: bool) -> Access | None:
    """The operand in whose page ``gpa`` lies."""
    for operand in instruction.accesses:
        if operand.vector or (operand.write if not write else not operand.write):
            continue
        linear = memory_access.linear_address(vp, operand)
        first = vp.translations.find(linear)
        if first >= 0 and first <= gpa < first + operand.size:
            return operand
    return None


def rewind(vp: ChildVp, gpa: int) -> None:
    """Puts the registers back to the start of the instruction that wrote to ``gpa``; leaves them if none is found.

    Registers that an instruction has overwritten for good (XCHG) stay so; moved pointers go back.
    """
    u64, u8 = vp.u64, vp.u8
    linear = u64[_CS_BASE] + u64[_RIP] & _MASK64
    bits = memory_access.code_bits(vp)
    after = bytes(u8[_REGS_BYTES])
    here = decode(memory_access.fetch(vp, linear), bits)
    if here is not None and here.rep and here.string:  # between two items, RIP stays
        string_io.step_back(vp, here)
        if _operand(vp, here, gpa, True) is not None:
            vp.mark_dirty(abi.SYNC_REGS)
            return
        u8[_REGS_BYTES] = after
    for length in range(1, LONGEST + 1):
        start = linear - length & _MASK64
        code = memory_access.fetch(vp, start)
        instruction = decode(code, bits) if code else None
        if instruction is None or instruction.length != length:
            continue
        u64[_RIP] = u64[_RIP] - length & memory_access.RIP_MASK[bits]
        if instruction.string:
            string_io.step_back(vp, instruction)
        for operand in instruction.accesses:
            if operand.write and operand.base == RSP and operand.segment == SS and not operand.mask:
                u64[_REGS + RSP] = u64[_REGS + RSP] + operand.size & _MASK64
        if _operand(vp, instruction, gpa, True) is not None:
            vp.mark_dirty(abi.SYNC_REGS)
            return
        u8[_REGS_BYTES] = after
