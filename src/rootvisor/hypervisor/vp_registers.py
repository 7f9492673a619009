# SPDX-License-Identifier: Apache-2.0
"""Registers of a child's VP by name, as HVCALL_GET/SET_VP_REGISTERS see them (contract child-partitions 4.1-4.3).

While a VP is parked its general and special registers and events lie in the shared run page, where they are read and
written; KVM_RUN takes over what is marked dirty. FPU state is read once per stop and written back before the VP runs.
The rest are vCPU ioctls. All functions are called with ``Hypervisor.lock`` held; HV_STATUS_INVALID_VP_STATE is the
answer where the VP would have to be parked and is not (an ioctl would wait until KVM_RUN returns).

Values are unsigned integers of 64 or 128 bits. What depends on more than one register is checked when the VP runs.
"""

from __future__ import annotations

from struct import Struct
from time import clock_gettime_ns, perf_counter_ns

from ..kvm import abi
from ..kvm.errors import KvmError
from ..tlfs import registers as names
from ..tlfs import status
from ..tlfs.vp_state import STIMER, STIMERS_SIZE
from . import child_cpuid, register_page, segments, synthetic_registers, vp_events, vp_reset
from .errors import GeneralProtection, HvError
from .fpu_image import FpuImage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .child_vp import ChildVp
    from .vp import VirtualProcessor

    Get = Callable[[ChildVp], int]
    Set = Callable[[ChildVp, int], None]

_PAIR = Struct("<QQ").pack_into
_ELEMENT = Struct("<I12xQQ").unpack_from
#: Elements between two looks at the clock; most cost a microsecond.
_ELEMENTS = 32
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_REGS = abi.SYNC_REGS_AT // 8
_SREGS = abi.SYNC_SREGS_AT // 8
_RDX = _REGS + abi.REGS.index("rdx")
_RIP = _REGS + abi.REGS.index("rip")
_RFLAGS = _REGS + abi.REGS.index("rflags")
_CR0 = _SREGS + abi.SREGS_CR0 // 8
_CR2 = _SREGS + abi.SREGS_CR2 // 8
_CR3 = _SREGS + abi.SREGS_CR3 // 8
_CR4 = _SREGS + abi.SREGS_CR4 // 8
_CR8 = _SREGS + abi.SREGS_CR8 // 8
_EFER = _SREGS + abi.SREGS_EFER // 8
_APIC_BASE = _SREGS + abi.SREGS_APIC_BASE // 8
_DIRTY = abi.RUN_DIRTY_REGS // 8

_CR0_PG = 1 << 31
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
#: SCE, LME, LMA, NXE, SVME, LMSLE, FFXSR, TCE, AIBRSE.
_EFER_VALID = 1 | _EFER_LME | _EFER_LMA | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 15 | 1 << 21
#: Everything but the reserved bits; bit 1 is always set.
RFLAGS_VALID = 0x3F7FD7
_APIC_BASE_RESERVED = 0x2FF | ~0xF_FFFF_FFFF_FFFF
_LAPIC_LVT0 = 0x350
_LVT_MASKED = 0x10000


class StoredState:
    """What a VP has besides the registers of its KVM processor. ``vp.stored``, made by :func:`reset`."""

    __slots__ = (
        "cpuid_final",
        "cpuid_stale",
        "dispatch_suspend",
        "dr7",
        "fpu",
        "page_filled",
        "plain",
        "root_signals",
        "state_pages",
        "stimers",
        "stimers_set",
        "timer_count",
        "xcr0",
    )

    def __init__(self) -> None:
        #: registered CPUID results that KVM has not got yet; KVM takes no more after the VP has run
        self.cpuid_stale = True
        self.cpuid_final = False
        self.dispatch_suspend = False
        #: scheduler messages sent for the VP (root scheduler)
        self.root_signals = 0
        #: VP state pages: type (tlfs.vp_state.PAGE_*) -> page of the child's pool
        self.state_pages: dict[int, int] = {}
        #: registers that the processor does not have and VMMs expect
        self.plain: dict[int, int] = {}
        self.fpu = FpuImage()
        #: the register page has been filled since the VP stopped
        self.page_filled = False
        #: as long as the VP is parked and nobody has changed them
        self.dr7: int | None = None
        self.xcr0: int | None = None
        #: hv_synthetic_timers_state that was set, and whether the VP's timers have not got it yet
        self.stimers = bytearray(STIMERS_SIZE)
        self.stimers_set = False
        #: the local APIC's current count, as long as the VP is parked and somebody has looked
        self.timer_count: int | None = None


