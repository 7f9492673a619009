# SPDX-License-Identifier: Apache-2.0
"""Pending events of a parked VP: PENDING_INTERRUPTION, INTERRUPT_STATE, PENDING_EVENT0/1 on KVM's vCPU events.

An interruption is an event whose delivery has begun (KVM: injected), an event one that waits for the next instruction
boundary (KVM: pending, with CR2 or DR6 as payload; ``KVM_CAP_EXCEPTION_PAYLOAD``). KVM keeps no instruction length.
"""

from __future__ import annotations

from struct import Struct

from ..kvm import abi
from ..tlfs import registers, status
from .errors import HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .child_vp import ChildVp

_AT = abi.SYNC_EVENTS_AT
_INJECTED = _AT + abi.EVENTS_EXCEPTION_INJECTED
_NR = _AT + abi.EVENTS_EXCEPTION_NR
_HAS_ERROR = _AT + abi.EVENTS_EXCEPTION_HAS_ERROR
_PENDING = _AT + abi.EVENTS_EXCEPTION_PENDING
_ERROR = (_AT + abi.EVENTS_EXCEPTION_ERROR) // 4
_INTERRUPT = _AT + abi.EVENTS_INTERRUPT_INJECTED
_INTERRUPT_NR = _AT + abi.EVENTS_INTERRUPT_NR
_SOFT = _AT + abi.EVENTS_INTERRUPT_SOFT
_SHADOW = _AT + abi.EVENTS_SHADOW
_NMI = _AT + abi.EVENTS_NMI_INJECTED
_NMI_PENDING = _AT + abi.EVENTS_NMI_PENDING
_NMI_MASKED = _AT + abi.EVENTS_NMI_MASKED
_FLAGS = (_AT + abi.EVENTS_FLAGS) // 4
_HAS_PAYLOAD = _AT + abi.EVENTS_EXCEPTION_HAS_PAYLOAD
_PAYLOAD = (_AT + abi.EVENTS_EXCEPTION_PAYLOAD) // 8
_BITMAP = slice(
    abi.SYNC_SREGS_AT + abi.SREGS_INTERRUPT_BITMAP, abi.SYNC_SREGS_AT + abi.SREGS_INTERRUPT_BITMAP + 32
)
_NO_BITMAP = bytes(32)
_EXCEPTION = Struct("<BBBBI")
_INTERRUPTION_VALID = 0xFFFF_FFFF_FFFF_01FF
_EVENT_VALID = 0xFFFF_FFFF_FFFF_010F
_NMI_VECTOR = 2
_DEBUG, _PAGE_FAULT = 1, 14


def change(vp: ChildVp) -> None:
    """Marks the events of the sync area as changed. An NMI that arrives meanwhile must survive the write."""
    vp.vcpu.u32[_FLAGS] &= abi.EVENTS_VALID_PAYLOAD
    vp.vcpu.u32[_FLAGS] |= abi.EVENTS_VALID_SHADOW
    vp.mark_dirty(abi.SYNC_EVENTS)


def keep_pending_exception(vp: ChildVp) -> None:
    """KVM_SET_REGS drops a pending exception: whoever changes general registers hands it over again."""
    if vp.u8[_PENDING]:
        change(vp)


def pending_interruption(vp: ChildVp) -> int:
    """PENDING_INTERRUPTION."""
    u8 = vp.u8
    if u8[_INJECTED]:
        value = registers.PENDING | registers.INTERRUPTION_EXCEPTION << registers.INTERRUPTION_TYPE_SHIFT
        if u8[_HAS_ERROR]:
            value |= registers.INTERRUPTION_DELIVER_ERROR_CODE
            value |= vp.vcpu.u32[_ERROR] << registers.INTERRUPTION_ERROR_CODE_SHIFT
        return value | u8[_NR] << registers.INTERRUPTION_VECTOR_SHIFT
    if u8[_NMI]:
        return (
            registers.PENDING
            | registers.INTERRUPTION_NMI << registers.INTERRUPTION_TYPE_SHIFT
            | _NMI_VECTOR << registers.INTERRUPTION_VECTOR_SHIFT
        )
    if u8[_INTERRUPT]:
        kind = registers.INTERRUPTION_SOFTWARE_INTERRUPT if u8[_SOFT] else registers.INTERRUPTION_EXTERNAL
        return (
            registers.PENDING
            | kind << registers.INTERRUPTION_TYPE_SHIFT
            | u8[_INTERRUPT_NR] << registers.INTERRUPTION_VECTOR_SHIFT
        )
    return 0


