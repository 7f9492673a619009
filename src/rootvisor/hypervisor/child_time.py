# SPDX-License-Identifier: Apache-2.0
"""The clock of a child: TSC and reference time, and what it means that they stand still (property TIME_FREEZE).

All clocks hang on the host's TSC. The TSC of a child is the host's less what it was when the partition was made and
less the time that it was frozen for; KVM is told the difference (``KVM_VCPU_TSC_OFFSET``), so that all VPs agree to the
cycle. Reference time is a linear function of that TSC and never jumps with it. The host's TSC is read through a VP of
the root, which cannot be in guest mode while it makes a hypercall: nobody waits for a running child.

While time is frozen no VP runs: who is resumed starts with the thaw. KVM's local APIC timers go on in the host; a
thaw sets each back to what it had left when time stopped. What falls short: the tick of a periodic timer that was due
but not yet delivered at that moment is lost. Synthetic timers are due by reference time, and nothing of them is lost.
"""

from __future__ import annotations

from ..kvm import tsc_offset
from ..kvm.abi import MSR_TSC
from .errors import Restart
from .reference_time import ReferenceTime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .child_partition import ChildPartition
    from .child_vp import ChildVp
    from .synthetic_timers import IdleProcessor
    from .vp import VirtualProcessor

_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_MSR_TSC_DEADLINE = 0x6E0
# the local APIC's page
_LVT_TIMER, _CURRENT_COUNT = 0x320, 0x390
_TIMER_MODE = 3 << 17
_TSC_DEADLINE_MODE = 2 << 17


def host_tsc(vp: VirtualProcessor) -> int:
    """The host's TSC, in units of the partitions' TSC. ``vp`` is not in KVM_RUN.

    On hosts that do not tell offsets (before 5.16) it is the VP's own TSC: of no meaning, but as good a clock.
    """
    return vp.vcpu.get_msr(MSR_TSC) - (tsc_offset.get(vp.vcpu) or 0) & _MASK64


