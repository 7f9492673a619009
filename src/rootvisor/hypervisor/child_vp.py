# SPDX-License-Identifier: Apache-2.0
"""A VP of a child partition: a thread that sleeps while the VP is suspended, and what each exit of the guest means.

Suspension follows the mshv driver (``drivers/hv/mshv_root_main.c``: ``mshv_run_vp_with_hyp_scheduler``,
``mshv_suspend_vp``). A VP runs while both suspend registers are 0. An intercept sets ``intercept_suspend`` and tells
the root, in one step under ``Hypervisor.lock``; ``explicit_suspend``, set by the root, wins over it: then nothing is
told, and the instruction runs again after the next resume.

While the VP is parked whoever holds ``Hypervisor.lock`` owns its registers: general and special registers and events
lie in the shared run page, where a change is marked with :meth:`ChildVp.mark_dirty`; the rest are vCPU ioctls.
"""

from __future__ import annotations

from _signal import (  # type: ignore[import-not-found, unused-ignore]
    SIG_BLOCK,
    SIGUSR1,
    pthread_sigmask,
    sigtimedwait,
)
from _thread import allocate_lock, get_ident, get_native_id, start_new_thread
from errno import EFAULT, EINVAL
from fcntl import ioctl
from time import pthread_getcpuclockid

from ..bus.address_space import write_access
from ..kvm import abi
from ..kvm.errors import ioctl_error
from ..tlfs import intercepts as tlfs
from ..tlfs import msrs, status
from ..tlfs.messages import MESSAGE_HEADER
from ..tlfs.msrs import PAGE_GPN_SHIFT
from ..x86.decoder import decode
from . import (
    emulated,
    hypercall_abi,
    init_watch,
    intercepts,
    memory_access,
    register_page,
    root_reaction,
    string_io,
    vp_registers,
)
from .child_memory import UNMAPPED, WRITABLE
from .errors import HvError, MemoryIntercept, UndefinedOpcode
from .init_watch import InitWatch
from .lazy_eoi import LazyEoi
from .memory_access import MemoryAccess
from .synthetic_msrs import synthetic_msrs
from .synthetic_timers import timers_of
from .translations import Translations
from .vp import VirtualProcessor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType

    from ..kvm.halted import HaltedState
    from ..kvm.vcpu import Vcpu
    from .child_partition import ChildPartition
    from .overlay import OverlayPage
    from .vp_registers import StoredState

_U64 = abi.RUN_SYNC // 8
_RAX = _U64
_RCX, _RDX, _RSI, _RDI = _U64 + 2, _U64 + 3, _U64 + 4, _U64 + 5
_RIP = _U64 + 16
_RFLAGS = _U64 + 17
_CS_BASE = (abi.SYNC_SREGS_AT + abi.SREGS_CS) // 8
_DIRTY = abi.RUN_DIRTY_REGS // 8
_REGS_BYTES = slice(abi.SYNC_REGS_AT, abi.SYNC_SREGS_AT)
_EVENTS_BYTES = slice(abi.SYNC_EVENTS_AT, abi.SYNC_EVENTS_AT + 64)
_EVENTS_FLAGS = (abi.SYNC_EVENTS_AT + abi.EVENTS_FLAGS) // 4
_EVENTS_ACTIVE = abi.SYNC_EVENTS_AT // 8
_SHADOW = abi.SYNC_EVENTS_AT + abi.EVENTS_SHADOW
_SIGUSR1_ONLY = (SIGUSR1,)
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_RFLAGS_DF = 1 << 10
_RFLAGS_RF = 1 << 16

#: How often the same instruction may fail without a page to blame and without getting on. A page that another VP has
#: just had mapped is such a case; more than a few in a row are not.
_LOST_LIMIT = 64
#: A waiting root VP looks again after this long, should a kick get lost after all.
_KICK_AGAIN_S = 0.05
#: Turns of an emulated instruction that KVM may need to be finished (a page of INS in pieces of eight bytes).
_FINISH_LIMIT = 1024

_MSR_FIRST, _MSR_LAST = msrs.FIRST, msrs.FIRST + msrs.COUNT - 1


#: What an exit comes to: on with the guest; parked; parked, and the root is to be told.
_GO_ON, _PARKED, _TELL = range(3)
_HYPERCALL = write_access(hypercall_abi.PORT, 4)


