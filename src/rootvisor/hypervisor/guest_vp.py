# SPDX-License-Identifier: Apache-2.0
"""A VP of a guest with a computer of its own: timers, what INIT does, EOI, idling, remote TLB flushes."""

from __future__ import annotations

from _thread import allocate_lock
from errno import EFAULT
from fcntl import ioctl

from ..bus.address_space import AddressError
from ..kvm import abi
from ..tlfs import msrs, status
from . import init_watch, memory_access
from .auto_eoi import AutoEoi
from .computer_vp import ComputerVp
from .errors import HvError
from .gpa_ranges import READ_ONLY, UNMAPPED, WRITABLE
from .init_watch import InitWatch
from .kvm_timers import KvmTimer
from .lazy_eoi import LazyEoi
from .synthetic_msrs import synthetic_msrs
from .synthetic_timers import SyntheticTimer, timers_of
from .vp_view import VpView

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable
    from typing import Any

    from ..kvm.vcpu import Vcpu
    from .guest_partition import GuestPartition
    from .vp import VirtualProcessor

_GENERAL_PROTECTION = 13
#: GUEST_IDLE looks for interrupts of KVM's own this often; ours wake it at once.
_IDLE_LOOK_S = 0.001
#: A flush that a VP does not answer within this time: it has been kicked and does something else outside the guest.
_KICK_AGAIN_S = 0.02
#: So many looks in a row that find a VP outside of the guest are enough.
_ERRAND_LOOKS = 25
_SUBERROR_EMULATION = 1
_IRR = range(0x200, 0x280, 0x10)
#: How often a VP may fail at memory without a page to blame.
_UNEXPLAINED_LIMIT = 64


