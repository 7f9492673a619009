# SPDX-License-Identifier: Apache-2.0
"""Executes a hypercall: register and memory forms, fast forms, check order, repetitions and continuation.

Order of checks (contract/guest-interface 2.1): processor mode (#UD), code, privilege, control word, register form,
alignment and page, readability, then the call's own. The guest's call page is ``ENDBR64; OUT port; NOP; RET``, so the
registers arrive untouched; the answer goes to RAX only.
"""

from __future__ import annotations

from time import perf_counter_ns

from ..bus.address_space import AddressError
from ..kvm import abi
from ..kvm.vcpu import FPU_XMM
from ..tlfs import status
from ..tlfs.hypercalls import (
    CODE_EXTENDED_FIRST,
    CODE_EXTENDED_LAST,
    CONTROL_CODE,
    CONTROL_FAST,
    CONTROL_REP_COUNT_SHIFT,
    CONTROL_REP_START_SHIFT,
    CONTROL_RESERVED,
    CONTROL_VARIABLE_SHIFT,
    RESULT_REPS_SHIFT,
)
from ..tlfs.privileges import (
    ENABLE_EXTENDED_HYPERCALLS,
    FAST_HYPERCALL_OUTPUT,
    FEATURE_XMM_INPUT,
    FEATURE_XMM_OUTPUT,
)
from .errors import HvError, Restart, UndefinedOpcode
from .hypercall_table import REP, REP_VARIABLE, SIMPLE, TABLE, VARIABLE, Hypercall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .vp import VirtualProcessor

#: Port behind the hypercall page; the immediate form of OUT leaves every register alone. No guest probes it.
PORT = 0x3C
#: ENDBR64 (Linux keeps IBT only if it is there); OUT PORT, EAX; NOP; RET. OUT and NOP are as long as VMCALL, for
#: which a VMM takes them that completes a child's call.
PAGE_CODE = bytes((0xF3, 0x0F, 0x1E, 0xFA, 0xE7, PORT, 0x90, 0xC3))
#: Where the OUT is in the page. A continued call starts again at the ENDBR64 before it.
OUT_OFFSET = 4
#: A rep call gives the VP back after this long, with at least one repetition done (TLFS: 50 us).
SLICE_NS = 50_000
#: Calls with codes that do not exist are counted together, or a guest could grow the table.
UNKNOWN_CODE = 0xFFFF
_FAST_PLAIN = 16
_FAST_XMM = 112
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF

# kvm_run as u64: kvm_regs follow at RUN_SYNC
_BASE = abi.RUN_SYNC // 8
RAX, _RBX, RCX, RDX, _RSI, _RDI = (_BASE + n for n in range(6))
R8 = _BASE + 8
RIP = _BASE + 16
_RFLAGS = _BASE + 17
DIRTY = abi.RUN_DIRTY_REGS // 8
_SREGS = abi.RUN_SYNC + 144
CS_L = _SREGS + abi.SREGS_CS + abi.SEGMENT_L
SS_DPL = _SREGS + abi.SREGS_SS + abi.SEGMENT_DPL
_CR0 = (_SREGS + abi.SREGS_CR0) // 8
EFER = (_SREGS + abi.SREGS_EFER) // 8
EFER_LMA = 1 << 10
_RFLAGS_VM = 1 << 17

_EMPTY = memoryview(b"")


def write_page(page: memoryview) -> None:
    """The contents of the hypercall page: the entry, then INT3."""
    page[:] = PAGE_CODE + bytes([0xCC]) * (len(page) - len(PAGE_CODE))