class ChildVp(VirtualProcessor):
    """VP ``index`` of ``child``. Created parked: ``explicit_suspend`` is set.

    ``running`` is true from the resume until the thread has parked again; only then may others touch registers.
    ``message_page`` and ``register_page`` are 4096-byte views of root RAM, or None. ``root_vp`` is the root's VP that
    resumed this one: messages prefer it.

    Under the root's scheduler: ``dispatched`` while a root VP is in DISPATCH_VP for it, ``yielding`` when it is to come
    out of the guest though nothing suspends it, ``blocked`` while the root waits for a message before the next
    DISPATCH_VP. ``halted()`` tells whether it sleeps in the guest.
    """

    __slots__ = (
        "_debugged", "_deferred", "_gate", "_init", "_init_asked", "_lazy_eoi", "_lost", "_lost_at", "_mapped",
        "_outside", "_port_rip", "_quiet", "_started", "_translation", "_translation_words", "_waiters", "_watch",
        "blocked", "dispatched", "explicit_suspend", "halted", "intercept_suspend", "lets_root_react", "message_page",
        "pages", "register_page", "root_vp", "running", "stored", "to_do", "told", "translations", "u32", "yielding",
    )  # fmt: skip
    partition: ChildPartition
    stored: StoredState

    def __init__(self, child: ChildPartition, index: int, vcpu: Vcpu, pages: tuple[OverlayPage, ...]) -> None:
        """``pages`` are the VP's assist page, SIMP, SIEFP and SIRBP (overlay pages of the child)."""
        super().__init__(child, index, vcpu, pages)
        self.pages = pages
        self.explicit_suspend = True
        self.intercept_suspend = False
        #: messages by type
        self.told: dict[int, int] = {}
        self.running = False
        self.dispatched = self.yielding = self.blocked = False
        self.halted: HaltedState | None = None
        self.message_page: memoryview | None = None
        self.register_page: memoryview | None = None
        self.root_vp: VirtualProcessor | None = None
        self.u32 = vcpu.u32
        #: held while the VP is parked
        self._gate = allocate_lock()
        self._gate.acquire()
        self._waiters: list[LockType] = []
        self._started = False
        #: the linear RIP of a port access that KVM would complete if it were resumed there, else -1
        self._port_rip = -1
        #: an intercept that does not come again by itself: told at the next resume
        self._deferred: tuple[int, bytes] | None = None
        #: the exceptions that KVM hands over to us
        self._debugged: frozenset[int] = frozenset()
        #: the root is to have time to act upon the last intercept before the guest goes on
        self.lets_root_react = False
        self._quiet = root_reaction.QUIET
        self._watch = root_reaction.Watch()
        #: the root was asked for memory: some may have come since
        self._mapped = False
        #: something has to be done before the VP runs: its thread looks at it
        self.to_do = False
        self._lost = 0
        #: the general registers at the last failure without a page to blame
        self._lost_at = b""
        self._init = InitWatch(vcpu)
        #: somebody wants to know of an INIT
        self._init_asked = False
        #: it is not in KVM_RUN, though it runs: it waits for another VP
        self._outside = False
        self._lazy_eoi = LazyEoi(vcpu)
        if child.lazy_eoi:
            vcpu.set_msr(abi.MSR_KVM_PV_EOI_EN, 0)  # a VP that was deleted may have left it
        if child.timers is not None:
            self.timers = timers_of(self, child.timers)
            self.synic.watch = lambda: child.timers.watch(self)
            self._msrs = synthetic_msrs(self)
        init_watch.guard(self._msrs, self.notice_init)
        self.translations = Translations(self)
        self._translation = bytearray(24)
        self._translation_words = memoryview(self._translation).cast("Q")
        vcpu.u64[abi.RUN_VALID_REGS // 8] = abi.SYNC_REGS | abi.SYNC_SREGS | abi.SYNC_EVENTS
        self.finished.acquire()

    def mark_dirty(self, blocks: int) -> None:
        """Blocks of the shared run page (abi.SYNC_*) that KVM is to take over before the VP runs."""
        self.u64[_DIRTY] |= blocks

    # --- suspension: callers hold Hypervisor.lock ---------------------------------------------------------------------
    def start(self) -> None:
        """The VP may be resumed from now on; its thread comes with the first resume."""

    def suspend(self) -> None:
        """EXPLICIT_SUSPEND := 1. Returns when the VP has left guest mode; lets Hypervisor.lock go meanwhile."""
        self.explicit_suspend = True
        self.await_parked()

    def clear_intercept_suspend(self, root_vp: VirtualProcessor | None = None) -> None:
        """INTERCEPT_SUSPEND := 0; resumes the VP if ``root_vp`` is given and EXPLICIT_SUSPEND is 0 too."""
        self.intercept_suspend = False
        if root_vp is not None:
            self.resume(root_vp)

    def clear_explicit_suspend(self, root_vp: VirtualProcessor) -> None:
        """EXPLICIT_SUSPEND := 0; resumes the VP if INTERCEPT_SUSPEND is 0 too."""
        self.explicit_suspend = False
        self.resume(root_vp)

    def resume(self, root_vp: VirtualProcessor) -> None:
        """Lets the VP run if neither register suspends it, with what the register page and others have changed."""
        if self.explicit_suspend or self.intercept_suspend or self.running or self.stopping:
            return
        self.root_vp = root_vp
        scheduler = self.partition.hypervisor.root_scheduler
        if scheduler is not None and not self.dispatched:
            scheduler.runnable(self)
            return
        if self.partition.held:  # ChildPartition.let_go comes here again
            return
        vp_registers.before_run(self)
        self.running = True
        if not self._started:
            self._started = True
            start_new_thread(self.thread, ())
        if (
            root_vp.vcpu.thread == get_ident()
        ):  # a hypercall, whose rest would keep the interpreter from the thread
            root_vp.waking.append(self._gate)
        else:
            self._gate.release()

    def stop_and_join(self) -> None:
        """Ends the thread, whatever the VP does. Lets Hypervisor.lock go meanwhile; the VP never runs again."""
        self.explicit_suspend = True
        self.stopping = True
        if not self._started:
            return
        lock = self.partition.hypervisor.lock
        try:
            self._gate.release()  # the thread does not look at it again, wherever it is
        except RuntimeError:
            pass  # it was on its way already
        held = lock._release_save() if lock._is_owned() else None  # type: ignore[attr-defined]
        try:
            while not self.finished.acquire(timeout=_KICK_AGAIN_S if self.running else -1):
                self.vcpu.kick()
            self.finished.release()
        finally:
            if held is not None:
                lock._acquire_restore(held)  # type: ignore[attr-defined]

    def may_be_awake(self) -> None:
        """The root has changed registers or state of a VP that sleeps, under its own scheduler."""
        scheduler = self.partition.hypervisor.root_scheduler
        if scheduler is not None and self.blocked:
            scheduler.poke()

    def await_park(self, waiter: LockType) -> None:
        """Lets go of ``waiter`` when the VP parks."""
        self._waiters.append(waiter)

    def await_parked(self) -> None:
        """Returns when the VP has left guest mode for EXPLICIT_SUSPEND or because its partition is held; lets
        Hypervisor.lock go meanwhile."""
        partition = self.partition
        lock = partition.hypervisor.lock
        while self.running and (self.explicit_suspend or partition.held):
            waiter = allocate_lock()
            waiter.acquire()
            self._waiters.append(waiter)
            self.vcpu.kick()
            partition.pinned += 1
            held = lock._release_save()  # type: ignore[attr-defined]
            try:
                waiter.acquire(timeout=_KICK_AGAIN_S)
            finally:
                lock._acquire_restore(held)  # type: ignore[attr-defined]
                partition.pinned -= 1

    def _park(self) -> None:
        """The VP is out of guest mode and stays so. Its own thread, with the lock."""
        self.running = False
        self._let_go()

    def _let_go(self) -> None:
        if self._waiters:
            for waiter in self._waiters:
                waiter.release()
            self._waiters = []

    def deliver_intercept(self, message_type: int, payload: bytes, again: bool = True) -> None:
        """Tells the root of an intercept and parks. The VP's own thread, without the lock; see :meth:`_intercept`."""
        with self.partition.hypervisor.lock:
            outcome = self._intercept(message_type, payload, again)
        if outcome == _TELL:
            self.partition.hypervisor.messages.post_opaque(self.partition, self)

    def _intercept(self, message_type: int, payload: bytes, again: bool = True) -> int:
        """Parks with a message for the root; the lock is held. Gives _TELL: the root is to be told once it is not.

        While EXPLICIT_SUSPEND is set, or without a message page, there is no message, and _PARKED comes of it: an
        intercept that comes ``again`` when the instruction is run is forgotten, another one waits for the resume.
        """
        page = self.message_page
        if page is None:  # the root takes the VP apart
            self.explicit_suspend = True
        if self.explicit_suspend or page is None:
            if not again:
                self._deferred = message_type, payload
                self.to_do = True
            self._park()
            return _PARKED
        MESSAGE_HEADER.pack_into(page, 0, message_type, len(payload), 0, self.partition.id)
        page[16 : 16 + len(payload)] = payload
        register_page.refresh(self)
        self.told[message_type] = self.told.get(message_type, 0) + 1
        self.intercept_suspend = True
        self._park()
        return _TELL

    # --- INIT, EOI, timers --------------------------------------------------------------------------------------------
    def notice_init(self) -> None:
        """See :func:`.init_watch.reset`: an INIT by a sibling is known from here on. Hypervisor.lock is held; its own
        thread, or the VP is not in KVM_RUN. A VP without siblings is not asked each time: who would send it."""
        if len(self.partition.vps) > 1 and self._init.happened():
            self._lazy_eoi.forget()
            init_watch.reset(self)

    def reset_synthetic(self) -> None:
        """The root has just sent an INIT."""
        self._lazy_eoi.forget()
        init_watch.reset(self)

    def settle(self, caller: VirtualProcessor) -> None:
        """Before ``caller`` sends something here: an INIT that the VP has had, or is about to have, is known then.

        Lets Hypervisor.lock go meanwhile.
        """
        partition = self.partition
        if len(partition.vps) < 2:
            return
        if caller is self:
            self.notice_init()
            return
        lock = partition.hypervisor.lock
        self._init_asked = self.to_do = True
        if isinstance(caller, ChildVp):
            caller._outside = True
        partition.pinned += 1
        try:
            while self._init_asked and self.running and not self._outside and not self.stopping:
                waiter = allocate_lock()
                waiter.acquire()
                self._waiters.append(waiter)
                self.vcpu.kick()
                held = lock._release_save()  # type: ignore[attr-defined]
                try:
                    waiter.acquire(timeout=_KICK_AGAIN_S)
                finally:
                    lock._acquire_restore(held)  # type: ignore[attr-defined]
        finally:
            partition.pinned -= 1
            if isinstance(caller, ChildVp):
                caller._outside = False
        if self._init_asked and not self.stopping:
            self._meet_init()

    def _meet_init(self) -> None:
        """An INIT that waits happens now. Hypervisor.lock is held, and the VP is not in KVM_RUN."""
        self._init_asked = False
        vp_registers.mp_state(self)
        self.notice_init()
        self._let_go()

    def assist_page_changed(self) -> None:
        """KVM gets to know where it may say that an interrupt needs no EOI: the first word of the assist page."""
        if not self.partition.lazy_eoi:
            return
        if not self.running or self.vcpu.thread == get_ident():
            self._lazy_eoi.place(self.assist_page)
        else:
            self.to_do = True
            self.vcpu.kick()

    def look(self) -> bool:
        """Lets messages that wait go on, if they can; whether to look again. No lock is held."""
        if self.stopping or not self.synic.waits():
            return False
        assert self.partition.timers is not None
        self.partition.timers.retry(self)
        return self.synic.waits()

    def interrupt(self, vector: int) -> None:
        """Delivers a fixed, edge-triggered interrupt to this VP's local APIC."""
        super().interrupt(vector)
        scheduler = self.partition.hypervisor.root_scheduler
        if scheduler is not None:
            scheduler.poke()

    # --- the thread ---------------------------------------------------------------------------------------------------
    def thread(self) -> None:
        """Body of the VP's thread; then lets go of ``finished``.

        A failure on the host's side ends neither the root nor the thread, which somebody may wait for: from then on
        every resume gives an UNRECOVERABLE_EXCEPTION.
        """
        self.vcpu.thread = get_ident()
        self.thread_id = get_native_id()
        self.cpu_clock = pthread_getcpuclockid(get_ident())
        try:
            self._run()
        except Exception as error:
            self.partition.vp_failed(self, error)
            self._stand_still()
        finally:
            self.vcpu.thread = 0
            self.running = False
            self.finished.release()

    def _stand_still(self) -> None:
        partition = self.partition
        while not self.stopping:
            with partition.hypervisor.lock:
                outcome = _PARKED
                if self.running:
                    outcome = self._intercept(tlfs.UNRECOVERABLE_EXCEPTION, intercepts.plain(self))
            if outcome == _TELL:
                partition.hypervisor.messages.post_opaque(partition, self)
            if not self._resumed():
                return

    def _run(self) -> None:
        vcpu = self.vcpu
        # SIGUSR1 stays blocked outside KVM_RUN: a kick then ends KVM_RUN and nothing else. It never reaches Python's
        # handler, whose wake-up descriptor would get the main thread going.
        pthread_sigmask(SIG_BLOCK, _SIGUSR1_ONLY)
        vcpu.ioctl(abi.KVM_SET_SIGNAL_MASK, bytearray((8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)))
        fd = vcpu.fd
        run = abi.KVM_RUN
        u32, u64 = self.u32, self.u64
        exits = self.exits
        partition = self.partition
        interrupts = partition.interrupts
        lock = partition.hypervisor.lock
        while self._resumed():
            if self._port_rip >= 0:
                if self._port_rip == u64[_CS_BASE] + u64[_RIP] & _MASK64:  # it is to happen again
                    self._finish()
                self._port_rip = -1
            outcome = self._enter() if self.to_do else _GO_ON
            while not outcome:
                if interrupts.pending:
                    with lock:
                        payload = interrupts.before_entry(self)
                        if payload is not None:
                            outcome = self._intercept(tlfs.SYNIC_SINT_DELIVERABLE, payload, again=False)
                            continue
                try:
                    ioctl(fd, run)  # two arguments: a third costs 18 us (contract/kvm-mapping 1.1)
                except InterruptedError:
                    outcome = self._interrupted()
                    continue
                except BlockingIOError:
                    continue  # it waited for INIT or SIPI, which have come
                except OSError as error:
                    with lock:
                        outcome = self._run_failed(error)
                    continue
                reason = u32[2]
                exits[reason] += 1
                with lock:
                    outcome = self._port() if reason == 2 else self._exit(reason)
            if outcome == _TELL:
                partition.hypervisor.messages.post_opaque(partition, self)

    def _resumed(self) -> bool:
        """Sleeps until the VP is resumed; False if the thread is to end."""
        if not self.stopping:
            self._gate.acquire()
        return not self.stopping

    # What follows is the VP's own thread, with Hypervisor.lock held unless said otherwise. Exits give _GO_ON (zero),
    # _PARKED, or _TELL: parked, and the root is to be told.
    def _exit(self, reason: int) -> int:
        """The rarer exits."""
        u32 = self.u32
        if reason == abi.EXIT_MMIO:
            return self._mmio()
        if reason == abi.EXIT_X86_RDMSR or reason == abi.EXIT_X86_WRMSR:
            return self._msr(u32[11], u32[10], reason == abi.EXIT_X86_WRMSR)
        if reason == abi.EXIT_IOAPIC_EOI:
            payload = self.partition.interrupts.ioapic_eoi(self, self.u8[abi.RUN_UNION])
            return self._intercept(tlfs.X64_APIC_EOI, payload, again=False) if payload is not None else _GO_ON
        if reason == abi.EXIT_SHUTDOWN:  # KVM has put the processor into its state after INIT
            return self._intercept(tlfs.UNRECOVERABLE_EXCEPTION, intercepts.plain(self), again=False)
        if reason == abi.EXIT_FAIL_ENTRY:
            return self._intercept(tlfs.INVALID_VP_REGISTER_VALUE, intercepts.invalid_register(self))
        if reason == abi.EXIT_DEBUG:
            return self._debug()
        if reason == abi.EXIT_INTERNAL_ERROR:
            return self._memory_fault()
        if reason in (abi.EXIT_INTR, abi.EXIT_IRQ_WINDOW_OPEN):
            return _GO_ON
        return self._give_up(f"exit {abi.EXIT_NAMES.get(reason, reason)}")

    def _give_up(self, why: str) -> int:
        """Nothing that a guest should be able to cause; the root may look at the VP, reset or destroy it."""
        if self.trace is not None:
            self.trace.event("child-vp", f"partition {self.partition.id}, {self._where()}: {why}")
        return self._intercept(tlfs.UNRECOVERABLE_EXCEPTION, intercepts.plain(self))

    def _where(self) -> str:
        return f"VP {self.index} at RIP {self.u64[_RIP]:#x}, RSP {self.u64[_U64 + 6]:#x}"

    def _enter(self) -> int:
        """The rarer things to do before the guest goes on; without the lock."""
        self.to_do = False
        partition = self.partition
        if self._debugged is not partition.intercepts.exceptions:
            self._debug_exceptions()
        if self._init_asked:
            with partition.hypervisor.lock:
                self._meet_init()
        if partition.lazy_eoi:
            self._lazy_eoi.place(self.assist_page)
        if self.lets_root_react:
            self.lets_root_react = False
            self.let_root_react()
        if self._mapped:
            self._mapped = False
            partition.memory.prefault(self)  # without the lock: it may take milliseconds
        if self._deferred is not None:
            message_type, payload = self._deferred
            self._deferred = None
            with partition.hypervisor.lock:
                return self._intercept(message_type, payload, again=False)
        return _GO_ON

    def let_root_react(self) -> None:
        """See :mod:`.root_reaction`; without the lock."""
        partition = self.partition
        root_reaction.wait(
            [vp.thread_id for vp in partition.hypervisor.root.vps],
            lambda: self.explicit_suspend or self.stopping or bool(partition.held),
            self._quiet,
        )

    def _command(self) -> None:
        """The guest has written what the root may have to act upon at once."""
        self._watch.command()
        self._quiet = root_reaction.QUIET
        self.lets_root_react = self.to_do = True

    def _poll(self) -> None:
        """The guest waits for what comes of it."""
        self._quiet = root_reaction.QUIET_AT_POLL
        self.lets_root_react = self.to_do = True

    def _interrupted(self) -> int:
        """KVM_RUN gave EINTR; without the lock."""
        self.u8[abi.RUN_IMMEDIATE_EXIT] = 0
        sigtimedwait(_SIGUSR1_ONLY, 0)
        partition = self.partition
        if not (self.explicit_suspend or self.stopping or partition.held or self.yielding):
            return self._enter() if self.to_do else _GO_ON
        with partition.hypervisor.lock:
            if not (self.explicit_suspend or self.stopping or partition.held or self.yielding):
                return _GO_ON
            self._park()
            return _PARKED

    def _run_failed(self, error: OSError) -> int:
        """KVM_RUN failed."""
        if error.errno == EFAULT:
            self.exits[abi.EXIT_MEMORY_FAULT] += 1
            return self._memory_fault()
        if error.errno == EINVAL:
            return self._intercept(tlfs.INVALID_VP_REGISTER_VALUE, intercepts.invalid_register(self))
        raise ioctl_error(abi.KVM_RUN, error) from error

    # --- help for the exits -------------------------------------------------------------------------------------------
    def _linear_rip(self) -> int:
        return self.u64[_CS_BASE] + self.u64[_RIP] & _MASK64

    def ask_kvm(self, linear: int) -> int:
        """The GPA of a linear address as KVM sees it, or -1. Only while no register is marked as changed."""
        words = self._translation_words
        words[0] = linear
        try:
            ioctl(self.vcpu.fd, abi.KVM_TRANSLATE, self._translation)
        except OSError as error:
            raise ioctl_error(abi.KVM_TRANSLATE, error) from error
        return words[1] if words[2] & 0xFF else -1

    def _finish(self) -> None:
        """Lets KVM complete what it has begun, and puts the registers back to what they are in the run page."""
        u8 = self.u8
        registers = bytes(u8[_REGS_BYTES])
        events = bytes(u8[_EVENTS_BYTES])
        for _ in range(_FINISH_LIMIT):
            u8[abi.RUN_IMMEDIATE_EXIT] = 1
            try:
                ioctl(self.vcpu.fd, abi.KVM_RUN)
            except InterruptedError:
                break
            except OSError as error:
                if error.errno != EFAULT:
                    break  # registers that KVM refuses: the next KVM_RUN says it again
        u8[abi.RUN_IMMEDIATE_EXIT] = 0
        u8[_REGS_BYTES] = registers
        u8[_EVENTS_BYTES] = events
        self.u32[_EVENTS_FLAGS] &= ~abi.EVENTS_VALID_NMI_PENDING
        self.mark_dirty(abi.SYNC_REGS | abi.SYNC_EVENTS)

    # --- ports and hypercalls -----------------------------------------------------------------------------------------
    def _port(self) -> int:
        """KVM_EXIT_IO.

        IN and OUT: RIP is at the instruction, and KVM completes it only if it finds RIP there again.
        """
        u64 = self.u64
        access = u64[4]  # direction u8 (1: out), size u8, port u16, count u32
        linear = u64[_CS_BASE] + u64[_RIP] & _MASK64
        if access == _HYPERCALL and linear & 0xFFF == hypercall_abi.OUT_OFFSET and self._in_call_page(linear):
            return self._hypercall(linear)
        code = memory_access.fetch(self, linear)
        instruction = decode(code, memory_access.code_bits(self))
        write = access & 0xFF
        if (
            instruction is None
            or instruction.io != 1 + write
            or instruction.string
            or (write and self._is_other_data(access) and string_io.just_done(self, linear))
        ):
            return self._string_port(access, linear, code)
        self._port_rip = linear
        if access & 0xFFFF == root_reaction.OUT_WORD and self._watch.is_command(access >> 16 & 0xFFFF):
            self._command()
        elif self._watch.left and self._watch.polls(linear, access >> 16 & 0xFFFF, bool(write)):
            self._poll()
        return self._intercept(
            tlfs.X64_IO_PORT_INTERCEPT,
            intercepts.io_port(
                self, access >> 16 & 0xFFFF, bool(write), access >> 8 & 0xFF, instruction.length, code
            ),
        )

    def _is_other_data(self, access: int) -> bool:
        """Whether the data of a write to a port are not RAX's: then it is no OUT."""
        at = self.u64[5]
        size = access >> 8 & 0xFF
        value = self.u8[at] if size == 1 else self.vcpu.u16[at >> 1] if size == 2 else self.u32[at >> 2]
        return bool(value ^ self.u64[_RAX] & (1 << size * 8) - 1)

    def _string_port(self, access: int, linear: int, code: bytes) -> int:
        write = access & 0xFF
        size = access >> 8 & 0xFF
        if write:
            instruction = string_io.rewind_outs(self, linear, code)
            if instruction is None:  # its bytes are gone; what comes next comes by itself
                return _GO_ON
            code = memory_access.fetch(self, self._linear_rip())
        else:
            instruction = decode(code, memory_access.code_bits(self))
            if instruction is None or instruction.io != 1 or instruction.string != size:
                self._finish()  # changed or taken away since it was fetched: once more
                return _GO_ON
            string_io.offer_memory(self, instruction)
            self._finish()
        info = size | tlfs.IO_STRING | (tlfs.IO_REP if instruction.rep else 0)
        return self._intercept(
            tlfs.X64_IO_PORT_INTERCEPT,
            intercepts.io_port(self, access >> 16 & 0xFFFF, bool(write), info, instruction.length, code),
        )

    def _in_call_page(self, linear: int) -> bool:
        page = self.partition.hypercall_page
        return page.enabled and self.translations.find(linear) >> 12 == page.gpn

    def _hypercall(self, linear: int) -> int:
        installed = self.partition.intercepts
        before = bytes(self.u8[_REGS_BYTES]) if installed.any_hypercall else b""
        try:
            hypercall_abi.execute(self)
        except UndefinedOpcode:
            self._inject_undefined_opcode()
            return _GO_ON
        except MemoryIntercept as need:
            self._port_rip = linear
            return self._memory_message(
                MemoryAccess(
                    need.gpa, 0, 0, tlfs.ACCESS_WRITE if need.write else tlfs.ACCESS_READ, need.state
                )
            )
        if before and installed.wants(self._call_code(before), self.u64[_RAX] & 0xFFFF):
            self.u8[_REGS_BYTES] = before
            self._port_rip = linear
            return self._intercept(tlfs.HYPERCALL_INTERCEPT, intercepts.hypercall(self))
        return _GO_ON

    def _call_code(self, registers: bytes) -> int:
        """The code in a control word: RCX in 64-bit mode, else EDX:EAX."""
        at = 16 if memory_access.code_bits(self) == 64 else 0
        return int.from_bytes(registers[at : at + 2], "little")

    def operand_page(self, gpn: int, write: bool) -> memoryview:
        """A page of hypercall operands; never remembered, because the root may take it away."""
        memory = self.partition.memory
        page: memoryview | None = None if write else memory.page(gpn)
        if page is not None:
            return page
        state = memory.state(gpn << PAGE_GPN_SHIFT) if gpn < 1 << memory.width - PAGE_GPN_SHIFT else UNMAPPED
        if write and state == WRITABLE:
            return memory.view(gpn << PAGE_GPN_SHIFT, 4096)
        if state == UNMAPPED:
            raise HvError(status.INVALID_ALIGNMENT)
        raise MemoryIntercept(gpn << PAGE_GPN_SHIFT, write, state)

    # --- memory -------------------------------------------------------------------------------------------------------
    def _memory_fault(self) -> int:
        """KVM_RUN failed with EFAULT, or KVM's emulator could not go on."""
        found = memory_access.find(self)
        if found is None:
            self.translations.forget()  # should one be wrong after all
            # The same instruction with other registers is one that got on: a loop, or what fills page after page.
            registers = bytes(self.u8[_REGS_BYTES])
            if registers != self._lost_at:
                self._lost = 0
                self._lost_at = registers
            self._lost += 1
            if self._lost < _LOST_LIMIT:
                return _GO_ON
            self._lost_at = b""
            return self._give_up("memory that cannot be named, or an instruction that KVM cannot emulate")
        self._lost_at = b""
        if found.access == tlfs.ACCESS_WRITE and found.operand is not None:
            doorbells = self.partition.doorbells
            value = memory_access.store_value(self, found)
            if value is not None and doorbells.match(found.gpa, found.size, value):
                self._complete_store(found)
                return _GO_ON
        return self._memory_message(found)

    def _complete_store(self, found: MemoryAccess) -> None:
        """The write has had its effect: on to the next instruction, or to the next item of a REP STOS."""
        instruction = found.instruction
        assert instruction is not None
        u64 = self.u64
        if not instruction.string or string_io.step_forward(self, instruction):
            u64[_RIP] = u64[_RIP] + instruction.length & memory_access.RIP_MASK[memory_access.code_bits(self)]
        u64[_RFLAGS] &= ~_RFLAGS_RF
        dirty = abi.SYNC_REGS
        if self.u8[_SHADOW]:
            self.u8[_SHADOW] = 0
            self.u32[_EVENTS_FLAGS] &= ~abi.EVENTS_VALID_NMI_PENDING
            dirty |= abi.SYNC_EVENTS
        self.mark_dirty(dirty)

    def _memory_message(self, found: MemoryAccess) -> int:
        code = found.code or memory_access.fetch(self, self._linear_rip())
        length = found.instruction.length if found.instruction is not None else 0
        if found.state != UNMAPPED:
            self._mapped = self.to_do = True
        elif found.size == 1 and found.access == tlfs.ACCESS_WRITE:
            self._command()
        elif self._watch.left and self._watch.polls(
            self._linear_rip(), found.gpa, found.access == tlfs.ACCESS_WRITE
        ):
            self._poll()
        return self._intercept(
            found.message_type,
            intercepts.memory(self, found.access, found.info, found.gva, found.gpa, length, code),
        )

    def _mmio(self) -> int:
        """An access that KVM's own emulator found forbidden: operands of INS and OUTS, GPAs beyond the address width.

        KVM has carried out what it could of a write, and waits for the data of a read.
        """
        gpa = self.u64[4]
        write = bool(self.u8[52])
        if write:
            emulated.rewind(self, gpa)
        else:
            self.u64[5] = 0
            self._finish()
        found = emulated.access(self, gpa, write)
        if found is None:  # allowed by now
            return _GO_ON
        return self._memory_message(found)

    # --- MSRs and debug exceptions ------------------------------------------------------------------------------------
    def _msr(self, number: int, why: int, write: bool) -> int:
        """An MSR that KVM leaves to us: synthetic, unknown, or with an intercept."""
        installed = self.partition.intercepts
        if why == abi.MSR_EXIT_REASON_FILTER and number in init_watch.NUMBERS:
            why = abi.MSR_EXIT_REASON_UNKNOWN  # KVM's own
        mask = tlfs.MASK_WRITE if write else tlfs.MASK_READ
        known = number in self._msrs
        wanted = installed.msrs.get(number, 0)
        if not known and why == abi.MSR_EXIT_REASON_UNKNOWN:
            wanted |= installed.unknown_msrs
        if wanted & mask:
            self.u8[abi.RUN_UNION] = 0
            self._finish()
            return self._intercept(tlfs.X64_MSR_INTERCEPT, intercepts.msr(self, number, write))
        if known or _MSR_FIRST <= number <= _MSR_LAST:
            if write:
                self._write_msr(number, self.u64[6])
            else:
                self._read_msr(number)
        elif why == abi.MSR_EXIT_REASON_FILTER:  # only its other direction has an intercept
            self._pass_msr(number, write)
        else:
            ignore = why == abi.MSR_EXIT_REASON_UNKNOWN and self.partition.unimplemented_msr_action
            self.u8[abi.RUN_UNION] = 0 if ignore else 1
            if not write:
                self.u64[6] = 0
        return _GO_ON

    def _pass_msr(self, number: int, write: bool) -> None:
        if write:
            done = self.vcpu.set_msr(number, self.u64[6])
        else:
            value = self.vcpu.try_msr(number)
            self.u64[6] = value or 0
            done = value is not None
        self.u8[abi.RUN_UNION] = 0 if done else 1

    def _debug_exceptions(self) -> None:
        """Hands #BP and #DB to us, or back to the guest."""
        self._debugged = wanted = self.partition.intercepts.exceptions
        control = 0
        state = bytearray(72)
        if intercepts.BREAKPOINT in wanted:
            control |= abi.GUESTDBG_ENABLE | abi.GUESTDBG_USE_SW_BP
        if intercepts.DEBUG in wanted:
            # KVM loads the debug registers given here instead of the guest's.
            control |= abi.GUESTDBG_ENABLE | abi.GUESTDBG_USE_HW_BP
            registers = self.vcpu.debug_registers()
            state[8:40] = registers[0:32]
            state[64:72] = registers[abi.DEBUGREGS_DR7 : abi.DEBUGREGS_DR7 + 8]
        state[0:4] = control.to_bytes(4, "little")
        self.vcpu.ioctl(abi.KVM_SET_GUEST_DEBUG, state)

    def _debug(self) -> int:
        """KVM_EXIT_DEBUG: exception u32, pc u64, DR6, DR7."""
        vector = self.u32[8]
        software = vector == intercepts.BREAKPOINT
        code = memory_access.fetch(self, self._linear_rip())
        instruction = decode(code, memory_access.code_bits(self)) if software else None
        return self._intercept(
            tlfs.X64_EXCEPTION_INTERCEPT,
            intercepts.exception(
                self, vector, 0 if software else self.u64[6], software,
                instruction.length if instruction is not None else 0, code,
            ),
        )  # fmt: skip