# --- single registers ---------------------------------------------------------------------------------------------
def _set_rip(vp: ChildVp, value: int) -> None:
    if vp.intercept_suspend:  # the VMM has completed the intercepted instruction
        vp_events.end_shadow(vp)
    vp.u64[_RIP] = value
    vp.mark_dirty(abi.SYNC_REGS)


def _set_rflags(vp: ChildVp, value: int) -> None:
    if value & ~RFLAGS_VALID:
        raise HvError(status.INVALID_REGISTER_VALUE)
    vp.u64[_RFLAGS] = value | 2
    vp.mark_dirty(abi.SYNC_REGS)


def _special(slot: int, reserved: int) -> Set:
    """A register of the sregs block; bits of ``reserved`` make it invalid."""

    def write(vp: ChildVp, value: int) -> None:
        if value & reserved:
            raise HvError(status.INVALID_REGISTER_VALUE)
        if vp.u64[slot] != value:  # or KVM would load all special registers again
            vp.u64[slot] = value
            vp.mark_dirty(abi.SYNC_SREGS)

    return write


def _segment(at: int) -> tuple[Get, Set]:
    def write(vp: ChildVp, value: int) -> None:
        if segments.read(vp.u8, at) != value:
            segments.write(vp.u8, at, value)
            vp.mark_dirty(abi.SYNC_SREGS)

    return (lambda vp: segments.read(vp.u8, at)), write


def _table(offset: int) -> tuple[Get, Set]:
    at = abi.SYNC_SREGS_AT + offset

    def write(vp: ChildVp, value: int) -> None:
        if segments.read_table(vp.u8, at) >> 48 != value >> 48:
            segments.write_table(vp.u8, at, value)
            vp.mark_dirty(abi.SYNC_SREGS)

    return (lambda vp: segments.read_table(vp.u8, at)), write


def _fpu(offset: int) -> tuple[Get, Set]:
    return (
        lambda vp: vp.stored.fpu.get(vp, offset),
        lambda vp, value: vp.stored.fpu.set(vp, offset, value),
    )


def _debug(index: int) -> tuple[Get, Set]:
    """DR0-3, DR6, DR7 in ``struct kvm_debugregs``, u64 number ``index``."""
    part = slice(index * 8, index * 8 + 8)

    def write(vp: ChildVp, value: int) -> None:
        state = vp.vcpu.debug_registers()
        state[part] = value.to_bytes(8, "little")
        vp.stored.dr7 = None
        vp.vcpu.set_debug_registers(state)

    return (lambda vp: int.from_bytes(vp.vcpu.debug_registers()[part], "little")), write


def _msr(index: int) -> tuple[Get, Set]:
    def read(vp: ChildVp) -> int:
        value = vp.vcpu.try_msr(index)
        if value is None:
            raise HvError(status.INVALID_PARAMETER)
        return value

    def write(vp: ChildVp, value: int) -> None:
        child_cpuid.ensure(vp)
        if not vp.vcpu.set_msr(index, value) and vp.vcpu.try_msr(index) != value:
            raise HvError(
                status.INVALID_PARAMETER if vp.vcpu.try_msr(index) is None else status.INVALID_REGISTER_VALUE
            )

    return read, write


def _optional(name: int, pair: tuple[Get, Set]) -> tuple[Get, Set]:
    """An MSR that VMMs read and write without asking whether there is one: else it is a plain value."""
    read, write = pair

    def get_value(vp: ChildVp) -> int:
        try:
            return read(vp)
        except HvError:
            return vp.stored.plain.get(name, 0)

    def set_value(vp: ChildVp, value: int) -> None:
        try:
            write(vp, value)
        except HvError as error:
            if error.status != status.INVALID_PARAMETER:
                raise
            vp.stored.plain[name] = value

    return get_value, set_value


def _get_tsc(vp: ChildVp) -> int:
    return vp.partition.time.get_tsc(vp)


def _set_tsc(vp: ChildVp, value: int) -> None:
    vp.partition.time.set_tsc(vp, value)


def _get_ssp(vp: ChildVp) -> int:
    value = vp.vcpu.shadow_stack_pointer()
    if value is None:
        raise HvError(status.INVALID_PARAMETER)
    return value


