# SPDX-License-Identifier: Apache-2.0
"""Operands of an instruction that is going to be executed, as functions on a processor; what plans are made from."""

from __future__ import annotations

from . import decoder, memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .processor import Processor

    #: Carries an instruction out. True: RIP is set, or stays; else it moves behind the instruction.
    Execute = Callable[[Processor], bool | None]
    Load = Callable[[Processor], int]
    Store = Callable[[Processor, int], None]

# numbers of iced-x86 (OpKind, EncodingKind, OpCodeTableKind, MandatoryPrefix, Register)
_KIND_REGISTER, _KIND_BRANCH_END, _KIND_IMMEDIATE_END, _KIND_MEMORY = 0, 6, 15, 24
_FIRST_GENERAL, _FIRST_EIP, _FIRST_VECTOR, _AFTER_VECTORS = 1, 69, 77, 173
_FIRST_HIGH_BYTE, _AFTER_HIGH_BYTES = 5, 9
LEGACY, VEX, EVEX = 0, 1, 2
ONE_BYTE, TWO_BYTE, TABLE_38, TABLE_3A = 0, 1, 2, 3
PREFIX_NONE, PREFIX_66, PREFIX_F3, PREFIX_F2 = 1, 2, 3, 4

FS = 4
DS, ES, SS = 3, 0, 2
MASK_64, MASK_32, MASK_16 = 0xFFFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF, 0xFFFF

GENERAL, VECTOR, MEMORY, IMMEDIATE, OTHER = range(5)


class Operand:
    """``kind``; ``size`` in bytes; ``number`` of a register; ``value`` of an immediate; ``load`` and ``store``.

    ``address`` gives the linear address of an operand in memory, ``offset`` that in its segment.
    """

    __slots__ = ("address", "kind", "load", "number", "offset", "size", "store", "value")

    def __init__(self, kind: int, size: int) -> None:
        self.kind = kind
        self.size = size
        self.number = 0
        self.value = 0
        self.load: Load = _no_load
        self.store: Store = _no_store
        self.address: Load = _no_load
        self.offset: Load = _no_load


def _no_load(processor: Processor) -> int:
    raise AssertionError("this operand cannot be read")


def _no_store(processor: Processor, value: int) -> None:
    raise AssertionError("this operand cannot be written")


class Form:
    """An instruction, reduced to what a plan is made from. Numbers are those of iced-x86."""

    __slots__ = (
        "address_mask", "base", "bits", "displacement", "encoding", "far", "group", "ip_mask", "length", "masked",
        "memory_size", "opcode", "operands", "prefix", "repeat", "repeat_not", "segment", "string", "table", "vsib",
        "wide",
    )  # fmt: skip

    def __init__(self, decoded: Any, bits: int) -> None:
        code = decoded.op_code()
        self.bits = bits
        self.length: int = decoded.len
        self.encoding: int = code.encoding
        self.table: int = code.table
        self.opcode: int = code.op_code
        self.group: int = code.group_index
        self.prefix: int = code.mandatory_prefix
        self.repeat: bool = decoded.has_rep_prefix
        self.repeat_not: bool = decoded.has_repne_prefix
        self.masked: bool = decoded.op_mask != 0 or decoded.is_broadcast
        self.vsib: bool = decoded.is_vsib
        self.string: bool = decoded.is_string_instruction
        self.far: bool = decoded.is_call_far_indirect or decoded.is_jmp_far_indirect
        self.wide: bool = code.w == 1
        self.ip_mask = MASK_64 if bits == 64 else MASK_32
        self.memory_size: int = decoder.load().MemorySizeExt.size(decoded.memory_size)
        self.segment = _number(decoded.memory_segment) if decoded.memory_segment else DS
        self.address_mask = _address_mask(decoded, bits)
        # of plain 64-bit addressing with a base register, for the quickest plans; else base is -1
        self.base = -1
        self.displacement = 0
        self.operands: tuple[Operand, ...] = tuple(
            _operand(self, decoded, n) for n in range(decoded.op_count)
        )

    @property
    def memory(self) -> Operand | None:
        """The operand in memory."""
        for operand in self.operands:
            if operand.kind == MEMORY:
                return operand
        return None


def _number(register: int) -> int:
    number: int = decoder.load().RegisterExt.number(register)
    return number


def _address_mask(decoded: Any, bits: int) -> int:
    sizes = {64: MASK_64, 32: MASK_32, 16: MASK_16}
    for index in range(decoded.op_count):
        kind = decoded.op_kind(index)
        if 15 <= kind < _KIND_MEMORY:
            return (MASK_16, MASK_32, MASK_64)[(kind - 15) % 3]
        if kind == _KIND_MEMORY:
            register = decoded.memory_base or decoded.memory_index
            if decoded.is_vsib:
                register = decoded.memory_base
            if register:
                return sizes[8 * decoder.load().RegisterExt.size(register)] if register > 20 else sizes[bits]
            return sizes.get(8 * decoded.memory_displ_size, sizes[bits])
    return sizes[bits]