def set_pending_interruption(vp: ChildVp, value: int) -> None:
    """Replaces whatever is being delivered. HV_STATUS_INVALID_REGISTER_VALUE for a type or vector that cannot be."""
    u8 = vp.u8
    if not value & registers.PENDING:
        if not (u8[_INJECTED] | u8[_NMI] | u8[_INTERRUPT]):
            return
        value = 0
    kind = value >> registers.INTERRUPTION_TYPE_SHIFT & 7
    vector = value >> registers.INTERRUPTION_VECTOR_SHIFT & 0xFFFF
    if value & ~_INTERRUPTION_VALID or vector > 255:
        raise HvError(status.INVALID_REGISTER_VALUE)
    exception = kind in (
        registers.INTERRUPTION_EXCEPTION,
        registers.INTERRUPTION_SOFTWARE_EXCEPTION,
        registers.INTERRUPTION_PRIVILEGED_SOFTWARE_EXCEPTION,
    )
    if (exception and (vector > 31 or vector == _NMI_VECTOR)) or kind in (1, 7):
        raise HvError(status.INVALID_REGISTER_VALUE)
    u8[_INJECTED] = u8[_NMI] = u8[_INTERRUPT] = u8[_SOFT] = 0
    u8[_BITMAP] = _NO_BITMAP
    if not value:
        pass
    elif exception:
        u8[_PENDING] = u8[_HAS_PAYLOAD] = 0  # KVM has room for one exception
        deliver = 1 if value & registers.INTERRUPTION_DELIVER_ERROR_CODE else 0
        _EXCEPTION.pack_into(u8, _AT, 1, vector, deliver, 0, value >> 32 if deliver else 0)
    elif kind == registers.INTERRUPTION_NMI:
        u8[_NMI] = 1
    else:
        u8[_INTERRUPT] = 1
        u8[_INTERRUPT_NR] = vector
        u8[_SOFT] = kind == registers.INTERRUPTION_SOFTWARE_INTERRUPT
    change(vp)


def interrupt_state(vp: ChildVp) -> int:
    """INTERRUPT_STATE: shadow of STI or MOV SS, NMIs masked."""
    u8 = vp.u8
    return (registers.INTERRUPT_SHADOW if u8[_SHADOW] else 0) | (
        registers.NMI_MASKED if u8[_NMI_MASKED] else 0
    )


def set_interrupt_state(vp: ChildVp, value: int) -> None:
    """HV_STATUS_INVALID_REGISTER_VALUE for other bits."""
    if value & ~(registers.INTERRUPT_SHADOW | registers.NMI_MASKED):
        raise HvError(status.INVALID_REGISTER_VALUE)
    if value == interrupt_state(vp):
        return
    u8 = vp.u8
    if not value & registers.INTERRUPT_SHADOW:
        u8[_SHADOW] = 0
    elif not u8[_SHADOW]:
        u8[_SHADOW] = abi.SHADOW_MOV_SS
    u8[_NMI_MASKED] = 1 if value & registers.NMI_MASKED else 0
    change(vp)


def end_shadow(vp: ChildVp) -> None:
    """The instruction under the shadow of STI or MOV SS has been completed by somebody else."""
    if vp.u8[_SHADOW]:
        vp.u8[_SHADOW] = 0
        change(vp)


def pending_event0(vp: ChildVp) -> int:
    """PENDING_EVENT0 (128 bits): an exception that waits."""
    u8 = vp.u8
    if not u8[_PENDING]:
        return 0
    value = registers.PENDING | u8[_NR] << registers.INTERRUPTION_VECTOR_SHIFT
    if u8[_HAS_ERROR]:
        value |= registers.EVENT_DELIVER_ERROR_CODE | vp.vcpu.u32[_ERROR] << 32
    if u8[_HAS_PAYLOAD]:
        value |= vp.u64[_PAYLOAD] << 64
    return value


def set_pending_event0(vp: ChildVp, value: int) -> None:
    """An exception, or nothing. HV_STATUS_INVALID_REGISTER_VALUE for the other kinds of events."""
    u8 = vp.u8
    if not value & registers.PENDING:
        if u8[_PENDING]:
            u8[_PENDING] = u8[_HAS_PAYLOAD] = 0
            change(vp)
        return
    vector = value >> registers.INTERRUPTION_VECTOR_SHIFT & 0xFFFF
    low = value & 0xFFFF_FFFF_FFFF_FFFF
    if (
        low & ~_EVENT_VALID
        or low >> registers.INTERRUPTION_TYPE_SHIFT & 7 != registers.EVENT_TYPE_EXCEPTION
        or vector > 31
        or vector == _NMI_VECTOR
    ):
        raise HvError(status.INVALID_REGISTER_VALUE)
    deliver = 1 if low & registers.EVENT_DELIVER_ERROR_CODE else 0
    _EXCEPTION.pack_into(u8, _AT, 0, vector, deliver, 1, low >> 32 if deliver else 0)
    u8[_HAS_PAYLOAD] = vector in (_DEBUG, _PAGE_FAULT)
    vp.u64[_PAYLOAD] = value >> 64
    change(vp)


def set_pending_event1(_vp: ChildVp, value: int) -> None:
    """KVM has room for one event: only an empty one can be stored here."""
    if value & registers.PENDING:
        raise HvError(status.INVALID_REGISTER_VALUE)


def nmi_pending(vp: ChildVp) -> bool:
    """Whether an NMI waits, also one that was raised after the VP had stopped."""
    return bool(vp.vcpu.events()[abi.EVENTS_NMI_PENDING])


def set_nmi_pending(vp: ChildVp, pending: bool) -> None:
    """Makes an NMI wait, or takes it back."""
    vcpu = vp.vcpu
    vcpu.commit_sync_area()
    events = vcpu.events()
    if bool(events[abi.EVENTS_NMI_PENDING]) == pending:
        return
    events[abi.EVENTS_NMI_PENDING] = pending
    events[abi.EVENTS_FLAGS] |= abi.EVENTS_VALID_NMI_PENDING
    vcpu.set_events(events)
    vp.u8[_NMI_PENDING] = pending
