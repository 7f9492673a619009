# SPDX-License-Identifier: Apache-2.0
"""The clock of a child: reference time and TSC, and what freezing them means (property TIME_FREEZE).

While time is frozen the reference time stands, and with the thaw every VP's TSC goes on where it was. The timer of
KVM's local APIC goes on; its expiry is delivered when the VP runs.
"""

from __future__ import annotations

from ..kvm.abi import MSR_TSC
from ..kvm.errors import KvmError
from .reference_time import ReferenceTime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .child_partition import ChildPartition


class ChildTime:
    """Begins with the first VP, at 0, or at what was set before. Under Hypervisor.lock."""

    __slots__ = ("_child", "_frozen_at", "_tscs", "frozen")

    def __init__(self, child: ChildPartition) -> None:
        self._child = child
        self.frozen = False
        #: reference time while it stands
        self._frozen_at = 0
        #: TSC of each VP when time was frozen
        self._tscs: dict[int, int] = {}

    def begin(self) -> None:
        """The first VP is there: its TSC is the partition's clock."""
        vcpu = self._child.vps[0].vcpu
        self._child.reference_time = ReferenceTime(vcpu.tsc_khz() * 1000, vcpu.get_msr(MSR_TSC))
        if self._frozen_at:
            self._move(self._frozen_at)
        self._publish()

    def now(self) -> int:
        """Reference time in 100 ns."""
        if self.frozen or not self._child.vps:
            return self._frozen_at
        vp = self._child.vps[0]
        if vp.running:
            # An ioctl would wait for the VP; another's TSC is the same as long as nobody sets it.
            for other in self._child.vps:
                if not other.running:
                    vp = other
                    break
            else:
                return self._child.host_reference_time()
        return self._child.reference_time.at(vp.vcpu.get_msr(MSR_TSC))

    def set(self, value: int) -> None:
        """Reference time is ``value`` now."""
        if self.frozen or not self._child.vps:
            self._frozen_at = value
        else:
            self._move(value)
        self._publish()

    def freeze(self) -> None:
        """Time stands. VPs are expected to be parked; one that runs keeps its TSC going."""
        if self.frozen:
            return
        self._frozen_at = self.now()
        self.frozen = True
        self._tscs = {vp.index: vp.vcpu.get_msr(MSR_TSC) for vp in self._child.vps if not vp.running}

    def thaw(self) -> None:
        """Time goes on where it stood."""
        if not self.frozen:
            return
        self.frozen = False
        for vp in self._child.vps:
            if vp.index in self._tscs and not vp.running:
                try:
                    vp.vcpu.set_msr(MSR_TSC, self._tscs[vp.index])
                except KvmError:
                    pass  # then its TSC has moved on
        self._tscs.clear()
        if self._child.vps:
            self._move(self._frozen_at)
            self._publish()

    def _move(self, value: int) -> None:
        time = self._child.reference_time
        vp = self._child.vps[0]
        if not vp.running:
            time.offset = value - ((vp.vcpu.get_msr(MSR_TSC) * time.scale) >> 64)

    def _publish(self) -> None:
        page = self._child.tsc_page
        if page.enabled:
            self._child.reference_time.write_page(page.view)