def _set_ssp(vp: ChildVp, value: int) -> None:
    child_cpuid.ensure(vp)
    if vp.vcpu.shadow_stack_pointer() is None:
        raise HvError(status.INVALID_PARAMETER)
    if vp.vcpu.shadow_stack_pointer(value) is None:
        raise HvError(status.INVALID_REGISTER_VALUE)


def mp_state(vp: ChildVp) -> int:
    """KVM's state of the VP, which is not in KVM_RUN: an INIT or SIPI that waits has happened."""
    vcpu = vp.vcpu
    try:
        vcpu.commit_sync_area()
    except KvmError:
        pass  # found out again when the VP runs
    state = vcpu.mp_state()
    if vp.index:
        vcpu.fill_sync_area()  # KVM has looked for INIT and SIPI
    return state


def _get_activity(vp: ChildVp) -> int:
    state = mp_state(vp)
    if state in (abi.MP_STATE_UNINITIALIZED, abi.MP_STATE_INIT_RECEIVED):
        return names.ACTIVITY_STARTUP_SUSPEND
    return names.ACTIVITY_HALT_SUSPEND if state == abi.MP_STATE_HALTED else 0


def _set_activity(vp: ChildVp, value: int) -> None:
    if value & ~(names.ACTIVITY_STARTUP_SUSPEND | names.ACTIVITY_HALT_SUSPEND | names.ACTIVITY_IDLE_SUSPEND):
        raise HvError(status.INVALID_REGISTER_VALUE)
    if value & names.ACTIVITY_STARTUP_SUSPEND:
        vp.vcpu.set_mp_state(abi.MP_STATE_UNINITIALIZED)
    elif value:
        vp.vcpu.set_mp_state(abi.MP_STATE_HALTED)
    else:
        vp.vcpu.set_mp_state(abi.MP_STATE_RUNNABLE)


def _set_xfem(vp: ChildVp, value: int) -> None:
    if value == vp.vcpu.xcr0():
        return
    child_cpuid.ensure(vp)
    vp.stored.xcr0 = None
    vp.vcpu.set_xcr0(value)


def _set_apic_id(vp: ChildVp, value: int) -> None:
    """KVM's APIC ids are those of the processors it made: only the one that the VP has is valid."""
    if value not in (vp.apic_id, vp.apic_id << 24):
        raise HvError(status.INVALID_REGISTER_VALUE)


def _get_deliverability(vp: ChildVp) -> int:
    return vp.synic.notify_sints << names.DELIVERABILITY_SINTS_SHIFT


def _set_deliverability(vp: ChildVp, value: int) -> None:
    if value & names.DELIVERABILITY_LOCAL_APIC:  # the hypervisor has the local APIC
        raise HvError(status.INVALID_PARAMETER)
    if value & ~(0xFFFF << names.DELIVERABILITY_SINTS_SHIFT):
        raise HvError(status.INVALID_REGISTER_VALUE)
    vp.partition.interrupts.notify_sints(vp, value >> names.DELIVERABILITY_SINTS_SHIFT)


def _general(slot: int) -> Set:
    def write(vp: ChildVp, value: int) -> None:
        vp.u64[slot] = value
        vp.mark_dirty(abi.SYNC_REGS)

    return write


