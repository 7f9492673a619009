# SPDX-License-Identifier: Apache-2.0
"""A partition that has a computer of its own: ports, device memory, interrupts, and a thread per VP from the start.

The root is one, and so is a guest that is started without a root (:mod:`.guest_partition`). Children belong to a VMM in
the root and have none.
"""

from __future__ import annotations

import os
from _thread import start_new_thread

from ..bus.address_space import MmioSpace, PortSpace
from ..kvm.abi import MSR_MTRR_DEF_TYPE, MSR_TSC
from ..tlfs import cpuid, msrs
from . import init_watch
from .partition import Partition
from .partition_cpuid import partition_cpuid
from .reference_time import ReferenceTime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..bus.address_space import GuestMemory
    from ..kvm.vcpu import Vcpu
    from .computer_vp import ComputerVp
    from .hypervisor import Hypervisor
    from .interrupt_remapping import InterruptRemapping
    from .plain_interrupts import PlainInterrupts

_MTRR_ENABLED_WRITE_BACK = 0xC06
#: What leaves to :mod:`.synthetic_msrs`: the hypervisor's registers, and KVM's own, which are nobody's here.
FILTERED_MSRS = ((msrs.FIRST, msrs.COUNT), init_watch.MSRS)


class ComputerPartition(Partition):
    """Memory, ports and MMIO are wired by whoever builds the computer; then :meth:`create_vps`, :meth:`start`."""

    __slots__ = ("ended_fd", "interrupts", "mmio", "ports", "xsave")
    interrupts: InterruptRemapping | PlainInterrupts

    def __init__(self, hypervisor: Hypervisor, partition_id: int, memory: GuestMemory) -> None:
        super().__init__(hypervisor, partition_id, memory, hypervisor.kvm.create_vm())
        self.ports = PortSpace()
        self.mmio = MmioSpace()
        self.vm.filter_msrs(FILTERED_MSRS)
        self.vm.create_irqchip()
        #: whether this machine's KVM can show XSAVE to partitions (kvm.selftest)
        self.xsave = False
        #: an eventfd that becomes readable when the partition has ended
        self.ended_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def create_vp(self, index: int, vcpu: Vcpu) -> ComputerVp:
        """The VP of this kind of partition on a processor whose CPUID is set."""
        raise NotImplementedError

    def probe(self, vcpu: Vcpu) -> None:
        """What this KVM has decides what is offered; ``vcpu`` is the first processor, without CPUID yet.

        With "Hv#1" KVM hides the invariant TSC until its own copy of TSC_INVARIANT_CONTROL is set
        (kvm_hv_invtsc_suppressed). A root has it from the start.
        """
        vcpu.set_msr(msrs.TSC_INVARIANT_CONTROL, 1)

    def leave_eoi_to_kvm(self, vcpu: Vcpu) -> None:
        """EOI stays in KVM if its register there has the reserved bits (Linux 6.0): then a kernel does well to use it,
        and with it the assist page that makes most EOIs needless."""
        if vcpu.set_msr(msrs.EOI, 1 << 32) or not vcpu.set_msr(msrs.EOI, 0):
            return
        self.recommendations |= cpuid.RECOMMEND_APIC_MSRS
        self.vm.filter_msrs(FILTERED_MSRS, allowed=msrs.EOI)

    def create_vps(self, count: int, xsave: bool) -> None:
        """Creates all VPs; the clock starts here."""
        self.xsave = xsave
        supported = self.hypervisor.kvm.supported_cpuid()
        for index in range(count):
            vcpu = self.vm.create_vcpu(index)
            if index == 0:
                self.probe(vcpu)
            vcpu.set_cpuid(partition_cpuid(self, supported, index, count, xsave))
            # Without write-back MTRRs Linux maps our pages uncached (pat_x_mtrr_type).
            vcpu.set_msr(MSR_MTRR_DEF_TYPE, _MTRR_ENABLED_WRITE_BACK)
            if index == 0:
                self.reference_time = ReferenceTime(vcpu.tsc_khz() * 1000, vcpu.get_msr(MSR_TSC))
                self.reference_time.write_page(self.tsc_page.view)
            vp = self.create_vp(index, vcpu)
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

    def stopping(self) -> None:
        """Stops the VPs and signals ``ended_fd``."""
        for vp in self.vps:
            vp.stop()
        os.eventfd_write(self.ended_fd, 1)

    def close(self) -> None:
        """Frees the KVM machine; all threads have ended."""
        super().close()
        os.close(self.ended_fd)
