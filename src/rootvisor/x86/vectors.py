# SPDX-License-Identifier: Apache-2.0
"""Plans of moves between memory and vector registers, and of what string functions do bitwise and by comparison.

Legacy (SSE), VEX (AVX) and EVEX (AVX-512) encodings of 128, 256 and 512 bits; no write masks. Forms of registers alone
are not here: they touch no memory.
"""

from __future__ import annotations

from . import memory
from .operands import (
    EVEX,
    LEGACY,
    MEMORY,
    PREFIX_66,
    PREFIX_F2,
    PREFIX_F3,
    PREFIX_NONE,
    TABLE_3A,
    TABLE_38,
    TWO_BYTE,
    VECTOR,
    VEX,
    Form,
    Operand,
)
from .processor import GENERAL_PROTECTION, Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .operands import Execute, Load
    from .processor import Processor

    Combine = Callable[[int, int, int], int]

_WHOLE = 64
_LOW = (1 << 64) - 1
_N, _66, _F3, _F2 = PREFIX_NONE, PREFIX_66, PREFIX_F3, PREFIX_F2

#: (table, prefix, opcode) of whole loads and stores: MOVUPS, MOVUPD, MOVDQU, LDDQU, and VMOVDQU8 to 64.
_UNALIGNED = frozenset(
    {
        (TWO_BYTE, _N, 0x10), (TWO_BYTE, _66, 0x10), (TWO_BYTE, _N, 0x11), (TWO_BYTE, _66, 0x11),
        (TWO_BYTE, _F3, 0x6F), (TWO_BYTE, _F3, 0x7F), (TWO_BYTE, _F2, 0x6F), (TWO_BYTE, _F2, 0x7F),
        (TWO_BYTE, _F2, 0xF0),
    }
)  # fmt: skip
#: The same with an aligned operand: MOVAPS, MOVAPD, MOVDQA, MOVNTPS, MOVNTPD, MOVNTDQ, MOVNTDQA.
_ALIGNED = frozenset(
    {
        (TWO_BYTE, _N, 0x28), (TWO_BYTE, _66, 0x28), (TWO_BYTE, _N, 0x29), (TWO_BYTE, _66, 0x29),
        (TWO_BYTE, _66, 0x6F), (TWO_BYTE, _66, 0x7F), (TWO_BYTE, _N, 0x2B), (TWO_BYTE, _66, 0x2B),
        (TWO_BYTE, _66, 0xE7), (TABLE_38, _66, 0x2A),
    }
)  # fmt: skip
#: Parts: MOVD, MOVQ, MOVSS, MOVSD. A load clears the rest of the 128 bits.
_PARTS = frozenset(
    {
        (TWO_BYTE, _66, 0x6E), (TWO_BYTE, _66, 0x7E), (TWO_BYTE, _F3, 0x7E), (TWO_BYTE, _66, 0xD6),
        (TWO_BYTE, _F3, 0x10), (TWO_BYTE, _F3, 0x11), (TWO_BYTE, _F2, 0x10), (TWO_BYTE, _F2, 0x11),
    }
)  # fmt: skip
#: MOVLPS, MOVLPD, MOVHPS, MOVHPD: half of a register, the other half kept.
_HALVES = frozenset((0x12, 0x13, 0x16, 0x17))


def plan(form: Form) -> Execute | None:
    """The plan of ``form``, if it is one of these instructions."""
    operand = form.memory
    if operand is None or form.masked or form.encoding > EVEX:
        return None
    place = (form.table, form.prefix, form.opcode)
    target, source = form.operands[0], form.operands[-1]
    if place in _UNALIGNED or place in _ALIGNED or place in _PARTS:
        return _move(form, target, source, place in _ALIGNED)
    if form.table == TWO_BYTE and form.opcode in _HALVES and form.prefix in (_N, _66):
        return _half(form, target, 64 if form.opcode >= 0x16 else 0)
    if target.kind != VECTOR:
        return _extract(form, target) if form.table == TABLE_3A else None
    broadcast = _BROADCASTS.get(form.opcode)
    if broadcast and form.table == TABLE_38 and form.encoding != LEGACY and form.prefix == _66:
        return _broadcast(form, target, operand)
    insert = _insertion(form)
    if insert:
        return _insert(form, target, operand, insert)
    combine = _COMBINES.get((form.prefix, form.opcode)) if form.table == TWO_BYTE else None
    if combine is not None and form.encoding != EVEX:
        return _combine(form, target, operand, combine)
    return None


def _loaded(form: Form, target: Operand) -> Callable[[Processor, int], None]:
    """Writes the result's register: SSE leaves what is beyond 128 bits, VEX and EVEX clear what is beyond theirs."""
    number, size = target.number, 16 if form.encoding == LEGACY else _WHOLE
    return lambda processor, value: processor.set_vector(number, size, value)


def _checked(form: Form, operand: Operand, aligned: bool) -> Load:
    """The operand's address; #GP(0) if it must be aligned and is not."""
    locate = operand.address
    if not aligned:
        return locate
    low = operand.size - 1

    def locate_aligned(processor: Processor) -> int:
        address = locate(processor)
        if address & low:
            raise Fault(GENERAL_PROTECTION, 0)
        return address

    return locate_aligned


