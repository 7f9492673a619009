# SPDX-License-Identifier: Apache-2.0
"""The root schedules: a child's VP is in the guest only while a VP of the root is in HVCALL_DISPATCH_VP for it.

The call lasts until the child's VP has an intercept, is suspended, or sleeps (HLT, waiting for SIPI), and until the
root's own VP has an interrupt to take, which KVM cannot deliver as long as the call lasts: that is looked for every
millisecond. On return the VP stands still and its register page is up to date, whatever the answer.

A VP that slept is *blocked*: the root waits for a scheduler message before it dispatches the VP again, and counts them
(register VP_ROOT_SIGNAL_COUNT; ``drivers/hv/mshv_root_main.c``: ``mshv_run_vp_with_root_scheduler``,
``drain_vp_signals``). What may have woken it up is looked for when the root gives it an interrupt, when its timer is
due, and every millisecond while another VP of its partition runs, for KVM does not tell of the interrupts that one
sends.
"""

from __future__ import annotations

from _thread import allocate_lock, start_new_thread
from struct import unpack_from
from time import monotonic

from ..kvm import abi
from ..kvm.errors import KvmError
from ..tlfs import intercepts as tlfs
from ..tlfs import messages
from . import register_page

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .child_partition import ChildPartition
    from .child_vp import ChildVp
    from .hypervisor import Hypervisor
    from .vp import VirtualProcessor

#: The first looks come soon: most stays in the guest are short.
_WAITS = (0.0003, 0.0005)
_WAIT = 0.001
#: The root gets its VP back after this long, whether it has an interrupt or not.
_SLICE = 0.02
_IRR, _ISR, _TPR = 0x200, 0x100, 0x80
_LVT_TIMER, _TIMER_INITIAL, _TIMER_CURRENT, _TIMER_DIVIDE = 0x320, 0x380, 0x390, 0x3E0
_LVT_LINT0, _LVT_MODE, _LVT_EXTINT = 0x350, 7 << 8, 7 << 8
_LVT_MASKED = 1 << 16
_TIMER_MODE_SHIFT, _TIMER_PERIODIC, _TIMER_DEADLINE = 17, 1, 2
_DIVISORS = (2, 4, 8, 16, 32, 64, 128, 1)
_MSR_TSC_DEADLINE = 0x6E0
_RFLAGS_IF = 1 << 9
_NMI_PENDING = 13  # struct kvm_vcpu_events.nmi.pending
_RFLAGS = abi.RUN_SYNC // 8 + 17

_SLEEPING = (abi.MP_STATE_UNINITIALIZED, abi.MP_STATE_INIT_RECEIVED)


