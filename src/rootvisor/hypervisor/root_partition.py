# SPDX-License-Identifier: Apache-2.0
"""The root partition: the computer's memory, ports and interrupts, and a VP per logical processor."""

from __future__ import annotations

import os

from ..kvm import abi
from ..tlfs import privileges
from ..tlfs.cpuid import RECOMMEND_APIC_MSRS, RECOMMEND_NO_AUTO_EOI, RECOMMEND_RELAXED_TIMING
from ..tlfs.msrs import PAGE_GPN_SHIFT
from .computer_partition import ComputerPartition
from .computer_vp import ComputerVp
from .interrupt_remapping import InterruptRemapping
from .overlay import OwnedPages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..bus.address_space import GuestMemory
    from ..kvm.vcpu import Vcpu
    from .hypervisor import Hypervisor

#: What a root partition may do: contract/root-partition section 0, and statistics for the mshv driver's pages.
ROOT_PRIVILEGES = (
    privileges.ACCESS_PARTITION_REFERENCE_COUNTER
    | privileges.ACCESS_SYNIC_REGS
    | privileges.ACCESS_INTR_CTRL_REGS
    | privileges.ACCESS_HYPERCALL_MSRS
    | privileges.ACCESS_VP_INDEX
    | privileges.ACCESS_RESET_REG
    | privileges.ACCESS_PARTITION_REFERENCE_TSC
    | privileges.ACCESS_FREQUENCY_REGS
    | privileges.ACCESS_TSC_INVARIANT_CONTROLS
    | privileges.CREATE_PARTITIONS
    | privileges.ACCESS_PARTITION_ID
    | privileges.ACCESS_MEMORY_POOL
    | privileges.POST_MESSAGES
    | privileges.SIGNAL_EVENTS
    | privileges.CREATE_PORT
    | privileges.CONNECT_PORT
    | privileges.ACCESS_STATS
    | privileges.CPU_MANAGEMENT
    | privileges.FAST_HYPERCALL_OUTPUT
)
ROOT_FEATURES = (
    privileges.FEATURE_FREQUENCY_MSRS
    | privileges.FEATURE_CRASH_MSRS
    | privileges.FEATURE_XMM_INPUT
    | privileges.FEATURE_XMM_OUTPUT
)


class RootVp(ComputerVp):
    """A VP of the root, whose pages lie in the block that belongs to the hypervisor."""

    __slots__ = ()
    partition: RootPartition

    def __init__(self, partition: RootPartition, index: int, vcpu: Vcpu) -> None:
        pages = partition.owned_pages
        super().__init__(partition, index, vcpu, tuple(pages.allocate() for _ in range(4)))

    def assist_page_changed(self) -> None:
        """The page's first word is KVM's, which says there that an interrupt needs no EOI. An INIT makes KVM forget it,
        and the kernel writes the MSR when the processor has started."""
        page = self.assist_page
        if self.partition.recommendations & RECOMMEND_APIC_MSRS:
            self.vcpu.set_msr(abi.MSR_KVM_PV_EOI_EN, page.gpn << PAGE_GPN_SHIFT | 1 if page.enabled else 0)

    def _run(self) -> None:
        """As any computer's VP. The only VP of a root lets whoever wakes it up finish first, where they share a
        processor: a child's VP that has told of an intercept goes to sleep next, and until it has, each hypercall of
        the root would meet it at the interpreter's lock. Several VPs wait for each other's answers to IPIs instead.
        """
        if len(self.partition.vps) == 1 and os.sched_getscheduler(0) == os.SCHED_OTHER:
            try:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            except OSError:  # a sandbox
                pass
        super()._run()


class RootPartition(ComputerPartition):
    """The partition that all others are children of."""

    __slots__ = ("owned_pages",)
    interrupts: InterruptRemapping

    def __init__(
        self, hypervisor: Hypervisor, partition_id: int, memory: GuestMemory, owned: tuple[int, int]
    ) -> None:
        super().__init__(hypervisor, partition_id, memory)
        self.privileges = ROOT_PRIVILEGES
        self.features = ROOT_FEATURES
        self.recommendations = RECOMMEND_RELAXED_TIMING | RECOMMEND_NO_AUTO_EOI
        self.interrupts = InterruptRemapping(self.vm)
        self.owned_pages = OwnedPages(memory, owned[0], owned[1])
        self.hypercall_page = self.owned_pages.allocate()
        self.tsc_page = self.owned_pages.allocate()

    def probe(self, vcpu: Vcpu) -> None:
        """Where the end of an interrupt is an exit, most of them are left out."""
        super().probe(vcpu)
        if self.privileges & privileges.ACCESS_INTR_CTRL_REGS and self.hypervisor.kvm.eoi_exits():
            self.leave_eoi_to_kvm(vcpu)

    def create_vp(self, index: int, vcpu: Vcpu) -> RootVp:
        """A VP with pages of its own."""
        return RootVp(self, index, vcpu)

    def watch_deposits(self) -> None:
        """Catches accesses of the root to memory that it has deposited (see :mod:`.deposit_watch`); before it runs."""
        from .deposit_watch import DepositWatch

        self.hypervisor.deposited.watch = DepositWatch(self)

    def close(self) -> None:
        """Frees the KVM machine; all threads have ended."""
        super().close()
        if self.hypervisor.deposited.watch is not None:
            self.hypervisor.deposited.watch.close()