def _stimer(index: int) -> tuple[Get, Set]:
    """CONFIG (even) and COUNT (odd) of a timer, as the MSRs; remembered where the VP has no timers."""
    at = index // 2 * 40 + 8 + index % 2 * 8

    def write(vp: ChildVp, value: int) -> None:
        if not vp.timers:
            vp.stored.stimers[at : at + 8] = value.to_bytes(8, "little")
            return
        if vp.stored.stimers_set:
            _start_timers(vp)
        timer = vp.timers[index // 2]
        try:
            (timer.write_count if index & 1 else timer.write_config)(value)
        except GeneralProtection:
            raise HvError(status.INVALID_REGISTER_VALUE) from None

    return (lambda vp: int.from_bytes(timers_state(vp)[at : at + 8], "little")), write


def timers_state(vp: ChildVp) -> bytes:
    """hv_synthetic_timers_state. ``adjustment`` is when a periodic timer expires next, in reference time; TLFS and
    kernel do not say what the Microsoft hypervisor has there."""
    stored = vp.stored
    if not vp.timers or stored.stimers_set:
        return bytes(stored.stimers)
    vp.notice_init()
    state = bytearray(STIMERS_SIZE)
    for timer in vp.timers:
        waits, config, count, due, expired = timer.state()
        STIMER.pack_into(state, timer.index * STIMER.size, waits, 0, config, count, due, expired)
    return bytes(state)


def set_timers_state(vp: ChildVp, state: bytes | bytearray) -> None:
    """What is set is what is read until the VP runs: then the timers have it. What they had is gone at once."""
    for timer in vp.timers:
        timer.reset()
    vp.stored.stimers[:] = state
    vp.stored.stimers_set = True


def _start_timers(vp: ChildVp) -> None:
    stored = vp.stored
    stored.stimers_set = False
    vp.notice_init()
    for timer in vp.timers:
        waits, _, config, count, due, expired = STIMER.unpack_from(stored.stimers, timer.index * STIMER.size)
        timer.set_state(waits, config, count, due, expired)


# --- the tables ---------------------------------------------------------------------------------------------------
#: 64-bit registers of the sync area: name -> index in ``vp.u64``. Read them without a call where many are read.
SLOTS: dict[int, int] = {}
#: RAX to R15, which can be written like this too (and marked, abi.SYNC_REGS).
GENERAL: dict[int, int] = {}
#: Where segment registers and tables lie in ``vp.u8``, and FPU registers in the legacy area of the XSAVE image.
_SEGMENTS = dict(zip(range(names.ES, names.TR + 1), segments.AT, strict=True))
_FPU = {
    **{names.XMM0 + number: 160 + 16 * number for number in range(16)},
    **{names.FP_MMX0 + number: 32 + 16 * number for number in range(8)},
    names.FP_CONTROL_STATUS: 0,
    names.XMM_CONTROL_STATUS: 16,
}
#: Registers of 128 bits. VMMs leave what they like in the upper half of the others.
WIDE = frozenset(
    (
        *range(names.XMM0, names.XMM_CONTROL_STATUS + 1), *range(names.ES, names.TR + 1), names.IDTR, names.GDTR,
        names.PENDING_EVENT0, names.PENDING_EVENT1,
    )
)  # fmt: skip
#: The others, and how all are written. Only while the VP is parked.
_GET: dict[int, Get] = {}
_SET: dict[int, Set] = {}


def _build() -> None:
    for number, register in enumerate(
        ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
         "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags")
    ):  # fmt: skip
        slot = _REGS + abi.REGS.index(register)
        SLOTS[names.RAX + number] = GENERAL[names.RAX + number] = slot
        _SET[names.RAX + number] = _general(slot)
    del GENERAL[names.RIP], GENERAL[names.RFLAGS]
    _SET[names.RIP] = _set_rip
    _SET[names.RFLAGS] = _set_rflags
    for name, slot, reserved in (
        (names.CR0, _CR0, ~0xFFFFFFFF),
        (names.INTERMEDIATE_CR0, _CR0, ~0xFFFFFFFF),
        (names.CR2, _CR2, 0),
        (names.CR3, _CR3, ~0x7FFF_FFFF_FFFF_FFFF),
        (names.INTERMEDIATE_CR3, _CR3, ~0x7FFF_FFFF_FFFF_FFFF),
        (names.CR4, _CR4, ~0x1FFFFFFFF),
        (names.INTERMEDIATE_CR4, _CR4, ~0x1FFFFFFFF),
        (names.CR8, _CR8, ~0xF),
        (names.INTERMEDIATE_CR8, _CR8, ~0xF),
        (names.EFER, _EFER, ~_EFER_VALID),
        (names.APIC_BASE, _APIC_BASE, _APIC_BASE_RESERVED),
    ):
        SLOTS[name] = slot
        _SET[name] = _special(slot, reserved)

    def both(name: int, pair: tuple[Get, Set]) -> None:
        _GET[name], _SET[name] = pair

    for name, at in _SEGMENTS.items():
        both(name, _segment(at))
    both(names.IDTR, _table(abi.SREGS_IDT))
    both(names.GDTR, _table(abi.SREGS_GDT))
    for name, offset in _FPU.items():
        both(name, _fpu(offset))
    for number, index in enumerate((0, 1, 2, 3, 4, 5)):
        both(names.DR0 + number, _debug(index))
    for name, msr in _msrs().items():
        both(name, _msr(msr))
    for name in (names.TSC_AUX, names.DEBUG_CTL):
        both(name, _optional(name, (_GET[name], _SET[name])))
    both(names.TSC, (_get_tsc, _set_tsc))
    both(names.SSP, (_get_ssp, _set_ssp))
    both(names.PENDING_INTERRUPTION, (vp_events.pending_interruption, vp_events.set_pending_interruption))
    both(names.INTERRUPT_STATE, (vp_events.interrupt_state, vp_events.set_interrupt_state))
    both(names.PENDING_EVENT0, (vp_events.pending_event0, vp_events.set_pending_event0))
    both(names.PENDING_EVENT1, ((lambda _vp: 0), vp_events.set_pending_event1))
    both(names.INTERNAL_ACTIVITY_STATE, (_get_activity, _set_activity))
    both(names.DELIVERABILITY_NOTIFICATIONS, (_get_deliverability, _set_deliverability))
    both(names.XFEM, ((lambda vp: vp.vcpu.xcr0()), _set_xfem))
    both(names.INITIAL_APIC_ID, ((lambda vp: vp.apic_id), _set_apic_id))
    both(names.APIC_ID, ((lambda vp: vp.apic_id), _set_apic_id))
    for number in range(2 * names.STIMER_COUNT):
        both(names.STIMER0_CONFIG + number, _stimer(number))