class RootScheduler:
    """Everything under Hypervisor.lock, unless said otherwise."""

    __slots__ = ("_alarm", "_blocked", "_ended", "_finished", "_hypervisor", "_look", "_started")

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor
        #: VP -> when its timer is due, or None
        self._blocked: dict[ChildVp, float | None] = {}
        #: held while there is nothing to do for the thread that watches blocked VPs
        self._alarm = allocate_lock()
        self._alarm.acquire()
        #: held while that thread runs
        self._finished = allocate_lock()
        self._look = False
        self._started = False
        self._ended = False

    # --- HVCALL_DISPATCH_VP -------------------------------------------------------------------------------------------
    def dispatch(self, root_vp: VirtualProcessor, vp: ChildVp, flags: int) -> tuple[int, int]:
        """Runs ``vp`` for ``root_vp``, which makes the call: (state, event). Lets Hypervisor.lock go meanwhile."""
        child = vp.partition
        if flags & tlfs.DISPATCH_CLEAR_INTERCEPT_SUSPEND:
            vp.intercept_suspend = False
        self._blocked.pop(vp, None)
        vp.blocked = False
        vp.root_vp = root_vp
        runnable = not (
            vp.explicit_suspend or vp.intercept_suspend or vp.stored.dispatch_suspend or child.held
        )
        if runnable and vp.lets_root_react:  # blocked meanwhile: the root's VP is not kept
            vp.lets_root_react = False
            vp.blocked = True
            start_new_thread(self._react, (vp,))
            return tlfs.DISPATCH_STATE_BLOCKED, tlfs.DISPATCH_EVENT_OTHER
        if runnable:
            vp.dispatched = True
            try:
                vp.resume(root_vp)
                root_vp.wake()
                self._stay(root_vp, vp)
            finally:
                vp.dispatched = False
            if not vp.intercept_suspend:
                register_page.refresh(vp)
            self.look(child)
        if vp.stopping:
            return tlfs.DISPATCH_STATE_BLOCKED, tlfs.DISPATCH_EVENT_SUSPEND
        if vp.intercept_suspend:
            return tlfs.DISPATCH_STATE_READY, tlfs.DISPATCH_EVENT_INTERCEPT
        if vp.explicit_suspend:
            vp.blocked = True
            return tlfs.DISPATCH_STATE_BLOCKED, tlfs.DISPATCH_EVENT_SUSPEND
        if child.held or vp.stored.dispatch_suspend:  # ChildPartition.let_go sends the message
            vp.blocked = True
            return tlfs.DISPATCH_STATE_BLOCKED, tlfs.DISPATCH_EVENT_OTHER
        if runnable and self._sleeps(vp):
            vp.blocked = True
            self._watch(vp)
            return tlfs.DISPATCH_STATE_BLOCKED, tlfs.DISPATCH_EVENT_OTHER
        return tlfs.DISPATCH_STATE_READY, tlfs.DISPATCH_EVENT_OTHER

    def _stay(self, root_vp: VirtualProcessor, vp: ChildVp) -> None:
        """Until the VP has parked."""
        child = vp.partition
        lock = self._hypervisor.lock
        waiter = allocate_lock()
        waiter.acquire()
        vp.await_park(waiter)
        turn = 0
        end = monotonic() + _SLICE
        while vp.running:
            child.pinned += 1
            held = lock._release_save()  # type: ignore[attr-defined]
            try:
                parked = waiter.acquire(timeout=_WAITS[turn] if turn < len(_WAITS) else _WAIT)
            finally:
                lock._acquire_restore(held)  # type: ignore[attr-defined]
                child.pinned -= 1
            if parked or not vp.running:
                break
            turn += 1
            if not vp.yielding:
                self.look(child)
                vp.yielding = root_vp.stopping or _halted(vp) or monotonic() > end or _has_interrupt(root_vp)
            if vp.yielding:
                vp.vcpu.kick()
        vp.yielding = False

    def _react(self, vp: ChildVp) -> None:
        """A thread of its own, without the lock: gives the root its time, then has the VP dispatched again."""
        vp.let_root_react()
        with self._hypervisor.lock:
            self.runnable(vp)

    # --- what wakes a blocked VP --------------------------------------------------------------------------------------
    def runnable(self, vp: ChildVp) -> None:
        """The root may dispatch the VP again, if it waits for that: one message says so."""
        if not vp.blocked:
            return
        vp.blocked = False
        self._blocked.pop(vp, None)
        if vp.stored.dispatch_suspend or vp.stopping:
            return
        vp.stored.root_signals += 1
        child = vp.partition
        self._hypervisor.messages.post(
            messages.SCHEDULER_VP_SIGNAL_PAIR,
            child.id,
            messages.scheduler_pair(child.id, vp.index),
            vp.root_vp,
        )

    def look(self, child: ChildPartition) -> None:
        """Finds the blocked VPs of a partition that something has woken up."""
        for vp in list(self._blocked):
            if vp.partition is child and not self._sleeps(vp):
                self.runnable(vp)

    def poke(self) -> None:
        """Something may have woken a VP up. Any thread, with or without locks."""
        if self._blocked:
            self._look = True
            self._ring()

    def forget(self, vp: ChildVp) -> None:
        """The VP is going."""
        vp.blocked = False
        self._blocked.pop(vp, None)

    def stop(self) -> None:
        """Ends the thread; without the lock."""
        self._ended = True
        self._ring()
        with self._finished:
            pass

    def _ring(self) -> None:
        try:
            self._alarm.release()
        except RuntimeError:
            pass  # it rings already

    def _sleeps(self, vp: ChildVp) -> bool:
        """Whether a parked VP would go on sleeping if it were dispatched."""
        due = self._blocked.get(vp)
        if due is not None and due <= monotonic():  # a periodic timer looks as if it had not fired yet
            return False
        if vp.to_do or vp.stored.stimers_set or vp.partition.interrupts.waiting_for(vp):
            return False  # what is to come is known once it runs
        vcpu = vp.vcpu
        try:
            state = vcpu.mp_state()
            if vp.index:
                vcpu.fill_sync_area()  # KVM has looked for INIT and SIPI
            if state in _SLEEPING:
                return True
            if state != abi.MP_STATE_HALTED:
                return False
            lapic = vcpu.lapic()
            due = _timer_due(vp, lapic)
            if due is not None and due <= 0:
                return False
            if vcpu.events()[_NMI_PENDING]:
                return False
        except KvmError:
            return False  # running it tells
        if vp in self._blocked:
            self._blocked[vp] = None if due is None else monotonic() + due
        if not vp.u64[_RFLAGS] & _RFLAGS_IF:
            return True
        if _takes_extint(lapic) and not vp.u8[abi.RUN_READY_FOR_INTERRUPT]:
            return False  # KVM has an ExtINT for it, which shows nowhere else
        return _highest(lapic, _IRR) >> 4 <= max(lapic[_TPR], _highest(lapic, _ISR)) >> 4

    def _watch(self, vp: ChildVp) -> None:
        self._blocked[vp] = None
        if not self._sleeps(vp):
            self.runnable(vp)
            return
        if not self._started:
            self._started = True
            self._finished.acquire()
            start_new_thread(self._thread, ())
        if self._blocked[vp] is not None:
            self._ring()

    def _thread(self) -> None:
        try:
            self._watch_blocked()
        except Exception as error:  # without this thread blocked VPs sleep for ever
            self._hypervisor.root.end_with_defect(error)
        finally:
            self._finished.release()

    def _watch_blocked(self) -> None:
        """Waits for timers and for :meth:`poke`."""
        lock = self._hypervisor.lock
        wait = -1.0
        while self._alarm.acquire(timeout=wait) or not self._ended:
            if self._ended:
                return
            with lock:
                now = monotonic()
                everything, self._look = self._look, False
                for vp, due in list(self._blocked.items()):
                    if (everything or (due is not None and due <= now)) and not self._sleeps(vp):
                        self.runnable(vp)
                times = [due for due in self._blocked.values() if due is not None]
            wait = max(min(times) - monotonic(), 0.0002) if times else -1.0