def _operand(form: Form, decoded: Any, index: int) -> Operand:
    kind = decoded.op_kind(index)
    if kind == _KIND_REGISTER:
        return _register(decoded.op_register(index))
    if _KIND_BRANCH_END <= kind < _KIND_IMMEDIATE_END:
        operand = Operand(IMMEDIATE, form.memory_size)
        value = operand.value = decoded.immediate(index) & MASK_64
        operand.load = lambda processor: value
        return operand
    if kind == _KIND_MEMORY and not form.vsib:
        return _memory(form, decoded)
    return Operand(OTHER, form.memory_size)


def _register(register: int) -> Operand:
    extension = decoder.load().RegisterExt
    size, number = extension.size(register), extension.number(register)
    if _FIRST_GENERAL <= register < _FIRST_EIP:
        full = extension.number(extension.full_register(register))
        return general(full, size, 8 if _FIRST_HIGH_BYTE <= register < _AFTER_HIGH_BYTES else 0)
    if _FIRST_VECTOR <= register < _AFTER_VECTORS:
        operand = Operand(VECTOR, size)
        operand.number = number
        operand.load = lambda processor: processor.vector(number, size)
        return operand
    return Operand(OTHER, size)


def general(number: int, size: int, shift: int = 0) -> Operand:
    """A general register, or the part of it that an instruction of ``size`` bytes uses (``shift`` 8: AH and so on)."""
    operand = Operand(GENERAL, size)
    operand.number = number
    if size == 8:
        operand.load = lambda processor: processor.general(number)
        operand.store = lambda processor, value: processor.set_general(number, value)
    elif size == 4:
        operand.load = lambda processor: processor.general(number) & MASK_32
        operand.store = lambda processor, value: processor.set_general(number, value)
    elif shift:
        operand.load = lambda processor: processor.general(number) >> 8 & 0xFF
        operand.store = lambda processor, value: processor.set_general(
            number, processor.general(number) & ~0xFF00 | value << 8
        )
    else:
        mask = (1 << size * 8) - 1
        operand.load = lambda processor: processor.general(number) & mask
        operand.store = lambda processor, value: processor.set_general(
            number, processor.general(number) & ~mask | value
        )
    return operand


def _memory(form: Form, decoded: Any) -> Operand:
    size = form.memory_size
    operand = Operand(MEMORY, size)
    operand.offset = _effective_address(form, decoded)
    address = operand.address = linear(form, form.segment, operand.offset)
    operand.load = lambda processor: memory.read(processor, address(processor), size, False)
    operand.store = lambda processor, value: memory.write(processor, address(processor), size, value)
    return operand


def _effective_address(form: Form, decoded: Any) -> Load:
    mask = form.address_mask
    displacement = decoded.memory_displacement & MASK_64
    if decoded.is_ip_rel_memory_operand:  # decoded at 0: the displacement counts from there
        offset: Load = lambda processor: processor.rip + displacement & mask  # noqa: E731
    else:
        base = _number(decoded.memory_base) if decoded.memory_base else -1
        index = _number(decoded.memory_index) if decoded.memory_index else -1
        if decoded.memory_index and decoder.load().RegisterExt.size(decoded.memory_index) == 1:
            offset = _translation_table(base, mask)
        else:
            offset = _offset(base, index, decoded.memory_index_scale, displacement, mask)
        if form.bits == 64 and mask == MASK_64 and index < 0 <= base and form.segment < FS:
            form.base, form.displacement = base, displacement
    return offset


def _offset(base: int, index: int, scale: int, displacement: int, mask: int) -> Load:
    if index < 0:
        if base < 0:
            constant = displacement & mask
            return lambda processor: constant
        return lambda processor: processor.general(base) + displacement & mask
    if base < 0:
        return lambda processor: processor.general(index) * scale + displacement & mask
    return lambda processor: processor.general(base) + processor.general(index) * scale + displacement & mask


def _translation_table(base: int, mask: int) -> Load:
    """XLATB: AL is the index."""
    return lambda processor: processor.general(base) + (processor.general(0) & 0xFF) & mask


def linear(form: Form, segment: int, offset: Load) -> Load:
    """A linear address from an offset in a segment. Limits are not looked at: the processor did before it stopped."""
    if form.bits == 64:
        if segment < FS:
            return offset
        return lambda processor: processor.segment_base(segment) + offset(processor) & MASK_64
    return lambda processor: processor.segment_base(segment) + offset(processor) & MASK_32
