# SPDX-License-Identifier: Apache-2.0
"""An ordinary partition with a computer of its own: what a Hyper-V guest sees, without a root and a VMM in between."""

from __future__ import annotations

from ..kvm import abi, tsc_offset
from ..tlfs import cpuid, msrs, privileges
from . import calls
from .computer_partition import ComputerPartition
from .guest_overlay import GuestOverlayPages
from .guest_vp import GuestVp
from .hidden import HIDEABLE
from .hypercall_abi import write_page
from .hypercall_table import GUEST_TABLE
from .plain_interrupts import PlainInterrupts
from .synthetic_timers import GuestClock, TimerQueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..bus.address_space import GuestMemory
    from ..kvm.vcpu import Vcpu
    from .hypervisor import Hypervisor
    from .overlay import MovableOverlay

#: What an ordinary partition may do; the rest is the root's (contract/guest-interface 1.2).
GUEST_PRIVILEGES = (
    privileges.ACCESS_VP_RUNTIME
    | privileges.ACCESS_PARTITION_REFERENCE_COUNTER
    | privileges.ACCESS_SYNIC_REGS
    | privileges.ACCESS_SYNTHETIC_TIMER_REGS
    | privileges.ACCESS_INTR_CTRL_REGS
    | privileges.ACCESS_HYPERCALL_MSRS
    | privileges.ACCESS_VP_INDEX
    | privileges.ACCESS_RESET_REG
    | privileges.ACCESS_PARTITION_REFERENCE_TSC
    | privileges.ACCESS_GUEST_IDLE_REG
    | privileges.ACCESS_FREQUENCY_REGS
    | privileges.ACCESS_TSC_INVARIANT_CONTROLS
    | privileges.POST_MESSAGES
    | privileges.SIGNAL_EVENTS
    | privileges.EXTENDED_GVA_RANGES
    | privileges.ACCESS_VP_REGISTERS
    | privileges.FAST_HYPERCALL_OUTPUT
    | privileges.ENABLE_EXTENDED_HYPERCALLS
    | privileges.START_VIRTUAL_PROCESSOR
)
GUEST_FEATURES = (
    privileges.FEATURE_XMM_INPUT
    | privileges.FEATURE_GUEST_IDLE
    | privileges.FEATURE_FREQUENCY_MSRS
    | privileges.FEATURE_CRASH_MSRS
    | privileges.FEATURE_EXTENDED_GVA_RANGES
    | privileges.FEATURE_XMM_OUTPUT
    | privileges.FEATURE_SINT_POLLING
    | privileges.FEATURE_HYPERCALL_MSR_LOCK
    | privileges.FEATURE_DIRECT_TIMERS
)
GUEST_RECOMMENDATIONS = (
    cpuid.RECOMMEND_REMOTE_FLUSH
    | cpuid.RECOMMEND_RELAXED_TIMING
    | cpuid.RECOMMEND_NO_AUTO_EOI
    | cpuid.RECOMMEND_CLUSTER_IPI
    | cpuid.RECOMMEND_EX_PROCESSOR_MASKS
)
_LEAF_POWER, _INVARIANT_TSC = 0x80000007, 1 << 8
_SECOND_LEVEL = ("/sys/module/kvm_intel/parameters/ept", "/sys/module/kvm_amd/parameters/npt")
#: Hypercall and TSC page; VP assist page, SIMP, SIEFP and SIRBP of each VP.
_PAGES, _PAGES_PER_VP = 2, 4


def _has_second_level() -> bool:
    """Whether KVM uses the processor's second level of translation (EPT, NPT)."""
    for path in _SECOND_LEVEL:
        try:
            with open(path, encoding="ascii") as file:
                return file.read(1) in ("Y", "1")
        except OSError:
            continue
    return False


