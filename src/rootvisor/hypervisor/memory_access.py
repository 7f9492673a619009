# SPDX-License-Identifier: Apache-2.0
"""Which access to memory a child VP failed on.

KVM_RUN says EFAULT and nothing more when a guest touches what is not mapped to it, with RIP at the instruction. The
access is found from the outside: the event that was about to be delivered, the instruction's bytes, its operands, and
the page tables on the way to each, in the order of a processor. The first page that does not allow the access is it.

On the VP's own thread, after KVM_RUN, with ``Hypervisor.lock`` held, so that the state of pages does not change and no
page vanishes that is being read. KVM walks the page tables where it can (a tenth of the time that Python takes).
"""

from __future__ import annotations

from ..kvm import abi
from ..tlfs import intercepts as tlfs
from ..x86.decoder import decode, incomplete
from ..x86.instruction import (
    SELECTOR_IMMEDIATE,
    SELECTOR_MEMORY,
    SELECTOR_NONE,
    SELECTOR_REGISTER,
    SOURCE_IMMEDIATE,
    SOURCE_REGISTER,
)
from . import page_walk
from .child_memory import READ_ONLY, UNMAPPED, WRITABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..x86.instruction import Access, Instruction
    from .child_vp import ChildVp

_REGS = abi.SYNC_REGS_AT // 8
_RCX, _RSP, _RIP, _RFLAGS = _REGS + 2, _REGS + 6, _REGS + 16, _REGS + 17
_SREGS = abi.SYNC_SREGS_AT // 8
_CS, _SS = _SREGS, _SREGS + abi.SREGS_SS // 8
_TR, _LDT = _SREGS + abi.SREGS_TR // 8, _SREGS + abi.SREGS_LDT // 8
_GDT, _IDT = _SREGS + abi.SREGS_GDT // 8, _SREGS + abi.SREGS_IDT // 8
_CR0 = _SREGS + abi.SREGS_CR0 // 8
_EFER = _SREGS + abi.SREGS_EFER // 8
_CS_L = abi.SYNC_SREGS_AT + abi.SREGS_CS + abi.SEGMENT_L
_CS_DB = abi.SYNC_SREGS_AT + abi.SREGS_CS + abi.SEGMENT_DB
_SS_DB = abi.SYNC_SREGS_AT + abi.SREGS_SS + abi.SEGMENT_DB
_SS_DPL = abi.SYNC_SREGS_AT + abi.SREGS_SS + abi.SEGMENT_DPL
_EVENTS = abi.SYNC_EVENTS_AT
_EFER_LMA = 1 << 10
_RFLAGS_VM = 1 << 17
#: RIP in ``vp.u64``.
RIP = _RIP
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_MASK32 = 0xFFFF_FFFF
_PAGE_FAULT = 14
_NMI = 2
#: Exceptions that push an error code.
_ERROR_CODES = frozenset({8, 10, 11, 12, 13, 14, 17, 21, 29, 30})
#: The local APIC's page: KVM's own, whatever the memory below.
_APIC_GPN = 0xFEE00
#: Bits of RIP that count, by kind of code.
RIP_MASK = {64: _MASK64, 32: _MASK32, 16: 0xFFFF}
_BOTH = tlfs.MEMORY_GVA_VALID | tlfs.MEMORY_GVA_GPA_VALID
#: Most bytes that a system instruction or an event pushes.
_FRAME = 64


class MemoryAccess:
    """An access that the state of its page forbids.

    ``access`` is tlfs.ACCESS_*, ``info`` says what ``gva`` is worth. ``operand`` is the instruction's own access with
    ``size`` bytes, None for fetches, page tables and implicit accesses.
    """

    __slots__ = ("access", "code", "gpa", "gva", "info", "instruction", "operand", "size", "state")

    def __init__(self, gpa: int, gva: int, info: int, access: int, state: int) -> None:
        self.gpa = gpa
        self.gva = gva
        self.info = info
        self.access = access
        self.state = state
        self.size = 0
        self.code = b""
        self.instruction: Instruction | None = None
        self.operand: Access | None = None

    @property
    def message_type(self) -> int:
        """What the root is told: nothing there, or no right to what is there."""
        return tlfs.UNMAPPED_GPA if self.state == UNMAPPED else tlfs.GPA_INTERCEPT


