# SPDX-License-Identifier: Apache-2.0
"""A child partition: a KVM machine of its own, built and driven by the root's hypercalls (docs/develop/children.md)."""

from __future__ import annotations

import sys
from time import monotonic

from ..kvm.errors import KvmError
from ..tlfs import msrs, privileges, status
from ..tlfs.cpuid import (
    HARDWARE_FEATURES,
    RECOMMEND_APIC_MSRS,
    RECOMMEND_NO_AUTO_EOI,
    RECOMMEND_RELAXED_TIMING,
)
from . import child_features, init_watch, vp_registers, vp_state
from .child_cpuid import CpuidResults
from .child_interrupts import ChildInterrupts
from .child_memory import ChildMemory
from .child_overlay import OverlayPages
from .child_time import ChildClock, ChildTime
from .child_vp import ChildVp
from .doorbells import Doorbells
from .errors import HvError, HypervisorError, Restart
from .intercepts import InstalledIntercepts
from .partition import Partition
from .synthetic_timers import TimerQueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..kvm.vcpu import Vcpu
    from .hypervisor import Hypervisor
    from .overlay import MovableOverlay
    from .vp import VirtualProcessor

#: Life: created, initialized, stopping while FINALIZE works, finalized; a deleted one is gone from
#: Hypervisor.partitions.
CREATED, INITIALIZED, STOPPING, FINALIZED = range(4)
#: The mshv driver cannot name a VP from here on, and interrupts name it by eight bits.
VP_LIMIT = 256
#: VP assist page, SIMP, SIEFP, SIRBP.
_PAGES_PER_VP = 4
#: FINALIZE waits this long for a message that the root does not take; its SINT0 is lost anyway then.
_PURGE_S = 10.0