def _msrs() -> dict[int, int]:
    """Names that are MSRs of KVM's."""
    table = {
        names.KERNEL_GS_BASE: 0xC0000102, names.PAT: 0x277, names.SYSENTER_CS: 0x174,
        names.SYSENTER_EIP: 0x176, names.SYSENTER_ESP: 0x175, names.STAR: 0xC0000081, names.LSTAR: 0xC0000082,
        names.CSTAR: 0xC0000083, names.SFMASK: 0xC0000084, names.MTRR_CAP: 0xFE, names.MTRR_DEF_TYPE: 0x2FF,
        names.MTRR_FIX64K00000: 0x250, names.MTRR_FIX16K80000: 0x258, names.MTRR_FIX16KA0000: 0x259,
        names.TSC_AUX: 0xC0000103, names.BNDCFGS: 0xD90, names.DEBUG_CTL: 0x1D9, names.SPEC_CTRL: 0x48,
        names.U_XSS: 0xDA0, names.U_CET: 0x6A0, names.S_CET: 0x6A2, names.PL0_SSP: 0x6A4, names.PL1_SSP: 0x6A5,
        names.PL2_SSP: 0x6A6, names.PL3_SSP: 0x6A7, names.INTERRUPT_SSP_TABLE: 0x6A8, names.TSC_DEADLINE: 0x6E0,
        names.TSC_ADJUST: 0x3B, names.MISC_ENABLE: 0x1A0,
    }  # fmt: skip
    for number in range(8):  # KVM has eight
        table[names.MTRR_PHYS_BASE0 + number] = 0x200 + 2 * number
        table[names.MTRR_PHYS_MASK0 + number] = 0x201 + 2 * number
        table[names.MTRR_FIX4KC0000 + number] = 0x268 + number
    return table


_build()

#: What :func:`read_many` and :func:`write_many` do without a call: index in ``vp.u64``, or one of these and an offset.
_IS_SEGMENT, _IS_TABLE, _IS_FPU = 1 << 12, 2 << 12, 3 << 12
_SPOTS = {
    **SLOTS,
    **{name: _IS_SEGMENT + at for name, at in _SEGMENTS.items()},
    names.IDTR: _IS_TABLE + abi.SYNC_SREGS_AT + abi.SREGS_IDT,
    names.GDTR: _IS_TABLE + abi.SYNC_SREGS_AT + abi.SREGS_GDT,
    **{name: _IS_FPU + offset for name, offset in _FPU.items()},
}


# --- registers that a running VP has too --------------------------------------------------------------------------
def _set_explicit_suspend(vp: ChildVp, value: int, root_vp: VirtualProcessor) -> None:
    if value & ~1:
        raise HvError(status.INVALID_REGISTER_VALUE)
    if value:
        ran = vp.running
        vp.suspend()
        if ran:
            register_page.refresh(vp)
    elif vp.explicit_suspend:
        vp.clear_explicit_suspend(root_vp)


