# SPDX-License-Identifier: Apache-2.0
"""Whether a processor has had an INIT, and what that means for the hypervisor's registers of its VP.

KVM does everything about INIT by itself and tells nobody, but it clears its paravirtual registers then
(``arch/x86/kvm/x86.c:kvm_vcpu_reset``). One of them, without effect on its own, holds a mark that only INIT takes away;
the partition has to be kept from these registers (:data:`MSRS`, :data:`KVMS`).
"""

from __future__ import annotations

from ..kvm.abi import MSR_KVM_ASYNC_PF_INT
from ..tlfs import msrs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..kvm.vcpu import Vcpu
    from .synthetic_msrs import Accessors, Read, Write
    from .vp import VirtualProcessor

#: KVM's own MSRs as (first, count), for the MSR filter; and those of its clock in the old place with them.
MSRS = (0x4B564D00, 8)
KVMS = ((0x11, 2), MSRS)
#: Each of :data:`KVMS`.
NUMBERS = frozenset(number for first, count in KVMS for number in range(first, first + count))
_MARK = 0xFE
_RESET_BY_INIT = frozenset(
    (
        msrs.VP_ASSIST_PAGE,
        *range(msrs.SCONTROL, msrs.SINT15 + 1),
        *range(msrs.STIMER0_CONFIG, msrs.STIMER0_CONFIG + 8),
    )
)


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


def reset(vp: VirtualProcessor) -> None:
    """After an INIT, SynIC, timers and assist page are as after creation."""
    vp.synic.reset()
    for timer in vp.timers:
        timer.reset()
    vp.assist_page.reset()
    vp.assist_page_changed()


def guard(table: dict[int, Accessors], notice: Callable[[], None]) -> None:
    """Has ``notice`` called before each access to a register that INIT resets: KVM has done the rest of an INIT before
    the VP comes to its registers."""
    for index in _RESET_BY_INIT & table.keys():
        table[index] = _after(notice, *table[index])


def _after(notice: Callable[[], None], read: Read | None, write: Write | None) -> Accessors:
    def read_after() -> int:
        notice()
        return read()  # type: ignore[misc]

    def write_after(value: int) -> None:
        notice()
        write(value)  # type: ignore[misc]

    return read_after if read else None, write_after if write else None