class ChildPartition(Partition):
    """``flags`` are those of HVCALL_CREATE_PARTITION, ``disabled_features`` its masks: banks 0 and 1, XSAVE.

    ``unimplemented_msr_action`` is what an unknown MSR does: 0 raises #GP, 1 reads as zero and ignores writes.
    ``held``: no VP enters the guest (:meth:`hold`). ``pinned``: calls that have let Hypervisor.lock go and still need
    the VPs. ``timers``: the queue of the synthetic timers, if VPs have them. ``lazy_eoi``: KVM tells in the assist
    pages which interrupts need no EOI.
    """

    __slots__ = (
        "_prepared", "_purge_until", "_reported", "_spare", "_synthetic_features", "_table", "cpuid_results",
        "disabled_features", "doorbells", "flags", "held", "intercepts", "interrupts", "lazy_eoi", "overlay_pages",
        "pinned", "processors_per_socket", "root", "state", "time", "timers", "unimplemented_msr_action",
    )  # fmt: skip
    memory: ChildMemory
    vps: list[ChildVp]  # type: ignore[assignment]
    time: ChildTime
    processors_per_socket: int
    unimplemented_msr_action: int

    def __init__(
        self,
        hypervisor: Hypervisor,
        partition_id: int,
        vp: VirtualProcessor,
        flags: int,
        disabled_features: tuple[int, int, int],
    ) -> None:
        """``vp`` of the root makes the call. KvmError or OSError, with nothing left behind, when the host has no room
        for another machine."""
        vm = hypervisor.kvm.create_vm()
        memory: ChildMemory | None = None
        try:
            memory = ChildMemory(vm, hypervisor)
            super().__init__(hypervisor, partition_id, memory, vm)  # type: ignore[arg-type]
            self.root = hypervisor.root
            self.trace = self.root.trace
            self.flags = flags
            self.disabled_features = disabled_features
            self.state = CREATED
            self.recommendations = RECOMMEND_RELAXED_TIMING | RECOMMEND_NO_AUTO_EOI
            self.hypervisor_present = False
            self.last_leaf = HARDWARE_FEATURES
            self.max_vps = VP_LIMIT
            self._synthetic_features = 0
            self._table: dict[int, ChildVp] = {}
            #: processors of deleted VPs: KVM keeps them until the machine goes
            self._spare: dict[int, Vcpu] = {}
            #: until when FINALIZE waits for the root to take a last message
            self._purge_until = 0.0
            self._reported = False
            self.held = 0
            self.pinned = 0
            self.unimplemented_msr_action = 0
            self.processors_per_socket = 0
            memory.bind(self.root.memory)
            self._prepared = False
            self.timers: TimerQueue | None = None
            self.lazy_eoi = False
            self.interrupts = ChildInterrupts(self)
            self.interrupts.create_irqchip()
            self.doorbells = Doorbells(hypervisor)
            self.intercepts = InstalledIntercepts()
            self.filter_msrs()
            self.cpuid_results = CpuidResults()
            self.time = ChildTime(self, vp)
            self.overlay_pages = OverlayPages(self)
            self.hypercall_page = self.overlay_pages.allocate(writable=False)
            self.tsc_page = self.overlay_pages.allocate(writable=False)
        except BaseException:
            vm.close()
            if memory is not None:
                memory.close()
            raise

    # --- features -----------------------------------------------------------------------------------------------------
    @property
    def synthetic_features(self) -> int:
        """Property SYNTHETIC_PROC_FEATURES as it was set."""
        return self._synthetic_features

    @synthetic_features.setter
    def synthetic_features(self, value: int) -> None:
        self._synthetic_features = value
        if not self.hypervisor.child_timers:
            value &= ~child_features.TIMERS
        self.hypervisor_present = child_features.hypervisor_present(value)
        self.privileges = child_features.privileges_of(value)
        self.features = child_features.features_of(value)

    def filter_msrs(self) -> None:
        """Which MSRs leave KVM: the hypervisor's registers, KVM's own, which are nobody's here, and those with an
        intercept. EOI stays where assist pages make most EOIs needless."""
        self.vm.filter_msrs(
            [(msrs.FIRST, msrs.COUNT), *init_watch.KVMS, *((one, 1) for one in self.intercepts.msrs)],
            allowed=msrs.EOI if self.lazy_eoi else None,
        )

    def _prepare(self, vcpu: Vcpu, root_vp: VirtualProcessor) -> None:
        """Before the first VP, whose processor is ``vcpu``: what is to be offered, by what this KVM has. KvmError."""
        if self._prepared:
            return
        if self.privileges & privileges.ACCESS_SYNTHETIC_TIMER_REGS and self.timers is None:
            self.timers = TimerQueue(self, ChildClock(self, self.hypervisor.clock(root_vp)))
            if self.time.frozen:
                self.timers.hold()
        if (
            self.privileges & privileges.ACCESS_INTR_CTRL_REGS
            and self.hypervisor.kvm.eoi_exits()
            and not vcpu.set_msr(msrs.EOI, 1 << 32)
            and vcpu.set_msr(msrs.EOI, 0)
        ):
            self.lazy_eoi = True
            self.recommendations |= RECOMMEND_APIC_MSRS
            self.filter_msrs()
        self._prepared = True

    @property
    def time_frozen(self) -> bool:
        """Property TIME_FREEZE."""
        return self.time.frozen

    def require(self, state: int) -> None:
        """HV_STATUS_INVALID_PARTITION_STATE unless the partition is in ``state``."""
        if self.state != state:
            raise HvError(status.INVALID_PARTITION_STATE)

    def require_machine(self) -> None:
        """HV_STATUS_INVALID_PARTITION_STATE once FINALIZE has begun: KVM's machine is going, or gone."""
        if self.state > INITIALIZED:
            raise HvError(status.INVALID_PARTITION_STATE)

    # --- VPs ----------------------------------------------------------------------------------------------------------
    def vp(self, index: int) -> ChildVp:
        """The VP with that index. HV_STATUS_INVALID_VP_INDEX."""
        vp = self._table.get(index)
        if vp is None:
            raise HvError(status.INVALID_VP_INDEX)
        return vp

    def create_vp(self, index: int, root_vp: VirtualProcessor) -> ChildVp:
        """A VP in its state after reset, parked; ``root_vp`` makes the call.

        HvError: INVALID_PARTITION_STATE unless initialized; INVALID_VP_INDEX when it exists or the index is 256 or
        above. KvmError or OSError when the host has no room, with nothing changed.
        """
        self.require(INITIALIZED)
        if index in self._table or index >= VP_LIMIT:
            raise HvError(status.INVALID_VP_INDEX)
        vcpu = self._spare.pop(index, None) or self.vm.create_vcpu(index)
        pages: list[MovableOverlay] = []
        try:
            self._prepare(vcpu, root_vp)
            while len(pages) < _PAGES_PER_VP:
                pages.append(self.overlay_pages.allocate())
            vp = ChildVp(self, index, vcpu, tuple(pages))
            vp.trace = self.trace
            vp_registers.reset(vp)
            self.time.join(vp, root_vp)
        except BaseException:
            self._spare[index] = vcpu
            for page in pages:
                self.overlay_pages.free(page)
            raise
        vp.created = True
        if self.hypervisor.root_scheduler is not None:
            from ..kvm.halted import HaltedState

            vp.halted = HaltedState(vcpu)
        self._table[index] = vp
        self.vps.append(vp)
        self.vps.sort(key=lambda other: other.index)
        vp.start()
        return vp

    def delete_vp(self, index: int) -> None:
        """Stops the VP and forgets it; its state pages are back in the pool. HV_STATUS_INVALID_VP_INDEX.

        Lets Hypervisor.lock go meanwhile.
        """
        self.require(INITIALIZED)
        vp = self.vp(index)
        self.pinned += 1
        try:
            vp.stop_and_join()
        finally:
            self.pinned -= 1
        if self._table.get(index) is not vp:  # somebody else was quicker
            raise HvError(status.INVALID_VP_INDEX)
        if self.pinned:  # somebody waits for this very VP, perhaps
            raise Restart
        del self._table[index]
        self.vps.remove(vp)
        self._retire(vp)
        for page in vp.pages:
            self.overlay_pages.free(page)  # type: ignore[arg-type]
        self.cpuid_results.forget(index)
        self._spare[index] = vp.vcpu

    def hold(self) -> None:
        """No VP is in guest mode when it returns, and none enters it until :meth:`let_go`. Suspend registers stay as
        they are. Lets Hypervisor.lock go meanwhile.

        HV_STATUS_INVALID_PARTITION_STATE when the partition has ended meanwhile.
        """
        self.held += 1
        for vp in list(self.vps):
            vp.await_parked()
        if self.state > INITIALIZED:
            self.held -= 1
            raise HvError(status.INVALID_PARTITION_STATE)

    def let_go(self) -> None:
        """VPs that are not suspended run on."""
        self.held -= 1
        if not self.held:
            for vp in self.vps:
                if vp.root_vp is not None:
                    vp.resume(vp.root_vp)

    def _retire(self, vp: ChildVp) -> None:
        """The VP has stopped for good: its timers are off, its state pages are back in the pool."""
        if self.timers is not None:
            self.timers.forget(vp)
        vp_state.unmap_pages(vp)
        if vp.halted is not None:
            vp.halted.close()
        if self.hypervisor.root_scheduler is not None:
            self.hypervisor.root_scheduler.forget(vp)

    # --- failures on the host's side ----------------------------------------------------------------------------------
    def vp_failed(self, vp: ChildVp, error: BaseException) -> None:
        """The thread of ``vp`` cannot go on. Its siblings and the root do; the first failure is told on stderr."""
        if not isinstance(error, KvmError | HypervisorError) and self.defect is None:
            self.defect = error
        if self._reported:
            return
        self._reported = True
        what = str(error) if isinstance(error, KvmError | HypervisorError) else f"internal error: {error!r}"
        self.end("host-error", f"VP {vp.index} of partition {self.id} stopped: {what}")

    def stopping(self) -> None:
        """A child that ended by itself is reported; it stays until the root takes it apart."""
        sys.stderr.write(f"rootvisor: {self.detail or self.ended}\n")
        if self.trace is not None:
            self.trace.event("child-ended", f"partition {self.id}: {self.ended} {self.detail}")

    # --- the end ------------------------------------------------------------------------------------------------------
    def stop(self) -> None:
        """Ends the threads of all VPs. Lets Hypervisor.lock go meanwhile, if it is held."""
        self.pinned += 1
        try:
            for vp in list(self.vps):
                vp.stop_and_join()
        finally:
            self.pinned -= 1

    def finalize(self) -> None:
        """No VP, mapping, port, connection or message of the partition is left, and nothing of the host's but the
        deposited pages. HV_STATUS_INVALID_PARTITION_STATE unless initialized.

        Lets Hypervisor.lock go while VPs stop. Restart: another call still needs them, or a root VP's slot still holds
        a message, whose handler knows the partition only until FINALIZE has returned (contract T3).
        """
        if self.state != STOPPING:
            self.require(INITIALIZED)
        self.state = STOPPING
        self.stop()
        if self.state != STOPPING:  # another call has done the rest
            raise HvError(status.INVALID_PARTITION_STATE)
        if self.pinned:
            raise Restart
        self.hypervisor.ports.remove_partition(self.id)
        if not self.hypervisor.messages.purge(self.id):
            now = monotonic()
            self._purge_until = self._purge_until or now + _PURGE_S
            if now < self._purge_until:
                raise Restart
        self.close()

    def close(self) -> None:
        """Frees everything of the host's; all threads have ended, or are ended now. Safe in every state."""
        if self.state == FINALIZED:
            return
        self.stop()
        self.state = FINALIZED
        for vp in self.vps:
            self._retire(vp)
        if self.timers is not None:
            self.timers.stop()
        self._table.clear()
        self.vps.clear()
        self._spare.clear()
        self.vm.close()
        self.overlay_pages.close()
        self.memory.close()
