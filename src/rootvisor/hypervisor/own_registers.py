# SPDX-License-Identifier: Apache-2.0
"""Registers of a guest's own VPs by name (HVCALL_GET/SET_VP_REGISTERS with ACCESS_VP_REGISTERS).

Those of the processor are read and written as a parked child's are, by the VP's own thread outside of the guest; those
of the hypervisor's are :mod:`.synthetic_registers`. What a parent only may say of a VP (suspension, pending events,
activity) and VTLs have no name here.
"""

from __future__ import annotations

from time import clock_gettime_ns

from ..kvm import abi
from ..kvm.errors import KvmError
from ..tlfs import registers as names
from ..tlfs import status
from . import synthetic_registers, vp_registers
from .errors import HvError
from .register_elements import read_each, write_each

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .guest_vp import GuestVp

_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_DIRTY = abi.RUN_DIRTY_REGS // 8
#: The parent's: not a guest's to see.
_PARENTS = frozenset(
    (
        names.PENDING_INTERRUPTION, names.INTERRUPT_STATE, names.PENDING_EVENT0, names.PENDING_EVENT1,
        names.DELIVERABILITY_NOTIFICATIONS, names.INTERNAL_ACTIVITY_STATE,
    )
)  # fmt: skip
#: The clock of all VPs is one, and APIC ids are KVM's.
_READ_ONLY = frozenset(
    (names.TSC, names.VP_RUNTIME, names.TIME_REF_COUNT, names.INITIAL_APIC_ID, names.APIC_ID)
)


class _Parked:
    """A VP that is outside of the guest, as :mod:`.vp_registers` looks at children's."""

    __slots__ = ("apic_id", "index", "intercept_suspend", "running", "stored", "synic", "u8", "u64", "vcpu")

    def __init__(self, vp: GuestVp) -> None:
        self.vcpu, self.u8, self.u64 = vp.vcpu, vp.u8, vp.u64
        self.index, self.apic_id, self.synic = vp.index, vp.apic_id, vp.synic
        self.running = self.intercept_suspend = False
        self.stored = vp_registers.StoredState()
        self.stored.cpuid_stale = False

    def mark_dirty(self, registers: int) -> None:
        self.u64[_DIRTY] |= registers


def _special(vp: GuestVp, name: int) -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """What a guest's VP has elsewhere than a child's."""
    if name == names.TSC:
        return (lambda: vp.vcpu.get_msr(abi.MSR_TSC)), _refuse
    if name == names.TIME_REF_COUNT:
        return (lambda: vp.partition.reference_time.at(vp.vcpu.get_msr(abi.MSR_TSC))), _refuse
    if name == names.VP_RUNTIME:
        return (lambda: clock_gettime_ns(vp.cpu_clock) // 100), _refuse
    index = name - names.STIMER0_CONFIG
    if 0 <= index < 2 * len(vp.timers):
        timer = vp.timers[index // 2]
        return (
            ((lambda: timer.count), timer.write_count)
            if index & 1
            else (timer.read_config, timer.write_config)
        )
    return None


def _refuse(_value: int) -> None:
    raise HvError(status.INVALID_PARAMETER)


def _of_processor(name: int) -> bool:
    return vp_registers.exists(name) and name not in _PARENTS


def read_many(vp: GuestVp, wanted: memoryview, output: memoryview, start: int, count: int) -> None:
    """``wanted[start:count]`` to their places in ``output``, 16 bytes each. INVALID_PARAMETER, with the number done."""
    vp.notice_init()
    parked = _Parked(vp)

    def read(name: int) -> int:
        special = _special(vp, name)
        if special is not None:
            return special[0]()
        if _of_processor(name):
            return vp_registers.get(parked, name)  # type: ignore[arg-type]
        return synthetic_registers.get(vp, name)

    read_each(wanted, output, start, count, read)


def write_many(vp: GuestVp, elements: memoryview, start: int, count: int) -> None:
    """Elements of 32 bytes (name, value at 16) in order. INVALID_PARAMETER, INVALID_REGISTER_VALUE, with the number
    done; what KVM does not take is as it was."""
    vp.notice_init()
    parked = _Parked(vp)

    def write(name: int, value: int) -> None:
        special = _special(vp, name)
        if special is not None:
            special[1](value & _MASK64)
        elif name in _READ_ONLY:
            raise HvError(status.INVALID_PARAMETER)
        elif _of_processor(name):
            _write(parked, vp, name, value)
        else:
            synthetic_registers.set(vp, name, value)

    write_each(elements, start, count, write)


def _write(parked: _Parked, vp: GuestVp, name: int, value: int) -> None:
    """Special registers go to KVM at once, which checks them; general ones with the next KVM_RUN."""
    before = bytes(vp.u8[abi.SYNC_SREGS_AT : abi.SYNC_EVENTS_AT])
    vp_registers.set(parked, name, value, vp)  # type: ignore[arg-type]
    try:
        parked.stored.fpu.leave(parked)  # type: ignore[arg-type]
        if vp.u64[_DIRTY] & abi.SYNC_SREGS:
            vp.vcpu.ioctl(abi.KVM_SET_SREGS, bytearray(vp.u8[abi.SYNC_SREGS_AT : abi.SYNC_EVENTS_AT]))
    except KvmError:
        vp.u8[abi.SYNC_SREGS_AT : abi.SYNC_EVENTS_AT] = before
        raise HvError(status.INVALID_REGISTER_VALUE) from None
    finally:
        vp.u64[_DIRTY] &= ~abi.SYNC_SREGS
