# SPDX-License-Identifier: Apache-2.0
"""Plans of XCHG, XADD, CMPXCHG, CMPXCHG8B and CMPXCHG16B."""

from __future__ import annotations

from . import memory
from .arithmetic import add, sub
from .flags import ZF
from .operands import LEGACY, MASK_32, MASK_64, MEMORY, ONE_BYTE, TWO_BYTE, Form, Operand, general
from .processor import GENERAL_PROTECTION, Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .operands import Execute
    from .processor import Processor

_RAX, _RCX, _RDX, _RBX = 0, 1, 2, 3


def plan(form: Form) -> Execute | None:
    """The plan of ``form``, if it is one of these instructions."""
    if form.encoding != LEGACY or not form.operands:
        return None
    target, source, opcode = form.operands[0], form.operands[-1], form.opcode
    if form.table == ONE_BYTE:
        if opcode in (0x86, 0x87) or (0x91 <= opcode < 0x98 and len(form.operands) == 2):
            return _exchange(target, source)
    elif form.table == TWO_BYTE:
        if opcode in (0xB0, 0xB1):
            return _compare_exchange(target, source)
        if opcode in (0xC0, 0xC1):
            return _exchange_add(target, source)
        if opcode == 0xC7 and form.group == 1 and target.kind == MEMORY:
            return _compare_exchange_pair(target)
    return None


def _exchange(target: Operand, register: Operand) -> Execute:
    load, store = register.load, register.store

    if target.kind == MEMORY:
        locate, size = target.address, target.size

        def in_memory(processor: Processor) -> None:
            address = locate(processor)
            old = memory.read(processor, address, size, True)
            memory.write(processor, address, size, load(processor))
            store(processor, old)

        return in_memory
    load_target, store_target = target.load, target.store

    def in_register(processor: Processor) -> None:
        old, value = load_target(processor), load(processor)
        store_target(processor, value)
        store(processor, old)

    return in_register


def _exchange_add(target: Operand, register: Operand) -> Execute:
    bits, load, store = target.size * 8, register.load, register.store
    if target.kind == MEMORY:
        locate, size = target.address, target.size

        def in_memory(processor: Processor) -> None:
            address = locate(processor)
            old = memory.read(processor, address, size, True)
            total, flags = add(old, load(processor), processor.rflags, bits)
            memory.write(processor, address, size, total)
            store(processor, old)
            processor.rflags = flags

        return in_memory
    load_target, store_target = target.load, target.store

    def in_register(processor: Processor) -> None:
        old = load_target(processor)
        total, flags = add(old, load(processor), processor.rflags, bits)
        store(processor, old)  # before the sum: XADD of a register to itself doubles it
        store_target(processor, total)
        processor.rflags = flags

    return in_register


def _compare_exchange(target: Operand, source: Operand) -> Execute:
    """CMPXCHG: memory is written in any case, with its old value when the accumulator differs."""
    bits, load, accumulator = target.size * 8, source.load, general(_RAX, target.size)

    def compute(processor: Processor, old: int) -> tuple[int, int]:
        flags = sub(accumulator.load(processor), old, processor.rflags, bits)[1]
        return (load(processor) if flags & ZF else old), flags

    if target.kind == MEMORY:
        locate, size = target.address, target.size

        def in_memory(processor: Processor) -> None:
            address = locate(processor)
            old = memory.read(processor, address, size, True)
            value, flags = compute(processor, old)
            memory.write(processor, address, size, value)
            if not flags & ZF:
                accumulator.store(processor, old)
            processor.rflags = flags

        return in_memory
    load_target, store_target = target.load, target.store

    def in_register(processor: Processor) -> None:
        old = load_target(processor)
        value, flags = compute(processor, old)
        if flags & ZF:
            store_target(processor, value)
        else:
            accumulator.store(processor, old)
        processor.rflags = flags

    return in_register


def _compare_exchange_pair(target: Operand) -> Execute:
    """CMPXCHG8B and CMPXCHG16B: RDX:RAX, RCX:RBX."""
    locate, size = target.address, target.size
    half, mask = size * 4, MASK_64 if size == 16 else MASK_32

    def execute(processor: Processor) -> None:
        address = locate(processor)
        if size == 16 and address & 15:
            raise Fault(GENERAL_PROTECTION, 0)
        old = memory.read(processor, address, size, True)
        expected = (processor.general(_RDX) & mask) << half | processor.general(_RAX) & mask
        if old == expected:
            value = (processor.general(_RCX) & mask) << half | processor.general(_RBX) & mask
            memory.write(processor, address, size, value)
            processor.rflags |= ZF
        else:
            memory.write(processor, address, size, old)
            processor.set_general(_RAX, old & mask)
            processor.set_general(_RDX, old >> half)
            processor.rflags &= ~ZF

    return execute