def _set_intercept_suspend(vp: ChildVp, value: int, root_vp: VirtualProcessor) -> None:
    if value & ~1 or (value and not vp.intercept_suspend):  # only an intercept sets it
        raise HvError(status.INVALID_REGISTER_VALUE)
    if not value and vp.intercept_suspend:
        vp.clear_intercept_suspend(root_vp)


def _set_dispatch_suspend(vp: ChildVp, value: int, _root_vp: VirtualProcessor) -> None:
    if value & ~1:
        raise HvError(status.INVALID_REGISTER_VALUE)
    vp.stored.dispatch_suspend = bool(value)


def _runtime(vp: ChildVp) -> int:
    """100 ns units that the VP's thread has computed."""
    return clock_gettime_ns(vp.cpu_clock) // 100 if vp.cpu_clock else 0


def _always() -> dict[int, tuple[Get, Callable[[ChildVp, int, VirtualProcessor], None] | None]]:
    return {
        names.EXPLICIT_SUSPEND: ((lambda vp: int(vp.explicit_suspend)), _set_explicit_suspend),
        names.INTERCEPT_SUSPEND: ((lambda vp: int(vp.intercept_suspend)), _set_intercept_suspend),
        names.DISPATCH_SUSPEND: ((lambda vp: int(vp.stored.dispatch_suspend)), _set_dispatch_suspend),
        names.VP_ROOT_SIGNAL_COUNT: ((lambda vp: vp.stored.root_signals), None),
        names.VP_RUNTIME: (_runtime, None),
    }


_ALWAYS = _always()


def exists(name: int) -> bool:
    """Whether it is a register of the processor, and neither the hypervisor's nor one of suspension."""
    return name in _SET


def get(vp: ChildVp, name: int) -> int:
    """The value. HV_STATUS_INVALID_PARAMETER for a name that does not exist here."""
    slot = SLOTS.get(name)
    if slot is not None:
        if vp.running:
            raise HvError(status.INVALID_VP_STATE)
        return vp.u64[slot]
    always = _ALWAYS.get(name)
    if always is not None:
        return always[0](vp)
    read = _GET.get(name)
    if read is None:
        if not vp.running:
            vp.notice_init()
        return synthetic_registers.get(vp, name)
    if vp.running:
        raise HvError(status.INVALID_VP_STATE)
    return read(vp)


def set(vp: ChildVp, name: int, value: int, root_vp: VirtualProcessor) -> None:
    """Stores ``value``, 128 bits of it or 64. HV_STATUS_INVALID_PARAMETER: unknown or read-only name;
    INVALID_REGISTER_VALUE.

    ``root_vp`` makes the call: an intercept after a resume goes there.
    """
    if name not in WIDE:
        value &= _MASK64
    write = _SET.get(name)
    if write is not None:
        if vp.running:
            raise HvError(status.INVALID_VP_STATE)
        try:
            write(vp, value)
        except KvmError:
            raise HvError(status.INVALID_REGISTER_VALUE) from None
        return
    always = _ALWAYS.get(name)
    if always is None:
        if not vp.running:
            vp.notice_init()
        try:
            synthetic_registers.set(vp, name, value)
        except GeneralProtection:
            raise HvError(status.INVALID_REGISTER_VALUE) from None
        return
    if always[1] is None:
        raise HvError(status.INVALID_PARAMETER)
    always[1](vp, value, root_vp)


# --- many at once -------------------------------------------------------------------------------------------------
def read_many(
    vp: ChildVp, wanted: memoryview, output: memoryview, start: int, count: int, deadline: int
) -> int:
    """Registers ``wanted[start:count]`` to their places in ``output``, 16 bytes each; returns how many are done, fewer
    than ``count`` after the deadline. HvError as :func:`get`, with the number done."""
    spots: dict[int, int] = {} if vp.running else _SPOTS
    find = spots.get
    pair = _PAIR
    u64 = vp.u64
    u8 = vp.u8
    index = start
    try:
        for index in range(start, count):
            name = wanted[index]
            at = index * 16
            spot = find(name)
            if spot is None:
                value = get(vp, name)
                pair(output, at, value & _MASK64, value >> 64)
                if not index % _ELEMENTS and perf_counter_ns() > deadline:
                    return index + 1
            elif spot < _IS_SEGMENT:
                pair(output, at, u64[spot], 0)
            elif spot < _IS_TABLE:
                output[at : at + 16] = segments.pack(u8, spot - _IS_SEGMENT)
            elif spot < _IS_FPU:
                output[at : at + 16] = segments.pack_table(u8, spot - _IS_TABLE)
            else:
                offset = spot - _IS_FPU
                output[at : at + 16] = vp.stored.fpu.load(vp)[offset : offset + 16]
    except HvError as error:
        error.reps = index
        raise
    return count


