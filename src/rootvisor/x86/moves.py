# SPDX-License-Identifier: Apache-2.0
"""Plans of instructions that move a value: MOV and its kin, CMOVcc, SETcc, XLATB, MOVDIR64B; and cache hints."""

from __future__ import annotations

from . import memory
from .flags import condition
from .memory import PAGE
from .operands import (
    ES,
    GENERAL,
    IMMEDIATE,
    LEGACY,
    MASK_64,
    MEMORY,
    ONE_BYTE,
    PREFIX_66,
    PREFIX_F2,
    PREFIX_NONE,
    TABLE_38,
    TWO_BYTE,
    Form,
    Operand,
    general,
    linear,
)
from .processor import GENERAL_PROTECTION, Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .operands import Execute
    from .processor import Processor

_OFFSET = PAGE - 1
# MOV r/m,r; MOV r,r/m; MOV with a full address; MOV r,imm; MOV r/m,imm
_MOV = frozenset((0x88, 0x89, 0x8A, 0x8B, 0xA0, 0xA1, 0xA2, 0xA3, *range(0xB0, 0xC0), 0xC6, 0xC7))
# prefetches and reserved no-operations
_HINTS = frozenset((0x0D, *range(0x18, 0x20)))


def plan(form: Form) -> Execute | None:
    """The plan of ``form``, if it is one of these instructions."""
    if form.encoding != LEGACY or not form.operands:
        return None
    target, source = form.operands[0], form.operands[-1]
    if form.table == ONE_BYTE:
        if form.opcode in _MOV and form.group <= 0:
            return _move(form, target, source)
        if form.opcode == 0x63 and form.bits == 64:
            return _move_signed(target, source)
        if form.opcode == 0xD7:
            return _move(form, general(0, 1), source)
    elif form.table == TWO_BYTE:
        return _two_byte(form, target, source)
    elif form.table == TABLE_38:
        if form.opcode in (0xF0, 0xF1) and form.prefix != PREFIX_F2:
            return _move_swapped(target, source)
        if form.opcode == 0xF9 and form.prefix == PREFIX_NONE:
            return _move(form, target, source)
        if form.opcode == 0xF8 and form.prefix == PREFIX_66:
            return _move_64_bytes(form, target, source)
    return None


def _two_byte(form: Form, target: Operand, source: Operand) -> Execute | None:
    opcode = form.opcode
    if opcode in (0xB6, 0xB7):
        return _move(form, target, source)
    if opcode in (0xBE, 0xBF):
        return _move_signed(target, source)
    if opcode == 0xC3 and target.kind == MEMORY and source.kind == GENERAL:
        return _move(form, target, source)
    if 0x40 <= opcode < 0x50 and target.kind == GENERAL:
        return _move_if(target, source, opcode)
    if 0x90 <= opcode < 0xA0 and target.size == 1:
        return _set_if(target, opcode)
    if target.kind == MEMORY and (
        opcode in _HINTS
        or (opcode == 0xAE and (form.group == 7 or (form.group == 6 and form.prefix == PREFIX_66)))
    ):
        return _nothing  # CLFLUSH, CLFLUSHOPT, CLWB as well
    return None


def _nothing(processor: Processor) -> None:
    """A hint."""


def _move(form: Form, target: Operand, source: Operand) -> Execute:
    """MOV, MOVZX, MOVNTI, MOVDIRI."""
    size = form.memory_size
    if target.kind == MEMORY:
        if form.base >= 0:
            if source.kind == IMMEDIATE:
                return _store_immediate(
                    form.base, form.displacement, size, source.value & (1 << size * 8) - 1
                )
            if source.size == size and size in (4, 8) and source.kind == GENERAL:
                return _store_register(form.base, form.displacement, size, source.number)
        return _assign(target, source, size)
    if source.kind == MEMORY and form.base >= 0 and target.size >= 4:
        return _load_register(form.base, form.displacement, size, target.number)
    return _assign(target, source, target.size)


def _store_register(base: int, displacement: int, size: int, number: int) -> Execute:
    most, mask = PAGE - size, (1 << size * 8) - 1

    def execute(processor: Processor) -> None:
        address = processor.general(base) + displacement & MASK_64
        if address & _OFFSET <= most:
            processor.write(address, size, processor.general(number) & mask)
        else:
            memory.write(processor, address, size, processor.general(number))

    return execute


def _store_immediate(base: int, displacement: int, size: int, value: int) -> Execute:
    most = PAGE - size

    def execute(processor: Processor) -> None:
        address = processor.general(base) + displacement & MASK_64
        if address & _OFFSET <= most:
            processor.write(address, size, value)
        else:
            memory.write(processor, address, size, value)

    return execute


def _load_register(base: int, displacement: int, size: int, number: int) -> Execute:
    most = PAGE - size

    def execute(processor: Processor) -> None:
        address = processor.general(base) + displacement & MASK_64
        if address & _OFFSET <= most:
            processor.set_general(number, processor.read(address, size, False))
        else:
            processor.set_general(number, memory.read(processor, address, size, False))

    return execute


def _assign(target: Operand, source: Operand, size: int) -> Execute:
    load, store, mask = source.load, target.store, (1 << size * 8) - 1
    return lambda processor: store(processor, load(processor) & mask)


def _move_signed(target: Operand, source: Operand) -> Execute:
    """MOVSX, MOVSXD."""
    load, store = source.load, target.store
    sign, mask = 1 << source.size * 8 - 1, (1 << target.size * 8) - 1
    return lambda processor: store(processor, (load(processor) ^ sign) - sign & mask)


def _move_swapped(target: Operand, source: Operand) -> Execute:
    """MOVBE."""
    load, store, size = source.load, target.store, source.size
    return lambda processor: store(processor, int.from_bytes(load(processor).to_bytes(size, "little"), "big"))


def _move_if(target: Operand, source: Operand, number: int) -> Execute:
    """CMOVcc: the source is read in any case, and a 32-bit target clears the upper half."""
    load, previous, store, test = source.load, target.load, target.store, condition(number)

    def execute(processor: Processor) -> None:
        value = load(processor)
        store(processor, value if test(processor.rflags) else previous(processor))

    return execute


def _set_if(target: Operand, number: int) -> Execute:
    store, test = target.store, condition(number)
    return lambda processor: store(processor, int(test(processor.rflags)))


def _move_64_bytes(form: Form, target: Operand, source: Operand) -> Execute:
    """MOVDIR64B: the destination is a register's address, in ES."""
    register, mask, load = target.number, form.address_mask, source.load
    destination = linear(form, ES, lambda processor: processor.general(register) & mask)

    def execute(processor: Processor) -> None:
        address = destination(processor)
        if address & 63:
            raise Fault(GENERAL_PROTECTION, 0)
        processor.probe(address, 64, True)
        memory.write(processor, address, 64, load(processor))

    return execute