def execute(vp: VirtualProcessor) -> None:
    """The VP left at the hypercall page's OUT. Raises UndefinedOpcode where the TLFS asks for #UD."""
    u64 = vp.u64
    u8 = vp.u8
    long_mode = u64[EFER] & EFER_LMA and u8[CS_L]
    if u8[SS_DPL]:
        raise UndefinedOpcode
    if long_mode:  # protection is on, and there is no virtual 8086 mode
        control = u64[RCX]
        first = u64[RDX]
        second = u64[R8]
    else:
        if not u64[_CR0] & 1 or u64[_RFLAGS] & _RFLAGS_VM:
            raise UndefinedOpcode
        control = (u64[RDX] & 0xFFFFFFFF) << 32 | u64[RAX] & 0xFFFFFFFF
        first = (u64[_RBX] & 0xFFFFFFFF) << 32 | u64[RCX] & 0xFFFFFFFF
        second = (u64[_RDI] & 0xFFFFFFFF) << 32 | u64[_RSI] & 0xFFFFFFFF
    code = control & CONTROL_CODE
    trace = vp.trace
    started = perf_counter_ns() if trace is not None else 0
    vp.call_input = _EMPTY
    done = 0
    try:
        done = _dispatch(vp, code, control, first, second, bool(long_mode))
        result = 0
    except HvError as error:
        result = error.status
        if error.reps is not None:
            done = error.reps
    except Restart:
        u64[RIP] = u64[RIP] - OUT_OFFSET & _MASK64
        u64[DIRTY] = abi.SYNC_REGS
        return
    except AddressError:
        # A page of the call vanished or an element named memory that is not there.
        result = status.INVALID_PARAMETER
    if trace is not None:
        trace.hypercall(vp.index, control, bytes(vp.call_input), result, done, started, perf_counter_ns())
    vp.call_input = _EMPTY
    count = control >> CONTROL_REP_COUNT_SHIFT & 0xFFF
    if result == 0 and done < count:
        # Continuation: the call starts again from its first instruction, with the progress in its control word.
        control = control & ~(0xFFF << CONTROL_REP_START_SHIFT) | done << CONTROL_REP_START_SHIFT
        if long_mode:
            u64[RCX] = control
        else:
            u64[RDX] = control >> 32
        u64[RIP] = u64[RIP] - OUT_OFFSET & _MASK64
    else:
        result |= done << RESULT_REPS_SHIFT
        if long_mode:
            u64[RAX] = result
        else:
            u64[RAX] = result & 0xFFFFFFFF
            u64[RDX] = result >> 32
    u64[DIRTY] = abi.SYNC_REGS


def _dispatch(vp: VirtualProcessor, code: int, control: int, first: int, second: int, long_mode: bool) -> int:
    """Checks and runs one call; returns repetitions done (0 for a call without)."""
    partition = vp.partition
    call = TABLE.calls.get(code)
    if call is None:
        with partition.hypervisor.lock:
            call = TABLE.find(code)
        if call is None and partition.calls is not None:
            call = partition.calls.get(code)
    counted = code if call is not None else UNKNOWN_CODE
    vp.hypercalls[counted] = vp.hypercalls.get(counted, 0) + 1
    if call is None:
        if (
            CODE_EXTENDED_FIRST <= code <= CODE_EXTENDED_LAST
            and partition.calls is not None
            and not partition.privileges & ENABLE_EXTENDED_HYPERCALLS
        ):
            raise HvError(status.ACCESS_DENIED)
        raise HvError(status.INVALID_HYPERCALL_CODE)
    if call.privilege & ~partition.privileges:
        raise HvError(status.ACCESS_DENIED)
    variable = control >> CONTROL_VARIABLE_SHIFT & 0x3FF
    count = control >> CONTROL_REP_COUNT_SHIFT & 0xFFF
    start = control >> CONTROL_REP_START_SHIFT & 0xFFF
    kind = call.kind
    if (
        control & CONTROL_RESERVED
        or (variable and kind != VARIABLE and kind != REP_VARIABLE)
        or ((count or start) and kind < REP)
        or (kind >= REP and start >= count)
    ):
        raise HvError(status.INVALID_HYPERCALL_INPUT)
    in_size = call.size + variable * 8 + count * call.element
    out_size = call.output + count * call.output_element
    if control & CONTROL_FAST:
        if code >= CODE_EXTENDED_FIRST:
            raise HvError(status.INVALID_PARAMETER)
        return _fast(vp, call, first, second, in_size, out_size, start, count, long_mode)
    pages = vp.operand_pages
    data = output = _EMPTY
    if in_size:
        at = first & 0xFFF
        if at & 7 or at + in_size > 4096:
            raise HvError(status.INVALID_ALIGNMENT)
        data = (pages.get(first >> 12) or vp.operand_page(first >> 12, False))[at : at + in_size]
        vp.call_input = data
    if out_size:
        at = second & 0xFFF
        if at & 7 or at + out_size > 4096:
            raise HvError(status.INVALID_ALIGNMENT)
        output = (pages.get(second >> 12) or vp.operand_page(second >> 12, True))[at : at + out_size]
    return _run(vp, call, data, output, start, count)


