# SPDX-License-Identifier: Apache-2.0
"""The root partition: the computer's memory, ports and interrupts, and a VP per logical processor."""

from __future__ import annotations

import os
from _thread import start_new_thread

from ..bus.address_space import MmioSpace, PortSpace
from ..kvm.abi import MSR_MTRR_DEF_TYPE, MSR_TSC
from ..tlfs import msrs, privileges
from ..tlfs.cpuid import RECOMMEND_NO_AUTO_EOI, RECOMMEND_RELAXED_TIMING
from .interrupt_remapping import InterruptRemapping
from .overlay import OwnedPages
from .partition import Partition
from .partition_cpuid import partition_cpuid
from .reference_time import ReferenceTime
from .root_vp import RootVp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..bus.address_space import GuestMemory
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
)
ROOT_FEATURES = (
    privileges.FEATURE_FREQUENCY_MSRS
    | privileges.FEATURE_CRASH_MSRS
    | privileges.FEATURE_XMM_INPUT
    | privileges.FEATURE_XMM_OUTPUT
)
_MTRR_ENABLED_WRITE_BACK = 0xC06


class RootPartition(Partition):
    """Memory, ports and MMIO are wired by whoever builds the computer; then :meth:`create_vps`, :meth:`start`."""

    __slots__ = ("ended_fd", "interrupts", "mmio", "owned_pages", "ports", "xsave")

    def __init__(
        self, hypervisor: Hypervisor, partition_id: int, memory: GuestMemory, owned: tuple[int, int]
    ) -> None:
        super().__init__(hypervisor, partition_id, memory, hypervisor.kvm.create_vm())
        self.privileges = ROOT_PRIVILEGES
        self.features = ROOT_FEATURES
        self.recommendations = RECOMMEND_RELAXED_TIMING | RECOMMEND_NO_AUTO_EOI
        self.ports = PortSpace()
        self.mmio = MmioSpace()
        self.vm.filter_msrs([(msrs.FIRST, msrs.COUNT)])
        self.vm.create_irqchip()
        self.interrupts = InterruptRemapping(self.vm)
        self.owned_pages = OwnedPages(memory, owned[0], owned[1])
        self.hypercall_page = self.owned_pages.allocate()
        self.tsc_page = self.owned_pages.allocate()
        #: whether this machine's KVM can show XSAVE to partitions (kvm.selftest)
        self.xsave = False
        #: an eventfd that becomes readable when the partition has ended
        self.ended_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def create_vps(self, count: int, xsave: bool) -> None:
        """Creates all VPs; the clock starts here."""
        self.xsave = xsave
        supported = self.hypervisor.kvm.supported_cpuid()
        for index in range(count):
            vcpu = self.vm.create_vcpu(index)
            vcpu.set_cpuid(partition_cpuid(self, supported, index, count, xsave))
            # With "Hv#1" KVM hides the invariant TSC until its own copy of this MSR is set (kvm_hv_invtsc_suppressed).
            vcpu.set_msr(msrs.TSC_INVARIANT_CONTROL, 1)
            # Without write-back MTRRs Linux maps our pages uncached (pat_x_mtrr_type).
            vcpu.set_msr(MSR_MTRR_DEF_TYPE, _MTRR_ENABLED_WRITE_BACK)
            if index == 0:
                self.reference_time = ReferenceTime(vcpu.tsc_khz() * 1000, vcpu.get_msr(MSR_TSC))
                self.reference_time.write_page(self.tsc_page.view)
            vp = RootVp(self, index, vcpu)
            vp.trace = self.trace
            self.vps.append(vp)

    def start(self) -> None:
        """Starts a thread per VP; application processors wait for their start-up IPI inside KVM."""
        for vp in self.vps:
            vp.finished.acquire()
            start_new_thread(vp.thread, ())

    def stop(self) -> None:
        """Stops and joins every VP's thread, then those of the children."""
        for vp in self.vps:
            vp.stop()
        for vp in self.vps:
            while not vp.finished.acquire(timeout=0.2):
                vp.stop()  # a kick can meet the moment before KVM_RUN
            vp.finished.release()
        self.hypervisor.stop_children()

    def watch_deposits(self) -> None:
        """Catches accesses of the root to memory that it has deposited (see :mod:`.deposit_watch`); before it runs."""
        from .deposit_watch import DepositWatch

        self.hypervisor.deposited.watch = DepositWatch(self)

    def stopping(self) -> None:
        """Stops the VPs and signals ``ended_fd``."""
        for vp in self.vps:
            vp.stop()
        os.eventfd_write(self.ended_fd, 1)

    def close(self) -> None:
        """Frees the KVM machine; all threads have ended."""
        super().close()
        os.close(self.ended_fd)
        if self.hypervisor.deposited.watch is not None:
            self.hypervisor.deposited.watch.close()