class _GuestFault(Exception):
    """The guest's own page tables forbid the access: its processor raises a page fault, not an intercept."""


def code_bits(vp: ChildVp) -> int:
    """16, 32 or 64: the kind of code that the VP runs."""
    u8 = vp.u8
    if u8[_CS_L] and vp.u64[_EFER] & _EFER_LMA:
        return 64
    return 32 if u8[_CS_DB] else 16


def fetch(vp: ChildVp, linear: int) -> bytes:
    """Up to 16 bytes from ``linear``: fewer where a page ends whose successor is not there, none if that one is not."""
    translations = vp.translations
    offset = linear & 0xFFF
    page = translations.page(linear) if linear >> 63 else None
    view: memoryview | None
    if page is not None:
        view = page.view
    else:
        gpa = translations.find(linear)
        view = vp.partition.memory.page(gpa >> 12) if gpa >= 0 else None
        if view is None:
            return b""
    if offset <= 0xFF0:
        return view[offset : offset + 16].tobytes()
    code = view[offset:].tobytes()
    following = translations.find(linear + len(code) & _MASK64)
    if following >= 0:
        view = vp.partition.memory.page(following >> 12)
        if view is not None:
            code += view[: 16 - len(code)]
    return code


def find(vp: ChildVp) -> MemoryAccess | None:
    """The access that made KVM_RUN fail, or None if everything is allowed by now."""
    u8 = vp.u8
    vector = -1
    # struct kvm_vcpu_events: what is being injected
    if u8[_EVENTS + abi.EVENTS_EXCEPTION_INJECTED]:
        vector = u8[_EVENTS + abi.EVENTS_EXCEPTION_NR]
    elif u8[_EVENTS + abi.EVENTS_NMI_INJECTED]:
        vector = _NMI
    elif u8[_EVENTS + abi.EVENTS_INTERRUPT_INJECTED]:
        vector = u8[_EVENTS + abi.EVENTS_INTERRUPT_NR]
    try:
        if vector >= 0:
            found = delivery(vp, vector)
            if found is not None:
                return found
        found = _instruction(vp)
    except _GuestFault:  # on the way to the guest's own handler
        try:
            found = delivery(vp, _PAGE_FAULT)
        except _GuestFault:
            found = None
    return found or _system_structures(vp) or _read_only_tables(vp)


# --- the instruction ----------------------------------------------------------------------------------------------
def _instruction(vp: ChildVp) -> MemoryAccess | None:
    u64 = vp.u64
    linear = u64[_CS] + u64[_RIP] & _MASK64
    bits = code_bits(vp)
    if bits != 64:
        linear &= _MASK32
    code = fetch(vp, linear)
    instruction = decode(code, bits) if code else None
    if instruction is None:
        user = vp.u8[_SS_DPL] == 3
        found = _touch(vp, linear, 1, False, user, execute=True)
        if found is None and code and incomplete(code, bits):
            found = _touch(vp, linear + len(code) & _MASK64, 1, False, user, execute=True)
        if found is not None:
            found.code = code
        return found
    found = _operands(vp, instruction)
    if found is None and instruction.selector != SELECTOR_NONE:
        found = _descriptor(vp, _selector_of(vp, instruction))
    if found is None and instruction.interrupt >= 0:
        found = delivery(vp, instruction.interrupt)
    if found is not None:
        found.code = code
        found.instruction = instruction
    return found


def _operands(vp: ChildVp, instruction: Instruction) -> MemoryAccess | None:
    if instruction.rep and not vp.u64[_RCX] & instruction.address_mask:
        return None
    memory = vp.partition.memory
    for operand in instruction.accesses:
        if operand.vector:
            found = _vector(vp, operand)
            if found is not None:
                return found
            continue
        linear = linear_address(vp, operand)
        write = operand.write
        # The common case without further ado: one page, KVM finds it.
        if (linear & 0xFFF) + operand.size <= 4096:
            gpa = vp.translations.find(linear)
            if gpa >= 0:
                state = memory.state(gpa)
                if state >= (WRITABLE if write else READ_ONLY) or gpa >> 12 == _APIC_GPN:
                    continue
                found = MemoryAccess(
                    gpa, linear, _BOTH, tlfs.ACCESS_WRITE if write else tlfs.ACCESS_READ, state
                )
                found.operand = operand
                found.size = operand.size
                return found
        found = _touch(vp, linear, operand.size, write, vp.u8[_SS_DPL] == 3)
        if found is not None:
            if found.info == _BOTH and found.gva == linear:
                found.operand = operand
                found.size = operand.size
            return found
    return None


