# SPDX-License-Identifier: Apache-2.0
"""Plans of BT, BTS, BTR, BTC, BSF, BSR, TZCNT, LZCNT, POPCNT."""

from __future__ import annotations

from . import memory
from .arithmetic import signed
from .flags import CF, STATUS, ZF
from .operands import IMMEDIATE, LEGACY, MEMORY, PREFIX_F3, TWO_BYTE, Form, Operand, linear

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .operands import Execute, Load
    from .processor import Processor

_TEST, _SET, _RESET, _COMPLEMENT = range(4)


def plan(form: Form) -> Execute | None:
    """The plan of ``form``, if it is one of these instructions."""
    if form.encoding != LEGACY or form.table != TWO_BYTE or len(form.operands) != 2:
        return None
    target, source = form.operands
    opcode = form.opcode
    if opcode in (0xA3, 0xAB, 0xB3, 0xBB):
        return _bit(form, target, source, opcode >> 3 & 3)
    if opcode == 0xBA and form.group >= 4:
        return _bit(form, target, source, form.group & 3)
    if opcode == 0xB8 and form.prefix == PREFIX_F3:
        return _count(target, source, _population)
    if opcode == 0xBC:
        return _count(target, source, _trailing) if form.prefix == PREFIX_F3 else _scan(target, source, False)
    if opcode == 0xBD:
        return _count(target, source, _leading) if form.prefix == PREFIX_F3 else _scan(target, source, True)
    return None


def _bit(form: Form, target: Operand, offset: Operand, operation: int) -> Execute:
    """The bit goes to CF. A register's offset into memory is signed and reaches beyond the operand."""
    size = target.size
    bits = size * 8
    load = offset.load
    if target.kind != MEMORY:
        load_target, store = target.load, target.store

        def in_register(processor: Processor) -> None:
            old, bit = load_target(processor), load(processor) & bits - 1
            if operation:
                store(processor, _changed(old, 1 << bit, operation))
            processor.rflags = processor.rflags & ~CF | old >> bit & 1

        return in_register
    locate = target.address if offset.kind == IMMEDIATE else _locate_word(form, target, offset)

    def in_memory(processor: Processor) -> None:
        address, bit = locate(processor), load(processor) & bits - 1
        old = memory.read(processor, address, size, operation != _TEST)
        if operation:
            memory.write(processor, address, size, _changed(old, 1 << bit, operation))
        processor.rflags = processor.rflags & ~CF | old >> bit & 1

    return in_memory


def _changed(old: int, bit: int, operation: int) -> int:
    if operation == _SET:
        return old | bit
    return old & ~bit if operation == _RESET else old ^ bit


def _locate_word(form: Form, target: Operand, offset: Operand) -> Load:
    """The operand that the bit lies in: away from the address by whole operands, in the width of addresses."""
    size, load, offset_in_segment, mask = target.size, offset.load, target.offset, form.address_mask
    bits = size * 8
    return linear(
        form,
        form.segment,
        lambda processor: (
            offset_in_segment(processor) + (signed(load(processor), bits) // bits) * size & mask
        ),
    )


def _count(target: Operand, source: Operand, operation: Callable[[int, int], tuple[int, int]]) -> Execute:
    bits, load, store = target.size * 8, source.load, target.store

    def execute(processor: Processor) -> None:
        value, status = operation(load(processor), bits)
        store(processor, value)
        processor.rflags = processor.rflags & ~STATUS | status

    return execute


def _population(value: int, bits: int) -> tuple[int, int]:
    return value.bit_count(), 0 if value else ZF


def _trailing(value: int, bits: int) -> tuple[int, int]:
    count = (value & -value).bit_length() - 1 if value else bits
    return count, (0 if value else CF) | (0 if count else ZF)


def _leading(value: int, bits: int) -> tuple[int, int]:
    count = bits - value.bit_length()
    return count, (0 if value else CF) | (0 if count else ZF)


def _scan(target: Operand, source: Operand, reverse: bool) -> Execute:
    """BSF, BSR. The target stays as it is when there is no bit, as all processors do it."""
    load, store = source.load, target.store

    def execute(processor: Processor) -> None:
        value = load(processor)
        flags = processor.rflags & ~ZF
        if value:
            store(processor, value.bit_length() - 1 if reverse else (value & -value).bit_length() - 1)
        else:
            flags |= ZF
        processor.rflags = flags

    return execute
