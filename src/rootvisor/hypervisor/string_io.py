# SPDX-License-Identifier: Apache-2.0
"""INS and OUTS of a child, which KVM carries out by itself: how to make the VP look untouched.

KVM (``arch/x86/kvm/x86.c:x86_emulate_instruction``, ``emulate.c:pio_in_emulated``) leaves to user space

- for INS before anything is written: RIP and registers are those of the current iteration, up to a page of items is
  asked for at once, and KVM writes them to memory when it is resumed, wherever RIP is then;
- for OUTS after an item: RSI and RCX have moved on, and RIP too after the last.
"""

from __future__ import annotations

from ..kvm import abi
from ..x86.decoder import LONGEST, decode
from . import memory_access

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..x86.instruction import Instruction
    from .child_vp import ChildVp

_REGS = abi.SYNC_REGS_AT // 8
_RCX, _RSI, _RDI = _REGS + 2, _REGS + 4, _REGS + 5
_RIP, _RFLAGS = _REGS + 16, _REGS + 17
_RFLAGS_DF = 1 << 10
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_OUTS = (0x6E, 0x6F)


def just_done(vp: ChildVp, linear: int) -> bool:
    """Whether the write to a port stems from an OUTS before RIP rather than from the OUT that RIP is at.

    Both look alike to user space if an OUT of the same size and to the same port follows an OUTS. The data tell, unless
    they are equal: then it is taken for the OUT.
    """
    return _ended_at(vp, linear, vp.u8[33]) is not None


def rewind_outs(vp: ChildVp, linear: int, code: bytes) -> Instruction | None:
    """Undoes the item that an OUTS has just written, in the registers; None if no OUTS is found."""
    u64 = vp.u64
    size = vp.u8[33]
    instruction = decode(code, memory_access.code_bits(vp)) if code else None
    if instruction is None or instruction.io != 2 or instruction.string != size or not instruction.rep:
        instruction = _ended_at(vp, linear, size)
        if instruction is None:
            return None
        u64[_RIP] = u64[_RIP] - instruction.length & _MASK64
    step_back(vp, instruction)
    vp.mark_dirty(abi.SYNC_REGS)
    return instruction


def step_back(vp: ChildVp, instruction: Instruction) -> None:
    """RSI, RDI and RCX as they were before the last item of a string instruction."""
    mask = instruction.address_mask
    distance = instruction.string if vp.u64[_RFLAGS] & _RFLAGS_DF else -instruction.string
    if instruction.moves_rsi:
        _add(vp, _RSI, distance, mask)
    if instruction.moves_rdi:
        _add(vp, _RDI, distance, mask)
    if instruction.rep:
        _add(vp, _RCX, 1, mask)


def step_forward(vp: ChildVp, instruction: Instruction) -> bool:
    """An item of a string instruction is done; True if it was the last."""
    mask = instruction.address_mask
    distance = -instruction.string if vp.u64[_RFLAGS] & _RFLAGS_DF else instruction.string
    if instruction.moves_rsi:
        _add(vp, _RSI, distance, mask)
    if instruction.moves_rdi:
        _add(vp, _RDI, distance, mask)
    if not instruction.rep:
        return True
    _add(vp, _RCX, -1, mask)
    return not vp.u64[_RCX] & mask


def _add(vp: ChildVp, register: int, distance: int, mask: int) -> None:
    """A 16-bit register keeps its upper part, a 32-bit one loses it."""
    value = vp.u64[register]
    kept = value & ~mask & _MASK64 if mask == 0xFFFF else 0
    vp.u64[register] = kept | value + distance & mask


def _ended_at(vp: ChildVp, linear: int, size: int) -> Instruction | None:
    """The OUTS of ``size`` that ends right before ``linear``, with all its prefixes."""
    code = memory_access.fetch(vp, linear - LONGEST & _MASK64)[:LONGEST]
    if len(code) < LONGEST:  # the page before is not there
        code = memory_access.fetch(vp, linear & ~0xFFF)[: linear & 0xFFF] if linear & 0xFFF < LONGEST else b""
    if not code or code[-1] not in _OUTS:
        return None
    bits = memory_access.code_bits(vp)
    for length in range(len(code), 0, -1):
        instruction = decode(code[-length:], bits)
        if (
            instruction is not None
            and instruction.length == length
            and instruction.io == 2
            and instruction.string == size
            and not (instruction.rep and vp.u64[_RCX] & instruction.address_mask)
        ):
            return instruction
    return None


def offer_memory(vp: ChildVp, instruction: Instruction) -> None:
    """Puts into the run page, as the data of INS, what lies in memory where KVM is going to write them."""
    u8 = vp.u8
    memory = vp.partition.memory
    at = vp.u64[5]
    size = instruction.string
    step = -size if vp.u64[_RFLAGS] & _RFLAGS_DF else size
    linear = memory_access.linear_address(vp, instruction.accesses[0])
    for item in range(vp.u32[9]):
        start = linear + item * step
        data = b""
        while len(data) < size:
            where = start + len(data) & _MASK64
            gpa = vp.translations.find(where)
            page = memory.page(gpa >> 12) if gpa >= 0 else None
            part = min(size - len(data), 4096 - (where & 0xFFF))
            offset = gpa & 0xFFF
            data += bytes(part) if page is None else bytes(page[offset : offset + part])
        u8[at : at + size] = data
        at += size