class GuestVp(ComputerVp):
    """VP ``index`` of the guest.

    ``in_guest`` is true around KVM_RUN, ``flush_wanted`` when its TLB is to be emptied before it runs on.
    """

    __slots__ = (
        "_idle", "_init", "_init_lock", "_lazy_eoi", "_self_ending", "_unexplained", "errands", "flush_waiters",
        "flush_wanted", "in_guest",
    )  # fmt: skip
    partition: GuestPartition

    def __init__(self, partition: GuestPartition, index: int, vcpu: Vcpu) -> None:
        pages = partition.overlays
        super().__init__(partition, index, vcpu, tuple(pages.allocate() for _ in range(4)))
        #: work for this VP's thread
        self.errands: list[Callable[[], None]] = []
        self.flush_wanted = False
        self.flush_waiters: list[LockType] = []
        self.in_guest = False
        self._unexplained = 0
        self._idle = allocate_lock()
        self._idle.acquire()
        self._init = InitWatch(vcpu)
        self._init_lock = allocate_lock()
        self._lazy_eoi = LazyEoi(vcpu)
        self.timers = timers_of(self, partition.timers, KvmTimer if partition.kvm_synic else SyntheticTimer)
        self._msrs = synthetic_msrs(self)
        init_watch.guard(self._msrs, self.notice_init)
        self.synic.watch = lambda: partition.timers.watch(self)
        #: interrupts with automatic EOI that KVM's local APIC knows nothing of
        self._self_ending = AutoEoi(vcpu)
        vcpu.u64[abi.RUN_VALID_REGS // 8] = abi.SYNC_REGS | abi.SYNC_SREGS | abi.SYNC_EVENTS
        if partition.kvm_synic:
            vcpu.enable_capability(abi.CAP_HYPERV_SYNIC2, 0)
            self.synic.mirror = self._mirror_sint
        else:
            self.synic.auto_eoi = self._interrupt_that_ends_itself

    # --- INIT ---------------------------------------------------------------------------------------------------------
    def notice_init(self) -> None:
        """See :func:`.init_watch.reset`. While the VP is outside of the guest."""
        with self._init_lock:
            if not self._init.happened():
                return
            self._self_ending.clear()
            init_watch.reset(self)

    def settle(self, caller: VirtualProcessor) -> None:
        """Before ``caller`` sends something here: an INIT that the VP has had, or is about to have, is known then.

        The caller holds Hypervisor.lock once; it is let go meanwhile.
        """
        if caller is self:
            self.notice_init()
            return
        if not self.in_guest:
            self.vcpu.kick()  # should it enter now, KVM_RUN gives its processor back at once
            self._meet_init()
            return
        lock = self.partition.hypervisor.lock
        lock.release()
        try:
            self.errand(self._meet_init, caller)  # type: ignore[arg-type]
        except HvError:
            self._meet_init()  # it is busy outside of the guest
        finally:
            lock.acquire()

    def _meet_init(self) -> None:
        self.vcpu.mp_state()  # KVM looks for an INIT that waits
        self.notice_init()

    # --- interrupts ---------------------------------------------------------------------------------------------------
    def assist_page_changed(self) -> None:
        """KVM gets to know where it may say that an interrupt needs no EOI: the first word of the assist page."""
        self._lazy_eoi.place(self.assist_page)

    def _interrupt_that_ends_itself(self, vector: int) -> None:
        self._self_ending.add(vector)
        self.interrupts += 1
        self._awake()
        self.vcpu.kick()
        self.partition.timers.watch(self)

    def look(self) -> bool:
        """Lets messages and interrupts that wait go on, if they can; whether to look again. No lock is held."""
        if self._self_ending.pending:
            self.vcpu.kick()
        if self.synic.waits():
            self.partition.timers.retry(self)
        return bool(self._self_ending.pending) or self.synic.waits()

    def _mirror_sint(self, sint: int, value: int) -> None:
        """KVM's local APIC ends interrupts by itself whose vector a SINT of KVM's own SynIC says so for."""
        self.vcpu.set_msr(msrs.SINT0 + sint, value)

    def interrupt(self, vector: int) -> None:
        """Delivers a fixed, edge-triggered interrupt to this VP's local APIC."""
        super().interrupt(vector)
        self._awake()

    def _awake(self) -> None:
        try:
            self._idle.release()
        except RuntimeError:
            pass

    def _entry(self) -> Callable[[int, int], Any]:
        return self._enter

    def _enter(self, fd: int, run: int) -> None:
        """KVM_RUN, with what others want of this VP first. ``in_guest`` comes before: who asks afterwards waits."""
        self.in_guest = True
        try:
            if self.errands:
                self._do_errands()
            if self.flush_wanted:
                self._flush()
            if self._self_ending.pending:
                self._self_ending.deliver()
            ioctl(fd, run)
        finally:
            self.in_guest = False
            if self.flush_waiters:
                self._answer()

    # --- errands: what only this VP's thread can do, for others ---------------------------------------------------
    def errand(self, work: Callable[[], object], caller: GuestVp) -> None:
        """Has the VP's thread do ``work`` outside of the guest, and waits for it; HvError comes from there.

        ``caller`` is the VP that asks, which does its own errands meanwhile. It holds no lock. INVALID_VP_STATE when
        the VP is busy outside of the guest all the time.
        """
        if caller is self:
            work()
            return
        done = allocate_lock()
        done.acquire()
        outcome: list[HvError] = []

        def run() -> None:
            try:
                work()
            except HvError as error:
                outcome.append(error)
            finally:
                done.release()

        self.errands.append(run)
        patience = _ERRAND_LOOKS
        while True:
            self.vcpu.kick()
            if done.acquire(timeout=_KICK_AGAIN_S):
                break
            caller._do_errands()
            if self.stopping:
                return
            patience = _ERRAND_LOOKS if self.in_guest else patience - 1
            if not patience and run in self.errands:
                self.errands.remove(run)
                raise HvError(status.INVALID_VP_STATE)
        if outcome:
            raise outcome[0]

    def _do_errands(self) -> None:
        while self.errands:
            self.errands.pop(0)()

    # --- idling -------------------------------------------------------------------------------------------------------
    def idle(self) -> int:
        """GUEST_IDLE: sleeps until an interrupt or NMI is pending, whether the VP would take it or not; 0."""
        vcpu = self.vcpu
        for timer in self.timers:
            timer.leave_kvm()
        while not self.stopping:
            lapic = vcpu.lapic()
            if (
                self._self_ending.pending
                or any(any(lapic[at : at + 4]) for at in _IRR)
                or vcpu.events()[abi.EVENTS_NMI_PENDING]
            ):
                break
            self._idle.acquire(timeout=_IDLE_LOOK_S)
        return 0

    # --- TLB ----------------------------------------------------------------------------------------------------------
    def _flush(self) -> None:
        """Empties the TLB: KVM does so when user space replaces CR3 (``kvm_arch_vcpu_ioctl_set_sregs``)."""
        self.flush_wanted = False
        cr3 = int.from_bytes(self.vcpu.get_sregs()[abi.SREGS_CR3 : abi.SREGS_CR3 + 8], "little")
        self.vcpu.set_sregs(cr3=cr3 ^ 0x1000)
        self.vcpu.set_sregs(cr3=cr3)
        self._answer()

    def _answer(self) -> None:
        waiters, self.flush_waiters = self.flush_waiters, []
        for waiter in waiters:
            waiter.release()

    def _runs_unflushed(self) -> bool:
        return self.flush_wanted and self.in_guest

    def await_flush(self) -> None:
        """Returns when the VP has emptied its TLB or is outside the guest, which it will not enter before it has."""
        while self._runs_unflushed() and not self.stopping:
            waiter = allocate_lock()
            waiter.acquire()
            self.flush_waiters.append(waiter)
            if not self._runs_unflushed():
                return  # it was quicker
            self.vcpu.kick()
            waiter.acquire(timeout=_KICK_AGAIN_S)

    def _unexpected_exit(self, reason: int) -> None:
        """A guest that runs into what is no memory, or no instruction that KVM knows there, has come to its end."""
        if reason == abi.EXIT_INTERNAL_ERROR and self.vcpu.u32[8] == _SUBERROR_EMULATION:
            self.partition.end("triple-fault", self._where())
        else:
            super()._unexpected_exit(reason)

    # --- memory -------------------------------------------------------------------------------------------------------
    def _explained(self, error: OSError) -> bool:
        """Whether the VP wrote to a page of the hypervisor's that only it writes: it gets #GP."""
        if error.errno != EFAULT:
            return False
        overlays = self.partition.overlays
        with overlays.lock:
            try:
                access = memory_access.find(VpView(self, _Memory(self.partition)))  # type: ignore[arg-type]
            except AddressError:
                access = None
        if access is None or access.state != READ_ONLY:
            self._unexplained += 1
            return self._unexplained < _UNEXPLAINED_LIMIT
        self._unexplained = 0
        self.vcpu.inject_exception(_GENERAL_PROTECTION, 0)
        return True


class _Memory:
    """A guest's memory with the states that children's has."""

    __slots__ = ("_partition",)

    def __init__(self, partition: GuestPartition) -> None:
        self._partition = partition

    def state(self, gpa: int) -> int:
        overlay = self._partition.overlays.visible(gpa >> 12)
        if overlay is not None:
            return WRITABLE if overlay.writable else READ_ONLY
        return WRITABLE if self._partition.memory.contains(gpa & ~0xFFF, 4096) else UNMAPPED

    def page(self, gpn: int) -> memoryview | None:
        overlay = self._partition.overlays.visible(gpn)
        if overlay is not None:
            return overlay.view
        try:
            return self._partition.memory.view(gpn << 12, 4096)
        except AddressError:
            return None