class GuestPartition(ComputerPartition):
    """The only partition of its hypervisor. ``vps`` is how many VPs it will have, ``address_bits`` its GPAs' width."""

    __slots__ = ("_hidden", "_second_level", "kvm_synic", "overlays", "timers")
    hypercall_page: MovableOverlay
    interrupts: PlainInterrupts
    timers: TimerQueue

    def __init__(
        self, hypervisor: Hypervisor, partition_id: int, memory: GuestMemory, vps: int, address_bits: int
    ) -> None:
        super().__init__(hypervisor, partition_id, memory)
        self.privileges = GUEST_PRIVILEGES
        self.features = GUEST_FEATURES
        self.recommendations = GUEST_RECOMMENDATIONS
        self.interrupts = PlainInterrupts(self.vm)
        self.overlays = GuestOverlayPages(self.vm, memory, _PAGES + _PAGES_PER_VP * vps, address_bits)
        self.hypercall_page = self.overlays.allocate(writable=False)
        write_page(self.hypercall_page.view)
        self.tsc_page = self.overlays.allocate(writable=False)
        #: recommendations that are not made
        self._hidden = 0
        self._second_level = _has_second_level()
        calls.load_guest()
        self.calls = GUEST_TABLE.calls
        #: whether this machine's KVM has a SynIC: it ends interrupts by itself, and its timers serve ours
        self.kvm_synic = hypervisor.kvm.capability(abi.CAP_HYPERV_SYNIC2) > 0

    def hide(self, names: tuple[str, ...]) -> None:
        """Starts the guest without parts of :data:`.hidden.HIDEABLE`; before :meth:`create_vps`."""
        for name in names:
            rights, features, recommendations = HIDEABLE[name]
            self.privileges &= ~rights
            self.features &= ~features
            self._hidden |= recommendations

    def probe(self, vcpu: Vcpu) -> None:
        """EOI is KVM's where that is possible.

        TSC_INVARIANT_CONTROL is there where KVM can hide the invariant TSC: it has a copy of the register, and hides
        only what its host has. Elsewhere CPUID shows it at all times, and there is nothing to control.
        """
        hides = any(
            leaf == _LEAF_POWER and edx & _INVARIANT_TSC
            for leaf, _index, _flags, _eax, _ebx, _ecx, edx in self.hypervisor.kvm.supported_cpuid()
        )
        if not hides or vcpu.try_msr(msrs.TSC_INVARIANT_CONTROL) is None:
            self.privileges &= ~privileges.ACCESS_TSC_INVARIANT_CONTROLS
        if self.privileges & privileges.ACCESS_INTR_CTRL_REGS:
            self.leave_eoi_to_kvm(vcpu)
        self.recommendations &= ~self._hidden

    def flush_all(self) -> bool:
        """Empties the TLBs of all VPs that run, and of the others before they run again; False where it cannot.

        The VP that asks has just been in the call page, so KVM has that page in the guest's second level of
        translation. When it is taken out there, KVM empties every TLB, the guest's own translations with it
        (``kvm_mmu_unmap_gfn_range``, ``kvm_flush_remote_tlbs``), and waits for processors in guest mode. No VP has to
        come out to us. Without that second level the guest's translations are KVM's own tables, which stay.
        """
        return self._second_level and self.overlays.untouch(self.hypercall_page)

    def create_vp(self, index: int, vcpu: Vcpu) -> GuestVp:
        """A VP whose TSC is that of VP 0."""
        if index == 0:
            self.timers = TimerQueue(self, GuestClock(self, vcpu))
        else:
            offset = tsc_offset.get(self.vps[0].vcpu)
            if offset is not None:
                tsc_offset.set(vcpu, offset)
        return GuestVp(self, index, vcpu)

    def stop(self) -> None:
        """Stops the VPs, then the timers."""
        super().stop()
        if self.vps:
            self.timers.stop()

    def crash(self, message: bytes) -> None:
        """A guest that reports a crash goes on (TLFS "Guest Crash Enlightenment"): what it said is kept."""
        self.crash_report = message or b"(the report has no text)"
        if self.trace is not None:
            self.trace.event("crash", message.decode("utf-8", "replace"))

    def close(self) -> None:
        """Frees the KVM machine and the overlay pages."""
        super().close()
        self.overlays.close()
