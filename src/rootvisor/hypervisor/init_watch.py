# SPDX-License-Identifier: Apache-2.0
"""Whether a processor has had an INIT.

KVM does everything about INIT by itself and tells nobody, but it clears its paravirtual registers then
(``arch/x86/kvm/x86.c:kvm_vcpu_reset``). One of them, without effect on its own, holds a mark that only INIT takes away;
the partition has to be kept from these registers (:data:`MSRS`).
"""

from __future__ import annotations

from ..kvm.abi import MSR_KVM_ASYNC_PF_INT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..kvm.vcpu import Vcpu

#: KVM's own MSRs as (first, count), for the MSR filter.
MSRS = (0x4B564D00, 8)
_MARK = 0xFE


class InitWatch:
    """Of one processor; asked by the thread that runs it, or while it is not in KVM_RUN."""

    __slots__ = ("_vcpu", "_works")

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        #: KVM before 5.9 does not have the register
        self._works = vcpu.set_msr(MSR_KVM_ASYNC_PF_INT, _MARK)

    def happened(self) -> bool:
        """Whether there has been an INIT since this was last asked."""
        if not self._works or self._vcpu.try_msr(MSR_KVM_ASYNC_PF_INT) == _MARK:
            return False
        self._vcpu.set_msr(MSR_KVM_ASYNC_PF_INT, _MARK)
        return True