def linear_address(vp: ChildVp, operand: Access) -> int:
    """Where an access lies, in the VP's linear address space."""
    u64 = vp.u64
    address = operand.displacement
    if operand.base >= 0:
        address += u64[_REGS + operand.base]
    if operand.index >= 0:
        address += (u64[_REGS + operand.index] & operand.index_mask) * operand.scale
    if operand.bit >= 0:
        width = operand.size * 8
        offset = u64[_REGS + operand.bit] & (1 << width) - 1
        if offset >> (width - 1):
            offset -= 1 << width
        address += (offset // width) * operand.size
    mask = operand.mask
    long_mode = vp.u8[_CS_L] and u64[_EFER] & _EFER_LMA
    if not mask:
        mask = _MASK64 if long_mode else _MASK32 if vp.u8[_SS_DB] else 0xFFFF
    address &= mask
    if long_mode:
        if operand.segment in (3, 4):  # FS and GS alone have a base in 64-bit mode
            address += u64[_SREGS + operand.segment * 3]
        return address & _MASK64
    return address + u64[_SREGS + operand.segment * 3] & _MASK32


def store_value(vp: ChildVp, found: MemoryAccess) -> int | None:
    """The value that a plain store (MOV, MOVNTI, STOS) was to write, None for any other instruction."""
    instruction = found.instruction
    if instruction is None or found.operand is None:
        return None
    if instruction.source == SOURCE_IMMEDIATE:
        return instruction.source_value
    if instruction.source == SOURCE_REGISTER:
        value = vp.u64[_REGS + instruction.source_value] >> instruction.source_shift
        return value & (1 << found.size * 8) - 1
    return None


def _vector(vp: ChildVp, operand: Access) -> MemoryAccess | None:
    """The elements of a gather or scatter. Masks are not looked at."""
    u64 = vp.u64
    image = bytearray(4096)
    vp.vcpu.xsave(image)
    number = operand.index
    index = bytes(image[160 + number * 16 : 176 + number * 16])
    if operand.vector * operand.vector_index > 16 and number < 16:
        index += image[576 + number * 16 : 592 + number * 16]  # upper halves of YMM, standard format
    base = operand.displacement + (u64[_REGS + operand.base] if operand.base >= 0 else 0)
    width = operand.vector_index
    for element in range(min(operand.vector, len(index) // width)):
        offset = int.from_bytes(index[element * width : element * width + width], "little", signed=True)
        linear = base + offset * operand.scale & operand.mask
        if operand.segment in (3, 4) or not vp.u8[_CS_L]:
            linear = linear + u64[_SREGS + operand.segment * 3] & _MASK64
        found = _touch(vp, linear, operand.size, operand.write, vp.u8[_SS_DPL] == 3)
        if found is not None:
            return found
    return None


def _touch(
    vp: ChildVp, linear: int, size: int, write: bool, user: bool, execute: bool = False
) -> MemoryAccess | None:
    """The first byte of a linear range that may not be accessed so, or a page table that may not be read.

    _GuestFault if the guest's page tables forbid it.
    """
    memory = vp.partition.memory
    needed = WRITABLE if write else READ_ONLY
    access = tlfs.ACCESS_EXECUTE if execute else tlfs.ACCESS_WRITE if write else tlfs.ACCESS_READ
    end = linear + size
    while linear < end:
        gva = linear & _MASK64
        walk = page_walk.translate(vp, gva, write=write, execute=execute, user=user)
        if walk.fault_gpa >= 0:
            state = memory.state(walk.fault_gpa)
            return MemoryAccess(walk.fault_gpa, gva, tlfs.MEMORY_GVA_VALID, tlfs.ACCESS_READ, state)
        if walk.code:
            raise _GuestFault
        state = memory.state(walk.gpa)
        if state < needed and walk.gpa >> 12 != _APIC_GPN:
            return MemoryAccess(walk.gpa, gva, _BOTH, access, state)
        linear = (linear | 0xFFF) + 1
    return None


def _read(vp: ChildVp, linear: int, size: int) -> int:
    """A little-endian number at a linear address; :func:`_touch` has allowed it."""
    memory = vp.partition.memory
    data = b""
    while len(data) < size:
        at = linear + len(data) & _MASK64
        walk = page_walk.translate(vp, at)
        page = None if walk.code else memory.page(walk.gpa >> 12)
        if page is None:
            raise _GuestFault
        offset = walk.gpa & 0xFFF
        data += page[offset : offset + size - len(data)]
    return int.from_bytes(data, "little")


# --- what processors read and write besides -----------------------------------------------------------------------
def _selector_of(vp: ChildVp, instruction: Instruction) -> int:
    if instruction.selector == SELECTOR_IMMEDIATE:
        return instruction.selector_value
    if instruction.selector == SELECTOR_REGISTER:
        return vp.u64[_REGS + instruction.selector_value] & 0xFFFF
    assert instruction.selector == SELECTOR_MEMORY
    if instruction.selector_value >= len(instruction.accesses):
        return 0
    linear = linear_address(vp, instruction.accesses[instruction.selector_value])
    return _read(vp, linear + instruction.selector_offset & _MASK64, 2)


def _descriptor(vp: ChildVp, selector: int) -> MemoryAccess | None:
    """The descriptor of ``selector``; system descriptors have 16 bytes in long mode. It may be marked as accessed."""
    u64 = vp.u64
    if selector < 4 or not u64[_CR0] & 1 or u64[_RFLAGS] & _RFLAGS_VM:
        return None
    linear = _descriptor_address(vp, selector)
    found = _touch(vp, linear, 8, False, False)
    if found is not None:
        return found
    descriptor = _read(vp, linear, 8)
    if not descriptor >> 44 & 1 and u64[_EFER] & _EFER_LMA:
        return _touch(vp, linear, 16, False, False)
    if not descriptor >> 40 & 1:
        return _touch(vp, linear, 8, True, False)
    return None


def _descriptor_address(vp: ChildVp, selector: int) -> int:
    base = vp.u64[_LDT] if selector & 4 else vp.u64[_GDT]
    return base + (selector & 0xFFF8) & _MASK64


def delivery(vp: ChildVp, vector: int) -> MemoryAccess | None:
    """What the delivery of an exception or interrupt touches: gate, descriptor, task state, stack."""
    u64 = vp.u64
    if not u64[_CR0] & 1:
        return _touch(vp, u64[_IDT] + vector * 4, 4, False, False) or _touch(
            vp, u64[_SS] + (u64[_RSP] - 6 & 0xFFFF), 6, True, False
        )
    long_mode = bool(u64[_EFER] & _EFER_LMA)
    gate_size = 16 if long_mode else 8
    at = u64[_IDT] + vector * gate_size & _MASK64
    found = _touch(vp, at, gate_size, False, False)
    if found is not None:
        return found
    gate = _read(vp, at, 8)
    kind = gate >> 40 & 0xF
    if not gate >> 47 & 1 or kind not in (6, 7, 14, 15):
        return None  # another exception, or a task gate
    selector = gate >> 16 & 0xFFFF
    found = _descriptor(vp, selector)
    if found is not None:
        return found
    target = _read(vp, _descriptor_address(vp, selector), 8)
    level = vp.u8[_SS_DPL] & 3
    dpl = level if target >> 42 & 1 else target >> 45 & 3  # conforming code keeps the level
    task = u64[_TR]
    slots = 5 + (vector in _ERROR_CODES)
    if long_mode:
        stack_table = gate >> 32 & 7
        if stack_table or dpl < level:
            at = task + (36 + (stack_table - 1) * 8 if stack_table else 4 + dpl * 8) & _MASK64
            found = _touch(vp, at, 8, False, False)
            if found is not None:
                return found
            stack = _read(vp, at, 8)
        else:
            stack = u64[_RSP]
        stack &= ~0xF
        return _touch(vp, stack - slots * 8 & _MASK64, slots * 8, True, False)
    width = 4 if kind in (14, 15) else 2
    if dpl < level:
        at = task + 4 + dpl * 8 & _MASK32
        found = _touch(vp, at, 8, False, False)
        if found is not None:
            return found
        stack = _read(vp, at, 4)
        stack_selector = _read(vp, at + 4, 2)
        found = _descriptor(vp, stack_selector)
        if found is not None:
            return found
        raw = _read(vp, _descriptor_address(vp, stack_selector), 8)
        base = (raw >> 16 & 0xFFFFFF) | (raw >> 56) << 24
    else:
        slots -= 2
        stack, base = u64[_RSP] & (_MASK32 if vp.u8[_SS_DB] else 0xFFFF), u64[_SS]
    return _touch(vp, base + stack - slots * width & _MASK32, slots * width, True, False)


def _ranges(vp: ChildVp) -> Iterator[tuple[int, int, bool]]:
    """Linear address, size, write of what the processor keeps in memory for itself, and of the stack."""
    u64 = vp.u64
    u16 = vp.vcpu.u16
    yield u64[_IDT], (u16[(_IDT + 1) * 4]) + 1, False
    yield u64[_GDT], (u16[(_GDT + 1) * 4]) + 1, False
    yield u64[_LDT], min(u64[_LDT + 1] & _MASK32, 0xFFFF) + 1, False
    yield u64[_TR], min(u64[_TR + 1] & _MASK32, 0x20FF) + 1, False
    stack = u64[_RSP]
    if not (vp.u8[_CS_L] and u64[_EFER] & _EFER_LMA):
        stack = u64[_SS] + (stack & (_MASK32 if vp.u8[_SS_DB] else 0xFFFF)) & _MASK32
    yield stack - _FRAME & _MASK64, _FRAME, True


def _task_stacks(vp: ChildVp) -> Iterator[tuple[int, int, bool]]:
    """The stacks of the task state, which exceptions of user mode and those with a stack of their own are pushed to.

    The processor raises most exceptions by itself (a write to a page that is read-only for the guest, an undefined
    opcode): that one is under way shows nowhere when its stack is not there.
    """
    u64 = vp.u64
    task = u64[_TR]
    end = (u64[_TR + 1] & _MASK32) + 1
    long_mode = bool(u64[_EFER] & _EFER_LMA)
    for at in (4, *range(36, 92, 8)) if long_mode else (4,):
        if at + 8 > end or not u64[_CR0] & 1:
            return
        try:
            stack = _read(vp, task + at & _MASK64, 8 if long_mode else 4)
        except _GuestFault:
            return
        if stack:
            yield stack - _FRAME & (_MASK64 if long_mode else _MASK32), _FRAME, True


def _system_structures(vp: ChildVp) -> MemoryAccess | None:
    """For what the instruction does not tell: a page of descriptor tables, task state or stacks that is not there.

    Only pages that come when they are asked for; blaming one wrongly costs nothing.
    """
    return _missing(vp, _ranges(vp)) or _missing(vp, _task_stacks(vp))


def _missing(vp: ChildVp, ranges: Iterator[tuple[int, int, bool]]) -> MemoryAccess | None:
    for linear, size, write in ranges:
        at = linear
        while at < linear + size:
            try:
                found = _touch(vp, at & _MASK64, 1, write, False)
            except _GuestFault:
                found = None
            if found is not None and found.state != UNMAPPED:
                return found
            at = (at | 0xFFF) + 1
    return None


def _read_only_tables(vp: ChildVp) -> MemoryAccess | None:
    """Page tables in read-only memory: nested paging writes to whatever it walks (AMD64 APM 2, 15.25.5)."""
    u64 = vp.u64
    memory = vp.partition.memory
    linears = [u64[_CS] + u64[_RIP] & _MASK64]
    code = fetch(vp, linears[0])
    instruction = decode(code, code_bits(vp)) if code else None
    if instruction is not None:
        linears += [linear_address(vp, operand) for operand in instruction.accesses if not operand.vector]
    for linear in linears:
        trail: list[int] = []
        page_walk.translate(vp, linear, trail=trail)
        for at in trail:
            if memory.state(at) == READ_ONLY:
                return MemoryAccess(at, linear, tlfs.MEMORY_GVA_VALID, tlfs.ACCESS_WRITE, READ_ONLY)
    return None
