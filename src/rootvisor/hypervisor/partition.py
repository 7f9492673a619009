# SPDX-License-Identifier: Apache-2.0
"""A partition: privileges, memory, VPs, clocks, interrupts, and how it ends."""

from __future__ import annotations

import os
from _thread import allocate_lock, start_new_thread

from ..kvm.abi import MSR_MTRR_DEF_TYPE, MSR_TSC
from ..tlfs import msrs, privileges
from ..tlfs.cpuid import RECOMMEND_NO_AUTO_EOI, RECOMMEND_RELAXED_TIMING
from .address_space import MmioSpace, PortSpace
from .deposits import DepositPool
from .interrupt_remapping import InterruptRemapping
from .overlay import OwnedPages
from .partition_cpuid import partition_cpuid
from .reference_time import ReferenceTime
from .vp import VirtualProcessor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..trace.sink import Sink
    from .address_space import GuestMemory
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
    | privileges.ACCESS_STATS
    | privileges.CPU_MANAGEMENT
)
ROOT_FEATURES = (
    privileges.FEATURE_FREQUENCY_MSRS
    | privileges.FEATURE_CRASH_MSRS
    | privileges.FEATURE_XMM_INPUT
    | privileges.FEATURE_XMM_OUTPUT
)
#: KVM's local APIC timer counts nanoseconds.
APIC_HZ = 1_000_000_000
_MTRR_ENABLED_WRITE_BACK = 0xC06


class Partition:
    """Memory, ports and MMIO are wired by whoever builds the computer; then :meth:`create_vps`, :meth:`start`."""

    __slots__ = (
        "_end_lock", "apic_hz", "crash_parameters", "crash_report", "defect", "deposits", "detail", "ended",
        "ended_fd", "features", "guest_os_id", "hypercall_page", "hypervisor", "id", "interrupts", "memory", "mmio",
        "owned_pages", "ports", "privileges", "recommendations", "reference_time", "statistics", "trace",
        "tsc_invariant", "tsc_page", "vm", "vps",
    )  # fmt: skip

    def __init__(
        self, hypervisor: Hypervisor, partition_id: int, memory: GuestMemory, owned: tuple[int, int]
    ) -> None:
        self.hypervisor = hypervisor
        self.id = partition_id
        self.privileges = ROOT_PRIVILEGES
        self.features = ROOT_FEATURES
        self.recommendations = RECOMMEND_RELAXED_TIMING | RECOMMEND_NO_AUTO_EOI
        self.memory = memory
        self.ports = PortSpace()
        self.mmio = MmioSpace()
        self.vm = hypervisor.kvm.create_vm()
        self.vm.filter_msrs([(msrs.FIRST, msrs.COUNT)])
        self.vm.create_irqchip()
        self.interrupts = InterruptRemapping(self.vm)
        self.deposits = DepositPool()
        #: statistics pages mapped by the partition: (type, identity) -> page number
        self.statistics: dict[tuple[int, bytes], int] = {}
        self.owned_pages = OwnedPages(memory, owned[0], owned[1])
        self.hypercall_page = self.owned_pages.allocate()
        self.tsc_page = self.owned_pages.allocate()
        self.vps: list[VirtualProcessor] = []
        self.reference_time = ReferenceTime(1_000_000_000, 0)
        self.apic_hz = APIC_HZ
        self.guest_os_id = 0
        self.tsc_invariant = 0
        self.crash_parameters = [0] * 5
        self.crash_report = b""
        self.trace: Sink | None = None
        #: how it ended ("poweroff", "reset", "crash", "triple-fault", "host-error", ...), "" while it runs
        self.ended = ""
        self.detail = ""
        self.defect: BaseException | None = None
        self._end_lock = allocate_lock()
        #: an eventfd that becomes readable when the partition has ended
        self.ended_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def create_vps(self, count: int, xsave: bool) -> None:
        """Creates all VPs; the clock starts here."""
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
            vp = VirtualProcessor(self, index, vcpu)
            vp.trace = self.trace
            self.vps.append(vp)

    def start(self) -> None:
        """Starts a thread per VP; application processors wait for their start-up IPI inside KVM."""
        for vp in self.vps:
            vp.finished.acquire()
            start_new_thread(vp.thread, ())

    def stop(self) -> None:
        """Stops and joins every VP's thread."""
        for vp in self.vps:
            vp.stop()
        for vp in self.vps:
            while not vp.finished.acquire(timeout=0.2):
                vp.stop()  # a kick can meet the moment before KVM_RUN
            vp.finished.release()

    def end(self, how: str, detail: str = "") -> None:
        """Records how the partition ended (the first one counts), stops its VPs and signals ``ended_fd``."""
        with self._end_lock:
            if self.ended:
                return
            self.ended = how
            self.detail = detail
        for vp in self.vps:
            vp.stop()
        os.eventfd_write(self.ended_fd, 1)

    def end_with_defect(self, error: BaseException) -> None:
        """A defect of the hypervisor's own: the run ends with its traceback at hand."""
        self.defect = error
        self.end("host-error", f"internal error: {type(error).__name__}: {error}")

    def crash(self, message: bytes) -> None:
        """The partition reported a crash through the crash MSRs; ``message`` is its text, if it gave one."""
        self.crash_report = message
        if self.trace is not None:
            self.trace.event("crash", message.decode("utf-8", "replace"))
        self.end("crash", " ".join(f"P{n}={value:#x}" for n, value in enumerate(self.crash_parameters)))

    def vp_by_apic_id(self, apic_id: int) -> VirtualProcessor | None:
        """The VP with that APIC id."""
        for vp in self.vps:
            if vp.apic_id == apic_id:
                return vp
        return None

    def close(self) -> None:
        """Frees the KVM machine; all threads have ended."""
        self.vm.close()
        os.close(self.ended_fd)
