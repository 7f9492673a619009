# SPDX-License-Identifier: Apache-2.0
"""Interrupts that end by themselves (SINTs with AutoEOI), where KVM has no SynIC whose SINTs its local APIC looks at.

They go past the local APIC: as soon as the processor could take one, KVM is told that it is taking it, so that none is
ever in service. Until then it waits here, as it would in the interrupt request register.
"""

from __future__ import annotations

from _thread import allocate_lock

from ..kvm import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..kvm.vcpu import Vcpu

_RFLAGS = abi.REGS.index("rflags")
_RFLAGS_IF = 1 << 9
# registers of the local APIC's page
_PRIORITY, _SPURIOUS, _REQUESTS = 0xA0, 0xF0, 0x200
_APIC_ENABLED = 1 << 8
#: Events that have to be delivered first.
_BUSY = (
    abi.EVENTS_EXCEPTION_INJECTED, abi.EVENTS_EXCEPTION_PENDING, abi.EVENTS_INTERRUPT_INJECTED, abi.EVENTS_SHADOW,
    abi.EVENTS_NMI_INJECTED,
)  # fmt: skip


class AutoEoi:
    """Of one processor. ``pending`` has a bit per vector."""

    __slots__ = ("_lock", "_vcpu", "pending")

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._lock = allocate_lock()
        self.pending = 0

    def add(self, vector: int) -> None:
        """The vector is requested; whoever calls lets the processor's thread come by :meth:`deliver`."""
        with self._lock:
            self.pending |= 1 << vector

    def clear(self) -> None:
        """INIT: nothing is requested."""
        with self._lock:
            self.pending = 0

    def deliver(self) -> None:
        """Has the processor take the highest vector, if it can now; by its own thread, before KVM_RUN."""
        vcpu = self._vcpu
        vcpu.finish_exit()  # an exception of the last exit's comes first
        state = vcpu.mp_state()
        lapic = memoryview(vcpu.lapic()).cast("I")
        if (
            state in (abi.MP_STATE_UNINITIALIZED, abi.MP_STATE_INIT_RECEIVED)
            or not lapic[_SPURIOUS // 4] & _APIC_ENABLED
        ):
            self.clear()  # an interrupt for a local APIC that is off is lost
            return
        vector = self.pending.bit_length() - 1
        requested = sum(lapic[(_REQUESTS + 16 * word) // 4] << 32 * word for word in range(8))
        events = vcpu.events()
        if (
            any(events[at] for at in _BUSY)
            or not vcpu.get_regs()[_RFLAGS] & _RFLAGS_IF
            or lapic[_PRIORITY // 4] >> 4 >= vector >> 4
            or requested >> vector + 1  # KVM delivers that first
        ):
            return
        with self._lock:
            self.pending &= ~(1 << vector)
        events[abi.EVENTS_INTERRUPT_INJECTED] = 1
        events[abi.EVENTS_INTERRUPT_NR] = vector
        events[abi.EVENTS_INTERRUPT_SOFT] = 0
        vcpu.set_events(events)
        if state == abi.MP_STATE_HALTED:
            vcpu.set_mp_state(abi.MP_STATE_RUNNABLE)
