# SPDX-License-Identifier: Apache-2.0
"""Plans of PUSH, POP, CALL and JMP whose operand is in memory (near; a far one would load a segment)."""

from __future__ import annotations

from . import memory
from .operands import LEGACY, MASK_16, MASK_32, MASK_64, MEMORY, ONE_BYTE, SS, Form, Operand
from .processor import GENERAL_PROTECTION, Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .operands import Execute
    from .processor import Processor

_RSP = 4


def plan(form: Form) -> Execute | None:
    """The plan of ``form``, if it is one of these instructions."""
    if form.encoding != LEGACY or form.table != ONE_BYTE or not form.operands or form.far:
        return None
    operand = form.operands[0]
    if operand.kind != MEMORY:
        return None
    if form.opcode == 0x8F and form.group == 0:
        return _pop(form, operand)
    if form.opcode == 0xFF and form.group in (2, 4, 6):
        return _push(form, operand) if form.group == 6 else _transfer(form, operand, form.group == 2)
    return None


def _pointer(form: Form, processor: Processor) -> tuple[int, int]:
    """The stack pointer and its width."""
    mask = MASK_64 if form.bits == 64 else processor.stack_mask()
    return processor.general(_RSP) & mask, mask


def _linear(form: Form, processor: Processor, offset: int) -> int:
    return offset if form.bits == 64 else processor.segment_base(SS) + offset & MASK_32


def _set_pointer(processor: Processor, value: int, mask: int) -> None:
    if mask == MASK_16:
        value |= processor.general(_RSP) & ~MASK_16
    processor.set_general(_RSP, value)


def _push(form: Form, operand: Operand) -> Execute:
    size, load = operand.size, operand.load

    def execute(processor: Processor) -> None:
        pointer, mask = _pointer(form, processor)
        pointer = pointer - size & mask
        address = _linear(form, processor, pointer)
        memory.probe(processor, address, size, True)  # the operand may be a register that reading changes
        memory.write(processor, address, size, load(processor))
        _set_pointer(processor, pointer, mask)

    return execute


def _pop(form: Form, operand: Operand) -> Execute:
    """The operand's address is computed with the stack pointer as it is afterwards."""
    size, locate = operand.size, operand.address

    def execute(processor: Processor) -> None:
        before = processor.general(_RSP)
        pointer, mask = _pointer(form, processor)
        value = memory.read(processor, _linear(form, processor, pointer), size, False)
        _set_pointer(processor, pointer + size & mask, mask)
        try:
            memory.write(processor, locate(processor), size, value)
        except BaseException:
            processor.set_general(_RSP, before)
            raise

    return execute


def _transfer(form: Form, operand: Operand, call: bool) -> Execute:
    size, load, length = operand.size, operand.load, form.length
    ip_mask = (1 << size * 8) - 1
    canonical = form.bits == 64

    def execute(processor: Processor) -> bool:
        if call:
            pointer, mask = _pointer(form, processor)
            pointer = pointer - size & mask
            address = _linear(form, processor, pointer)
            memory.probe(processor, address, size, True)
        target = load(processor)
        if canonical and (target + (1 << 47)) >> 48 & 0xFFFF:
            raise Fault(GENERAL_PROTECTION, 0)
        if call:
            memory.write(processor, address, size, processor.rip + length & ip_mask)
            _set_pointer(processor, pointer, mask)
        processor.rip = target
        return True

    return execute