def _move(form: Form, target: Operand, source: Operand, aligned: bool) -> Execute | None:
    if target.kind == MEMORY and source.kind == VECTOR:
        locate, size, number = _checked(form, target, aligned), target.size, source.number
        width = max(size, 16)

        def store(processor: Processor) -> None:
            memory.write(processor, locate(processor), size, processor.vector(number, width))

        return store
    if target.kind == VECTOR and source.kind == MEMORY:
        locate, size, put = _checked(form, source, aligned), source.size, _loaded(form, target)
        return lambda processor: put(processor, memory.read(processor, locate(processor), size, False))
    return None  # MMX


def _half(form: Form, target: Operand, shift: int) -> Execute | None:
    if target.kind == MEMORY:
        number = form.operands[-1].number
        store = target.store
        return lambda processor: store(processor, processor.vector(number, 16) >> shift)
    if form.memory_size != 8:
        return None
    other, load, put = form.operands[-2].number, form.operands[-1].load, _loaded(form, target)
    keep = _LOW if shift else _LOW << 64
    return lambda processor: put(processor, processor.vector(other, 16) & keep | load(processor) << shift)


#: VPBROADCASTB, W, D, Q; VBROADCASTSS, SD, F128, I128.
_BROADCASTS = dict.fromkeys((0x78, 0x79, 0x58, 0x59, 0x18, 0x19, 0x1A, 0x5A), True)


def _broadcast(form: Form, target: Operand, operand: Operand) -> Execute | None:
    if form.encoding == EVEX and form.opcode in (0x1A, 0x5A, 0x19, 0x59) and not form.wide:
        return None  # pairs of 32 bits and the like
    count, bits, load, put = (
        target.size // operand.size,
        operand.size * 8,
        operand.load,
        _loaded(form, target),
    )
    ones = sum(1 << bits * n for n in range(count))
    return lambda processor: put(processor, load(processor) * ones)


def _insertion(form: Form) -> int:
    """The element's size of PINSRB, W, D, Q and VINSERTF128, VINSERTI128; 0 for others."""
    if form.table == TWO_BYTE and form.opcode == 0xC4 and form.prefix == _66:
        return 2
    if form.table == TABLE_3A and form.prefix == _66:
        if form.opcode in (0x20, 0x22):
            return form.memory_size
        if form.opcode in (0x18, 0x38) and form.encoding == VEX:
            return 16
    return 0


def _insert(form: Form, target: Operand, operand: Operand, size: int) -> Execute:
    width = target.size
    bits = size * 8
    shift = (form.operands[-1].value & width // size - 1) * bits
    other, load, put = form.operands[-3].number, operand.load, _loaded(form, target)
    keep = ~((1 << bits) - 1 << shift)
    return lambda processor: put(processor, processor.vector(other, width) & keep | load(processor) << shift)


def _extract(form: Form, target: Operand) -> Execute | None:
    """PEXTRB, W, D, Q; VEXTRACTF128, VEXTRACTI128."""
    if form.prefix != _66 or target.kind != MEMORY:
        return None
    number, store, size = form.operands[1].number, target.store, target.size
    if form.opcode in (0x14, 0x15, 0x16):
        width = 16
    elif form.opcode in (0x19, 0x39) and form.encoding == VEX:
        width = 32
    else:
        return None
    shift = (form.operands[2].value & width // size - 1) * size * 8
    return lambda processor: store(processor, processor.vector(number, width) >> shift)


def _combine(form: Form, target: Operand, operand: Operand, combine: Combine) -> Execute:
    """``combine(first register, memory, bytes)``. The memory operand of SSE must be aligned."""
    other, size, put = form.operands[-2].number, operand.size, _loaded(form, target)
    locate = _checked(form, operand, form.encoding == LEGACY)

    def execute(processor: Processor) -> None:
        value = memory.read(processor, locate(processor), size, False)
        put(processor, combine(processor.vector(other, size), value, size))

    return execute


def _by_element(element: int, operation: Callable[[int, int], int]) -> Combine:
    def combine(a: int, b: int, size: int) -> int:
        first, second = a.to_bytes(size, "little"), b.to_bytes(size, "little")
        result = bytearray()
        for at in range(0, size, element):
            x = int.from_bytes(first[at : at + element], "little")
            y = int.from_bytes(second[at : at + element], "little")
            result += operation(x, y).to_bytes(element, "little")
        return int.from_bytes(result, "little")

    return combine


def _equal(element: int) -> Combine:
    ones = (1 << element * 8) - 1
    return _by_element(element, lambda a, b: ones if a == b else 0)


def _and(a: int, b: int, size: int) -> int:
    return a & b


def _and_not(a: int, b: int, size: int) -> int:
    return ~a & b


def _or(a: int, b: int, size: int) -> int:
    return a | b


def _xor(a: int, b: int, size: int) -> int:
    return a ^ b


_COMBINES: dict[tuple[int, int], Combine] = {
    (_66, 0xDB): _and, (_N, 0x54): _and, (_66, 0x54): _and,
    (_66, 0xDF): _and_not, (_N, 0x55): _and_not, (_66, 0x55): _and_not,
    (_66, 0xEB): _or, (_N, 0x56): _or, (_66, 0x56): _or,
    (_66, 0xEF): _xor, (_N, 0x57): _xor, (_66, 0x57): _xor,
    (_66, 0x74): _equal(1), (_66, 0x75): _equal(2), (_66, 0x76): _equal(4),
    (_66, 0xDA): _by_element(1, min), (_66, 0xDE): _by_element(1, max),
}  # fmt: skip
