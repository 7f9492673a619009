# SPDX-License-Identifier: Apache-2.0
"""Bytes to :class:`~.instruction.Instruction`.

The iced-x86 library does the decoding (MIT licence; it knows every form, with the memory that each touches implicitly).
Its extension module alone is loaded, at the first decode: the package around it imports forty modules of constants.
"""

from __future__ import annotations

from _frozen_importlib_external import PathFinder  # type: ignore[import-not-found, unused-ignore]
from _thread import allocate_lock

from .instruction import (
    CS,
    DS,
    ES,
    FS,
    GS,
    RAX,
    RIP,
    RSP,
    SELECTOR_IMMEDIATE,
    SELECTOR_MEMORY,
    SELECTOR_REGISTER,
    SOURCE_IMMEDIATE,
    SOURCE_REGISTER,
    SS,
    Access,
    Instruction,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PACKAGE, _EXTENSION = "iced_x86", "_iced_x86_py"

#: Most bytes of one instruction.
LONGEST = 15
#: Decoded instructions that are remembered, by their bytes.
CACHE_LIMIT = 4096

# numbers of iced-x86 (its enums are constants of separate modules): OpAccess, DecoderError, OpCodeTableKind
_WRITES = (3, 4, 5, 6)
_READS = (1, 2, 5, 6)
_NO_MORE_BYTES = 2
_ONE_BYTE, _TWO_BYTE = 0, 1

#: Hardware number of a general register -> its place in REGISTERS.
_GPR = (0, 2, 3, 1, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15)
#: Hardware number of a segment register -> its place in SEGMENTS.
_SEGMENT = (ES, CS, SS, DS, FS, GS)
_MASKS = (0xFFFF_FFFF_FFFF_FFFF, 0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF)
#: XSAVE and XRSTOR have a size that the instruction does not tell: up to here (AVX-512).
_XSAVE_SIZE = 2688

#: Processors of a guest may come to their first decode at the same time, and the module can be made only once.
_loading = allocate_lock()
_library: Any = None
_info: Any = None
_cache: dict[tuple[bytes, int], Instruction | None] = {}


def find() -> Any:
    """Where the extension module of iced-x86 is, without loading it. ImportError if it is not there."""
    package = PathFinder.find_spec(_PACKAGE)
    folders = package.submodule_search_locations if package is not None else None
    spec = PathFinder.find_spec(f"{_PACKAGE}.{_EXTENSION}", folders) if folders else None
    if spec is None or spec.loader is None:
        raise ImportError(
            "the Python package iced-x86 is missing, which decodes the instructions of child partitions"
        )
    return spec


def load() -> Any:
    """The extension module, without the package around it. ImportError if it is not there."""
    global _library, _info
    with _loading:
        if _library is None:
            spec = find()
            library = spec.loader.create_module(spec)
            spec.loader.exec_module(library)
            _info = library.InstructionInfoFactory()
            _library = library
    return _library


def decode(code: bytes, bits: int) -> Instruction | None:
    """The instruction at the start of ``code`` (16 bytes, or less where memory ends) in 16-, 32- or 64-bit code.

    None if it is invalid, or longer than ``code``; see :func:`incomplete`.
    """
    key = (code, bits)
    try:
        return _cache[key]
    except KeyError:
        pass
    library = _library or load()
    decoded = library.Decoder(bits, code).decode()
    instruction = None if decoded.is_invalid else _reduce(decoded, bits)
    if len(_cache) >= CACHE_LIMIT:
        _cache.clear()
    _cache[key] = instruction
    return instruction


def incomplete(code: bytes, bits: int) -> bool:
    """Whether ``code`` is the beginning of an instruction that goes on behind it."""
    if len(code) >= LONGEST:
        return False
    library = _library or load()
    decoder = library.Decoder(bits, code)
    decoded = decoder.decode()
    return bool(decoded.is_invalid and decoder.last_error == _NO_MORE_BYTES)


def _reduce(decoded: Any, bits: int) -> Instruction:
    assert _library is not None
    opcode = decoded.op_code()
    table = opcode.table
    number = opcode.op_code
    string = table == _ONE_BYTE and decoded.is_string_instruction
    operand_size = _library.MemorySizeExt.size(decoded.memory_size)
    reads: list[Access] = []
    writes: list[Access] = []
    stack: list[Access] = []
    for used in _info.info(decoded).used_memory():
        if used.access not in _WRITES and used.access not in _READS:
            continue
        access = _access(decoded, used, bits)
        if not access.size:
            access.size = operand_size or _XSAVE_SIZE
        if access.mask == 0:
            stack.append(access)
        elif access.write:
            writes.append(access)
        else:
            reads.append(access)
    if table == _TWO_BYTE and number == 0x1FC:  # CLZERO: the cache line at rAX
        line = Access(_prefixed(decoded), RAX, 0, ~63 & _MASKS[3 if bits == 64 else 2], 64, True)
        writes.append(line)
    if table == _TWO_BYTE and number in (0xA3, 0xAB, 0xB3, 0xBB) and (reads or writes):
        (reads or writes)[0].bit = _GPR[_library.RegisterExt.number(decoded.op1_register)]
    result = Instruction(decoded.len, (*reads, *writes, *stack))
    if string:
        _string(result, decoded, number, bits)
    elif table == _ONE_BYTE and number in (0xE4, 0xE5, 0xEC, 0xED):
        result.io = 1
    elif table == _ONE_BYTE and number in (0xE6, 0xE7, 0xEE, 0xEF):
        result.io = 2
    if table == _ONE_BYTE and number in (0xCC, 0xCD, 0xCE, 0xF1):
        result.interrupt = {0xCC: 3, 0xCE: 4, 0xF1: 1}.get(
            number, decoded.immediate8 if number == 0xCD else -1
        )
    _selector(result, decoded, table, number, opcode.group_index, bits)
    _source(result, decoded, table, number, operand_size)
    return result


def _prefixed(decoded: Any) -> int:
    """The data segment of an implicit operand."""
    if decoded.has_segment_prefix:
        return _SEGMENT[_library.RegisterExt.number(decoded.segment_prefix)]
    return DS


def _access(decoded: Any, used: Any, bits: int) -> Access:
    register = _library.RegisterExt
    mask = _MASKS[used.address_size]
    base = -1
    if used.base:
        base = _GPR[register.number(used.base)]
    elif decoded.is_ip_rel_memory_operand and used.index == 0 and used.segment != 0:
        base = RIP
    segment = _SEGMENT[register.number(used.segment)] if used.segment else DS
    displacement = used.displacement_i64
    access = Access(
        segment,
        base,
        displacement,
        mask,
        _library.MemorySizeExt.size(used.memory_size),
        used.access in _WRITES,
    )
    access.read = used.access in _READS
    if used.index:
        access.scale = used.scale
        if used.vsib_size:
            access.index = register.number(used.index)
            access.vector_index = used.vsib_size
            access.vector = max(1, register.size(used.index) // max(used.vsib_size, access.size))
        else:
            access.index = _GPR[register.number(used.index)]
            if register.size(used.index) == 1:
                access.index_mask = 0xFF
    if base == RSP and segment == SS and decoded.is_stack_instruction and decoded.memory_base != used.base:
        access.mask = 0
    return access


def _string(result: Instruction, decoded: Any, number: int, bits: int) -> None:
    opcode = number & 0xFE
    result.string = _library.MemorySizeExt.size(decoded.memory_size)
    result.rep = decoded.has_rep_prefix or decoded.has_repne_prefix
    result.moves_rsi = opcode in (0x6E, 0xA4, 0xA6, 0xAC)
    result.moves_rdi = opcode in (0x6C, 0xA4, 0xA6, 0xAA, 0xAE)
    result.io = {0x6C: 1, 0x6E: 2}.get(opcode, 0)
    if result.accesses:
        result.address_mask = result.accesses[0].mask


def _selector(result: Instruction, decoded: Any, table: int, number: int, group: int, bits: int) -> None:
    """Where a descriptor's selector comes from: loads of segment registers, far transfers, LAR and its like."""
    register = _library.RegisterExt
    if table == _ONE_BYTE and number in (0x9A, 0xEA):  # far CALL, far JMP
        result.selector, result.selector_value = SELECTOR_IMMEDIATE, decoded.far_branch_selector
        return
    far = table == _ONE_BYTE and (
        number in (0xC4, 0xC5) or (number == 0xFF and group in (3, 5))
    )  # LES, LDS, far CALL, far JMP
    far = far or (table == _TWO_BYTE and number in (0xB2, 0xB4, 0xB5))  # LSS, LFS, LGS
    if far and result.accesses:
        result.selector = SELECTOR_MEMORY
        result.selector_offset = result.accesses[0].size - 2
        return
    if table == _ONE_BYTE and number in (
        0xCA,
        0xCB,
        0xCF,
    ):  # far RET, IRET: CS is the second word of the frame
        result.selector, result.selector_value = SELECTOR_MEMORY, 1
        return
    pops = (table == _ONE_BYTE and number in (0x07, 0x17, 0x1F)) or (
        table == _TWO_BYTE and number in (0xA1, 0xA9)
    )
    if pops and result.accesses:
        result.selector = SELECTOR_MEMORY
        return
    moves = table == _ONE_BYTE and number == 0x8E
    system = table == _TWO_BYTE and ((number == 0 and group in (2, 3, 4, 5)) or number in (2, 3))
    if not moves and not system:  # system: LLDT, LTR, VERR, VERW, LAR, LSL
        return
    if result.accesses:
        result.selector = SELECTOR_MEMORY
        return
    operand = decoded.op1_register if decoded.op_count > 1 else decoded.op0_register
    result.selector, result.selector_value = SELECTOR_REGISTER, _GPR[register.number(operand)]


def _source(result: Instruction, decoded: Any, table: int, number: int, size: int) -> None:
    """The value of a plain store: MOV, MOVNTI, STOS."""
    if table == _ONE_BYTE and number in (0xAA, 0xAB):
        result.source, result.source_value = SOURCE_REGISTER, RAX
    elif table == _ONE_BYTE and number in (0xC6, 0xC7) and result.accesses:
        result.source = SOURCE_IMMEDIATE
        result.source_value = decoded.immediate(1) & (1 << size * 8) - 1
    elif (
        (table == _ONE_BYTE and number in (0x88, 0x89, 0xA2, 0xA3)) or (table == _TWO_BYTE and number == 0xC3)
    ) and result.accesses:
        register = _library.RegisterExt
        operand = decoded.op1_register
        hardware = register.number(operand)
        result.source = SOURCE_REGISTER
        result.source_value = _GPR[register.number(register.full_register(operand))]
        if register.size(operand) == 1 and 4 <= hardware < 8 and result.source_value < 4:
            result.source_shift = 8