def _halted(vp: ChildVp) -> bool:
    return vp.halted is not None and vp.halted()


def _takes_extint(lapic: bytearray) -> bool:
    """Whether LINT0 is open and brings ExtINT."""
    (entry,) = unpack_from("<I", lapic, _LVT_LINT0)
    return bool(entry & (_LVT_MASKED | _LVT_MODE) == _LVT_EXTINT)


def _highest(lapic: bytearray, register: int) -> int:
    """The highest vector whose bit is set in one of the local APIC's 256-bit registers, or 0."""
    for at in range(register + 0x70, register - 1, -0x10):
        (bits,) = unpack_from("<I", lapic, at)
        if bits:
            return (at - register << 1) + int(bits).bit_length() - 1
    return 0


def _timer_due(vp: VirtualProcessor, lapic: bytearray) -> float | None:
    """Seconds until the timer of the local APIC fires, 0 or less when it has; None when it does not.

    A timer that fires while the processor is not in KVM_RUN shows nowhere else: KVM raises the vector at the next run.
    """
    (entry,) = unpack_from("<I", lapic, _LVT_TIMER)
    if entry & _LVT_MASKED:
        return None
    vcpu = vp.vcpu
    if entry >> _TIMER_MODE_SHIFT & 3 == _TIMER_DEADLINE:
        deadline = vcpu.try_msr(_MSR_TSC_DEADLINE)
        return (deadline - vcpu.get_msr(abi.MSR_TSC)) / (vcpu.tsc_khz() * 1000) if deadline else None
    (initial,) = unpack_from("<I", lapic, _TIMER_INITIAL)
    (current,) = unpack_from("<I", lapic, _TIMER_CURRENT)
    (divide,) = unpack_from("<I", lapic, _TIMER_DIVIDE)
    if not initial:
        return None
    return float(current * _DIVISORS[divide & 3 | divide >> 1 & 4] / vp.partition.apic_hz)


def _has_interrupt(root_vp: VirtualProcessor) -> bool:
    """Whether the root's VP, which is in a hypercall, has something to take."""
    lapic = root_vp.vcpu.lapic()
    if _highest(lapic, _IRR):
        return True
    (entry,) = unpack_from("<I", lapic, _LVT_TIMER)
    if entry >> _TIMER_MODE_SHIFT & 3 == _TIMER_PERIODIC:
        return False  # _SLICE is its limit
    due = _timer_due(root_vp, lapic)
    return due is not None and due <= 0