def _run(
    vp: VirtualProcessor, call: Hypercall, data: memoryview, output: memoryview, start: int, count: int
) -> int:
    kind = call.kind
    fields = call.unpack(data, 0) if call.unpack is not None else ()
    if not call.alone:
        answer = call.handler(vp, *fields)
        if answer is not None:
            output[: len(answer)] = answer
        return 0
    with vp.partition.hypervisor.lock:
        if kind >= REP:
            vp.deadline = perf_counter_ns() + SLICE_NS
            try:
                if kind == REP_VARIABLE:
                    elements = len(data) - count * call.element
                    return call.handler(  # type: ignore[no-any-return]
                        vp, data[call.size : elements], data[elements:], start, count, *fields
                    )
                done: int = call.handler(vp, data[call.size :], output, start, count, *fields)
            except HvError as error:
                if (
                    error.reps is None
                ):  # refused before its first element: those before it are done all the same
                    error.reps = start
                raise
            return done
        if kind == SIMPLE:
            answer = call.handler(vp, *fields)
        else:
            answer = call.handler(vp, data[call.size :], *fields)
    if answer is not None:
        output[: len(answer)] = answer
    return 0


def _fast(
    vp: VirtualProcessor,
    call: Hypercall,
    first: int,
    second: int,
    in_size: int,
    out_size: int,
    start: int,
    count: int,
    long_mode: bool,
) -> int:
    """Register form: 16 bytes in RDX and R8, or 112 with XMM0-5; output starts at the next 16 bytes."""
    features = vp.partition.features
    block = bytearray(_FAST_XMM)
    block[0:8] = first.to_bytes(8, "little")
    block[8:16] = second.to_bytes(8, "little")
    if in_size <= _FAST_PLAIN and not out_size:
        view = memoryview(block)
        vp.call_input = view[:in_size]
        return _run(vp, call, view[:in_size], _EMPTY, start, count)
    output_at = (in_size + 15) & ~15
    if in_size > _FAST_XMM or output_at + out_size > _FAST_XMM:
        raise HvError(status.INVALID_HYPERCALL_INPUT)
    if in_size > _FAST_PLAIN and not features & FEATURE_XMM_INPUT:
        raise UndefinedOpcode
    if out_size and not (
        features & FEATURE_XMM_OUTPUT and vp.partition.privileges & FAST_HYPERCALL_OUTPUT and long_mode
    ):
        raise UndefinedOpcode
    fpu = vp.vcpu.fpu()
    block[16:112] = fpu[FPU_XMM : FPU_XMM + 96]
    view = memoryview(block)
    vp.call_input = view[:in_size]
    try:
        return _run(vp, call, view[:in_size], view[output_at : output_at + out_size], start, count)
    finally:  # a rep call that fails has completed some elements
        if out_size:
            u64 = vp.u64
            u64[RDX] = int.from_bytes(block[0:8], "little")
            u64[R8] = int.from_bytes(block[8:16], "little")
            fpu[FPU_XMM : FPU_XMM + 96] = block[16:112]
            vp.vcpu.set_fpu(fpu)
