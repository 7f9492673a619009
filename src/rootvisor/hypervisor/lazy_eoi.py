# SPDX-License-Identifier: Apache-2.0
"""EOIs that a VP may leave out: KVM says in the first word of the VP assist page which interrupts need none (TLFS "EOI
Assist"), as its own guests know it from MSR_KVM_PV_EOI_EN.
"""

from __future__ import annotations

from ..kvm import abi
from ..tlfs.msrs import PAGE_GPN_SHIFT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..kvm.vcpu import Vcpu
    from .overlay import OverlayPage


class LazyEoi:
    """Where KVM has that word for one processor, as KVM has been told."""

    __slots__ = ("_told", "_vcpu")

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._told = 0

    def place(self, page: OverlayPage) -> None:
        """The word is where the assist page is, and nowhere while that is off. The processor is not in KVM_RUN, or this
        is its own thread."""
        wanted = page.gpn << PAGE_GPN_SHIFT | 1 if page.enabled else 0
        if wanted == self._told:
            return
        if not self._vcpu.set_msr(abi.MSR_KVM_PV_EOI_EN, wanted):
            wanted = 0  # no memory there; and where the page was is the guest's own again
            self._vcpu.set_msr(abi.MSR_KVM_PV_EOI_EN, wanted)
        self._told = wanted

    def forget(self) -> None:
        """KVM has forgotten: the processor has had an INIT."""
        self._told = 0