def write_many(vp: ChildVp, elements: memoryview, start: int, count: int, root_vp: VirtualProcessor) -> int:
    """Stores elements of 32 bytes (name, value at 16) in order; returns how many are done, fewer than ``count`` after
    ``root_vp``'s deadline. HvError as :func:`set`, with the number done.

    VMMs store what they have read: what is there already is passed over.
    """
    parked = not vp.running
    find = _SPOTS.get
    element = _ELEMENT
    u64 = vp.u64
    u8 = vp.u8
    index = start
    try:
        for index in range(start, count):
            name, low, high = element(elements, index * 32)
            if parked:
                spot = find(name, _IS_FPU)
                if spot < _IS_SEGMENT:
                    if u64[spot] == low:
                        continue
                    if name in GENERAL:
                        u64[spot] = low
                        u64[_DIRTY] |= abi.SYNC_REGS
                        continue
                elif spot < _IS_TABLE:
                    at = index * 32 + 16
                    if elements[at : at + 16] == segments.pack(u8, spot - _IS_SEGMENT):
                        continue
            set(vp, name, low | high << 64 if high else low, root_vp)
            parked = not vp.running
            if not index % _ELEMENTS and index and perf_counter_ns() > root_vp.deadline:
                return index + 1
    except HvError as error:
        error.reps = index
        raise
    return count


def reset(vp: ChildVp) -> None:
    """A new VP's state: architectural reset, APs waiting for SIPI, all local vector table entries masked.

    The processor may have served a VP that was deleted; its CPUID then stays what it was.
    """
    vp.stored = StoredState()
    vcpu = vp.vcpu
    vcpu.vm.enable_capability(abi.CAP_EXCEPTION_PAYLOAD, 1)
    # KVM unmasks LINT0 of the boot processor, at every INIT too.
    vcpu.vm.enable_capability(abi.CAP_DISABLE_QUIRKS, abi.QUIRK_LINT0_REENABLED | abi.QUIRK_OUT_7E_INC_RIP)
    if vcpu.has_run:
        vp_reset.reset(vp)
    else:
        child_cpuid.ensure(vp)
        lapic = vcpu.lapic()
        lapic[_LAPIC_LVT0 : _LAPIC_LVT0 + 4] = _LVT_MASKED.to_bytes(4, "little")
        vcpu.set_lapic(lapic)
    vcpu.set_mp_state(abi.MP_STATE_UNINITIALIZED if vp.index else abi.MP_STATE_RUNNABLE)
    vcpu.fill_sync_area()
    vp.u64[_RDX] = child_cpuid.signature(vp)
    vp.u64[_DIRTY] = abi.SYNC_REGS
    vcpu.commit_sync_area()


def before_run(vp: ChildVp) -> None:
    """Everything that a parked VP must have before KVM_RUN: ChildVp.resume calls it."""
    register_page.absorb(vp)
    stored = vp.stored
    vp.vcpu.has_run = True
    if stored.cpuid_stale:
        child_cpuid.ensure(vp)
    stored.cpuid_final = True
    if stored.stimers_set and vp.timers:
        _start_timers(vp)
    stored.timer_count = stored.dr7 = stored.xcr0 = None
    stored.page_filled = False
    stored.fpu.leave(vp)
    u64 = vp.u64
    dirty = u64[_DIRTY]
    if not dirty:
        return
    if dirty & abi.SYNC_SREGS:
        efer = u64[_EFER]
        long_mode = efer & _EFER_LME and u64[_CR0] & _CR0_PG
        u64[_EFER] = efer | _EFER_LMA if long_mode else efer & ~_EFER_LMA
    if dirty & abi.SYNC_REGS:
        vp_events.keep_pending_exception(vp)
    if vp.index:
        # In wait-for-SIPI KVM_RUN overwrites the sync area before it reads it. A value that KVM refuses stays marked
        # and makes KVM_RUN fail.
        try:
            vp.vcpu.commit_sync_area()
        except KvmError:
            pass
