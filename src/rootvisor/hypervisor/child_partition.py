# SPDX-License-Identifier: Apache-2.0
"""A child partition: a KVM machine of its own, built and driven by the root's hypercalls (docs/develop/children.md)."""

from __future__ import annotations

import sys
from time import monotonic_ns

from ..kvm.abi import MSR_TSC
from ..tlfs import msrs, status
from ..tlfs.cpuid import RECOMMEND_NO_AUTO_EOI, RECOMMEND_RELAXED_TIMING
from . import child_features, vp_registers, vp_state
from .child_cpuid import CpuidResults
from .child_interrupts import ChildInterrupts
from .child_memory import ChildMemory
from .child_overlay import OverlayPages
from .child_time import ChildTime
from .child_vp import ChildVp
from .doorbells import Doorbells
from .errors import HvError
from .intercepts import InstalledIntercepts
from .partition import Partition

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..kvm.vcpu import Vcpu
    from .hypervisor import Hypervisor

#: Life: created, initialized, finalized; a deleted partition is gone from Hypervisor.partitions.
CREATED, INITIALIZED, FINALIZED = range(3)
#: The mshv driver cannot name a VP from here on.
VP_LIMIT = 256


class ChildPartition(Partition):
    """``flags`` are those of HVCALL_CREATE_PARTITION, ``disabled_features`` its masks: banks 0 and 1, XSAVE.

    ``unimplemented_msr_action`` is what an unknown MSR does: 0 raises #GP, 1 reads as zero and ignores writes.
    """

    __slots__ = (
        "_began_at", "_spare", "_synthetic_features", "_table", "cpuid_results", "disabled_features", "doorbells",
        "flags", "intercepts", "interrupts", "overlay_pages", "processors_per_socket", "purging_until", "state", "time",
        "unimplemented_msr_action",
    )  # fmt: skip
    memory: ChildMemory  # type: ignore[assignment]
    vps: list[ChildVp]  # type: ignore[assignment]

    def __init__(
        self, hypervisor: Hypervisor, partition_id: int, flags: int, disabled_features: tuple[int, int, int]
    ) -> None:
        vm = hypervisor.kvm.create_vm()
        try:
            memory = ChildMemory(vm, hypervisor)
        except BaseException:
            vm.close()
            raise
        super().__init__(hypervisor, partition_id, memory, vm)  # type: ignore[arg-type]
        self.flags = flags
        self.disabled_features = disabled_features
        self.state = CREATED
        self.recommendations = RECOMMEND_RELAXED_TIMING | RECOMMEND_NO_AUTO_EOI
        self._synthetic_features = 0
        self._table: dict[int, ChildVp] = {}
        #: processors whose VP was deleted: KVM keeps them until the machine goes
        self._spare: dict[int, Vcpu] = {}
        self._began_at = 0
        self.unimplemented_msr_action: int = 0
        self.processors_per_socket: int = 0
        #: 0.0: not finalized; then until when FINALIZE waits for the root to take a last message; -1.0: it has
        self.purging_until = 0.0
        try:
            memory.bind(hypervisor.root.memory)
            vm.filter_msrs([(msrs.FIRST, msrs.COUNT)])
            self.interrupts = ChildInterrupts(self)
            self.interrupts.create_irqchip()
            self.doorbells = Doorbells(hypervisor)
            self.intercepts = InstalledIntercepts()
            self.cpuid_results = CpuidResults()
            self.time: ChildTime = ChildTime(self)
            self.overlay_pages = OverlayPages(self)
            self.hypercall_page = self.overlay_pages.allocate(writable=False)
            self.tsc_page = self.overlay_pages.allocate(writable=False)
        except BaseException:
            vm.close()
            memory.close()
            raise

    # --- features -------------------------------------------------------------------------------------------------
    @property
    def synthetic_features(self) -> int:
        """Property SYNTHETIC_PROC_FEATURES as it was set."""
        return self._synthetic_features

    @synthetic_features.setter
    def synthetic_features(self, value: int) -> None:
        self._synthetic_features = value
        self.privileges = child_features.privileges_of(value)
        self.features = child_features.features_of(value)

    @property
    def time_frozen(self) -> bool:
        """Property TIME_FREEZE."""
        return self.time.frozen

    def host_reference_time(self) -> int:
        """Reference time by the host's clock, for when every VP runs."""
        return (monotonic_ns() - self._began_at) // 100

    def require(self, state: int) -> None:
        """HV_STATUS_INVALID_PARTITION_STATE unless the partition is in ``state``."""
        if self.state != state:
            raise HvError(status.INVALID_PARTITION_STATE)

    # --- VPs ------------------------------------------------------------------------------------------------------
    def vp(self, index: int) -> ChildVp:
        """The VP with that index. HV_STATUS_INVALID_VP_INDEX."""
        vp = self._table.get(index)
        if vp is None:
            raise HvError(status.INVALID_VP_INDEX)
        return vp

    def create_vp(self, index: int) -> ChildVp:
        """A VP in its state after reset, parked. INVALID_VP_INDEX: it exists, or the index is 256 or above."""
        if index in self._table or index >= VP_LIMIT:
            raise HvError(status.INVALID_VP_INDEX)
        vcpu = self._spare.pop(index, None) or self.vm.create_vcpu(index)
        pages = tuple(self.overlay_pages.allocate() for _ in range(4))
        vp = ChildVp(self, index, vcpu, pages)
        vp.trace = self.trace
        vp_registers.reset(vp)
        vp.created = True
        self._table[index] = vp
        self.vps.append(vp)
        self.vps.sort(key=lambda other: other.index)
        if len(self.vps) == 1:
            self._began_at = monotonic_ns()
            self.time.begin()
        else:
            self._join_clock(vp)
        vp.start()
        return vp

    def _join_clock(self, vp: ChildVp) -> None:
        """A later VP has the TSC of the others (KVM starts each at its own 0 when the machine is old enough)."""
        for other in self.vps:
            if other is not vp and not other.running:
                vp.vcpu.set_msr(MSR_TSC, other.vcpu.get_msr(MSR_TSC))
                return

    def delete_vp(self, index: int) -> None:
        """Stops the VP and forgets it."""
        vp = self.vp(index)
        del self._table[index]
        self.vps.remove(vp)
        vp.stop_and_join()
        vp_state.unmap_pages(vp)
        self._spare[index] = vp.vcpu

    # --- the end --------------------------------------------------------------------------------------------------
    def stopping(self) -> None:
        """A failure on the host's side: the child's VPs stand still, its siblings and the root go on."""
        sys.stderr.write(f"rootvisor: child partition {self.id} stopped: {self.detail or self.ended}\n")
        for vp in self.vps:
            vp.stopping = True

    def finalize(self) -> None:
        """Stops all VPs and frees everything but the deposited pages. Lets Hypervisor.lock go meanwhile."""
        self.state = FINALIZED
        vps = list(self.vps)
        for vp in vps:
            vp.stop_and_join()
        self.hypervisor.ports.remove_partition(self.id)
        for vp in vps:
            vp_state.unmap_pages(vp)
        self._release()

    def _release(self) -> None:
        self._table.clear()
        self.vps.clear()
        self._spare.clear()
        self.vm.close()
        self.overlay_pages.close()
        self.memory.close()
        self.hypervisor.forget_statistics(self.id)

    def close(self) -> None:
        """The hypervisor ends; the root's VPs have stopped. Safe in every state."""
        if self.state != FINALIZED:
            for vp in list(self.vps):
                vp.stop_and_join()
            self._release()
            self.state = FINALIZED