class ChildTime:
    """Under Hypervisor.lock. Begins at 0, when the partition is made by ``vp`` of the root."""

    __slots__ = ("_base", "_changing", "_child", "_stopped_at", "frozen")

    def __init__(self, child: ChildPartition, vp: VirtualProcessor) -> None:
        self._child = child
        #: the child's TSC less the host's
        self._base = -host_tsc(vp) & _MASK64
        self.frozen = False
        #: the host's TSC when time was frozen
        self._stopped_at = 0
        #: a freeze waits for VPs
        self._changing = False
        child.reference_time = ReferenceTime(child.hypervisor.root.reference_time.tsc_hz, 0)

    def _tsc(self, vp: VirtualProcessor) -> int:
        return self._base + (self._stopped_at if self.frozen else host_tsc(vp)) & _MASK64

    def by(self, clock: IdleProcessor) -> int:
        """Reference time in 100 ns; any thread, and no processor of the root's or the child's is asked."""
        tsc = self._stopped_at if self.frozen else clock.host_tsc()
        return self._child.reference_time.at(self._base + tsc & _MASK64)

    def join(self, new: ChildVp, vp: VirtualProcessor) -> None:
        """``new`` gets the TSC of the partition; ``vp`` is the root's that makes the call."""
        if not tsc_offset.set(new.vcpu, self._base):
            new.vcpu.set_msr(MSR_TSC, host_tsc(vp) + self._base & _MASK64)

    # --- reference time -----------------------------------------------------------------------------------------------
    def now(self, vp: VirtualProcessor) -> int:
        """Reference time in 100 ns; ``vp`` is the root's that asks."""
        return self._child.reference_time.at(self._tsc(vp))

    def set(self, value: int, vp: VirtualProcessor) -> None:
        """Reference time is ``value`` now; the guest's page follows."""
        self._set_reference(value, self._tsc(vp))
        if self._child.timers is not None and not self.frozen:
            self._child.timers.go_on()

    def _set_reference(self, value: int, tsc: int) -> None:
        time = self._child.reference_time
        time.offset = value - (tsc * time.scale >> 64)
        page = self._child.tsc_page
        if page.enabled:
            time.sequence = time.sequence + 1 & 0xFFFFFFFF
            time.write_page(page.view)

    # --- freezing -----------------------------------------------------------------------------------------------------
    def freeze(self, vp: VirtualProcessor) -> None:
        """Time stands when it returns. Lets Hypervisor.lock go while VPs leave guest mode; Restart when another call
        does the same."""
        if self._changing:
            raise Restart
        if self.frozen:
            return
        self._changing = True
        try:
            self._child.hold()
        finally:
            self._changing = False
        if self._child.timers is not None:
            self._child.timers.hold()
        self._stopped_at = host_tsc(vp)
        self.frozen = True
        for one in self._child.vps:
            stored = one.stored
            if stored.timer_count is None:
                lapic = one.vcpu.lapic()
                stored.timer_count = int.from_bytes(lapic[_CURRENT_COUNT : _CURRENT_COUNT + 4], "little")

    def thaw(self, vp: VirtualProcessor) -> None:
        """Time goes on where it stood, and with it the VPs that are not suspended. Restart as :meth:`freeze`."""
        if self._changing:
            raise Restart
        if not self.frozen:
            return
        gone = host_tsc(vp) - self._stopped_at
        self._base = self._base - gone & _MASK64
        self.frozen = False
        for one in self._child.vps:
            self._continue(one, gone)
        if self._child.timers is not None:
            self._child.timers.go_on()
        self._child.let_go()

    def _continue(self, vp: ChildVp, gone: int) -> None:
        vcpu = vp.vcpu
        deadline = vcpu.try_msr(_MSR_TSC_DEADLINE)
        offset = tsc_offset.get(vcpu)
        if offset is None:
            vcpu.set_msr(MSR_TSC, vcpu.get_msr(MSR_TSC) - gone & _MASK64)
        else:
            tsc_offset.set(vcpu, offset - gone & _MASK64)
        lapic = vcpu.lapic()
        if int.from_bytes(lapic[_LVT_TIMER : _LVT_TIMER + 4], "little") & _TIMER_MODE == _TSC_DEADLINE_MODE:
            if deadline:
                vcpu.set_msr(_MSR_TSC_DEADLINE, deadline)
        elif vp.stored.timer_count:
            # KVM starts the timer with this count. One that had run out is left alone: its interrupt may be pending.
            lapic[_CURRENT_COUNT : _CURRENT_COUNT + 4] = vp.stored.timer_count.to_bytes(4, "little")
            vcpu.set_lapic(lapic)

    # --- the register TSC of a parked VP ------------------------------------------------------------------------------
    def get_tsc(self, vp: ChildVp) -> int:
        """The VP's TSC: what its guest would read."""
        offset = tsc_offset.get(vp.vcpu) if self.frozen else None
        if offset is None:
            return vp.vcpu.get_msr(MSR_TSC)
        return self._stopped_at + offset & _MASK64

    def set_tsc(self, vp: ChildVp, value: int) -> None:
        """What the VP's guest reads from now, or from the thaw on.

        While time is frozen this is how a VMM restores a partition, VP by VP: the value is the partition's TSC then,
        and reference time stays what it is, for the hypervisor and for the guest that computes it from its TSC.
        """
        if not self.frozen:
            vp.vcpu.set_msr(MSR_TSC, value)
            return
        if not tsc_offset.set(vp.vcpu, value - self._stopped_at & _MASK64):
            vp.vcpu.set_msr(MSR_TSC, value)
        reference = self._child.reference_time.at(self._base + self._stopped_at & _MASK64)
        self._base = value - self._stopped_at & _MASK64
        self._set_reference(reference, value)


class ChildClock:
    """The clock of a child's synthetic timers."""

    __slots__ = ("_clock", "_time")

    def __init__(self, child: ChildPartition, clock: IdleProcessor) -> None:
        self._time = child.time
        self._clock = clock

    def now(self) -> int:
        """Reference time, of a partition whose time is not changing."""
        return self._time.by(self._clock)

    def close(self) -> None:
        """The processor is the hypervisor's."""
