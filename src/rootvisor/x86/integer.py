# SPDX-License-Identifier: Apache-2.0
"""Plans of arithmetic, logic, shifts, multiplication and division."""

from __future__ import annotations

from . import arithmetic, memory, shifts
from .operands import (
    GENERAL,
    IMMEDIATE,
    LEGACY,
    MEMORY,
    ONE_BYTE,
    PREFIX_66,
    PREFIX_F2,
    PREFIX_F3,
    TABLE_3A,
    TABLE_38,
    TWO_BYTE,
    VEX,
    Form,
    Operand,
    general,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .arithmetic import Binary, Unary
    from .operands import Execute, Load
    from .processor import Processor

    Compute = Callable[[Processor, int], tuple[int, int]]

_RAX, _RCX, _RDX = 0, 1, 2


def plan(form: Form) -> Execute | None:
    """The plan of ``form``, if it is one of these instructions."""
    if form.encoding == VEX:
        return _bmi(form)
    if form.encoding != LEGACY or not form.operands:
        return None
    target, opcode = form.operands[0], form.opcode
    if form.table == ONE_BYTE:
        return _one_byte(form, opcode, target)
    if form.table == TWO_BYTE:
        if opcode == 0xAF:
            return _multiply_into(target, form.operands[0], form.operands[1])
        if opcode in (0xA4, 0xA5, 0xAC, 0xAD):
            return _shift_double(target, form.operands[1], form.operands[2], opcode)
    return None


def _one_byte(form: Form, opcode: int, target: Operand) -> Execute | None:
    group = form.group
    if opcode < 0x40 and opcode & 7 < 6:
        return _binary(target, form.operands[1], arithmetic.GROUP_1[opcode >> 3], opcode >> 3 != 7)
    if 0x80 <= opcode < 0x84:
        return _binary(target, form.operands[1], arithmetic.GROUP_1[group], group != 7)
    if opcode in (0x84, 0x85, 0xA8, 0xA9) or (opcode in (0xF6, 0xF7) and group < 2):
        return _binary(target, form.operands[1], arithmetic.logical_and, False)
    if opcode in (0xC0, 0xC1, 0xD0, 0xD1, 0xD2, 0xD3):
        return _shift(target, form.operands[1], group)
    if opcode in (0x69, 0x6B):
        return _multiply_into(target, form.operands[1], form.operands[2])
    if opcode in (0xF6, 0xF7):
        if group < 4:
            return _unary(target, arithmetic.invert if group == 2 else arithmetic.negate)
        return _multiply(target, group == 5) if group < 6 else _divide(target, group == 7)
    if opcode in (0xFE, 0xFF) and group < 2:
        return _unary(target, arithmetic.decrement if group else arithmetic.increment)
    if 0x40 <= opcode < 0x50:
        return _unary(target, arithmetic.decrement if opcode & 8 else arithmetic.increment)
    return None


def modify(target: Operand, compute: Compute) -> Execute:
    """Reads ``target``, writes what ``compute(processor, old)`` gives, and RFLAGS. Memory must be writable first."""
    if target.kind != MEMORY:
        load, store = target.load, target.store

        def execute(processor: Processor) -> None:
            value, flags = compute(processor, load(processor))
            store(processor, value)
            processor.rflags = flags

        return execute
    locate, size = target.address, target.size

    def execute_in_memory(processor: Processor) -> None:
        address = locate(processor)
        value, flags = compute(processor, memory.read(processor, address, size, True))
        memory.write(processor, address, size, value)
        processor.rflags = flags

    return execute_in_memory


def masked(source: Operand, size: int) -> Load:
    """The source's value in ``size`` bytes: immediates are sign-extended further than that."""
    if source.kind != IMMEDIATE:
        return source.load
    value = source.value & (1 << size * 8) - 1
    return lambda processor: value


def _binary(target: Operand, source: Operand, operation: Binary, writes: bool) -> Execute:
    bits = target.size * 8
    load = masked(source, target.size)
    if writes:
        return modify(target, lambda processor, old: operation(old, load(processor), processor.rflags, bits))
    load_target = target.load

    def compare(processor: Processor) -> None:
        processor.rflags = operation(load_target(processor), load(processor), processor.rflags, bits)[1]

    return compare


def _unary(target: Operand, operation: Unary) -> Execute:
    bits = target.size * 8
    return modify(target, lambda processor, old: operation(old, processor.rflags, bits))


def _shift(target: Operand, count: Operand, group: int) -> Execute:
    operation, bits, load = shifts.GROUP_2[group], target.size * 8, masked(count, 1)
    return modify(target, lambda processor, old: operation(old, load(processor), processor.rflags, bits))


def _shift_double(target: Operand, source: Operand, count: Operand, opcode: int) -> Execute:
    operation = shifts.shift_right_double if opcode & 8 else shifts.shift_left_double
    bits, load, load_count = target.size * 8, source.load, masked(count, 1)
    return modify(
        target,
        lambda processor, old: operation(old, load(processor), load_count(processor), processor.rflags, bits),
    )


def _multiply_into(target: Operand, first: Operand, second: Operand) -> Execute:
    """IMUL of two operands into a register."""
    bits, mask = target.size * 8, (1 << target.size * 8) - 1
    load, load_second, store = first.load, masked(second, target.size), target.store

    def execute(processor: Processor) -> None:
        product, flags = arithmetic.multiply_signed(
            load(processor), load_second(processor), processor.rflags, bits
        )
        store(processor, product & mask)
        processor.rflags = flags

    return execute


def _multiply(source: Operand, signed: bool) -> Execute:
    """MUL, IMUL of RAX; the product goes to RDX:RAX, to AX for bytes."""
    operation = arithmetic.multiply_signed if signed else arithmetic.multiply
    size, load, factor = source.size, source.load, general(_RAX, source.size)
    bits, mask = size * 8, (1 << size * 8) - 1
    low = general(_RAX, 2 if size == 1 else size)
    high = general(_RDX, size)

    def execute(processor: Processor) -> None:
        product, flags = operation(factor.load(processor), load(processor), processor.rflags, bits)
        if size == 1:
            low.store(processor, product)
        else:
            low.store(processor, product & mask)
            high.store(processor, product >> bits)
        processor.rflags = flags

    return execute


def _divide(source: Operand, signed: bool) -> Execute:
    """DIV, IDIV of RDX:RAX; of AX for bytes, with the remainder in AH."""
    operation = arithmetic.divide_signed if signed else arithmetic.divide
    size, load = source.size, source.load
    bits = size * 8
    low = general(_RAX, 2 if size == 1 else size)
    high = general(_RDX, size)

    def execute(processor: Processor) -> None:
        divisor = load(processor)
        if size == 1:
            quotient, remainder = operation(low.load(processor), divisor, bits)
            low.store(processor, remainder << 8 | quotient)
        else:
            dividend = high.load(processor) << bits | low.load(processor)
            quotient, remainder = operation(dividend, divisor, bits)
            low.store(processor, quotient)
            high.store(processor, remainder)

    return execute


def _bmi(form: Form) -> Execute | None:
    """ANDN, SHLX, SHRX, SARX, RORX, MULX: what compilers use with processors from 2013 on."""
    operands = form.operands
    if len(operands) != 3 or operands[0].kind != GENERAL:
        return None
    target, first, second = operands
    bits, mask = target.size * 8, (1 << target.size * 8) - 1
    load, load_second, store = first.load, second.load, target.store
    if form.table == TABLE_38 and form.opcode == 0xF2:

        def execute(processor: Processor) -> None:
            value, processor_flags = arithmetic.and_not(
                load(processor), load_second(processor), processor.rflags, bits
            )
            store(processor, value)
            processor.rflags = processor_flags

        return execute
    if form.table == TABLE_3A and form.opcode == 0xF0:
        count = second.value
        return lambda processor: store(processor, shifts.rotate_right(load(processor), count, 0, bits)[0])
    if form.table == TABLE_38 and form.opcode == 0xF7:
        operation = {
            PREFIX_66: shifts.shift_left, PREFIX_F2: shifts.shift_right, PREFIX_F3: shifts.shift_right_arithmetic,
        }.get(form.prefix)  # fmt: skip
        if operation is None:
            return None
        return lambda processor: store(
            processor, operation(load(processor), load_second(processor), 0, bits)[0]
        )
    if form.table == TABLE_38 and form.opcode == 0xF6 and form.prefix == PREFIX_F2:
        factor, store_low = general(_RDX, target.size).load, first.store

        def multiply(processor: Processor) -> None:
            product = factor(processor) * load_second(processor)
            store_low(processor, product & mask)
            store(processor, product >> bits)

        return multiply
    return None
