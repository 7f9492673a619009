# SPDX-License-Identifier: Apache-2.0
"""START_VIRTUAL_PROCESSOR: an application processor begins in a state that the guest gives (TLFS
HvCallStartVirtualProcessor)."""

from __future__ import annotations

from ...kvm import abi
from ...kvm.errors import KvmError
from ...tlfs import hypercalls, privileges, status
from ..errors import HvError
from ..hypercall_table import GUEST_TABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..guest_vp import GuestVp

_MSR_PAT = 0x277
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_USABLE = 1 << 7


def _segment(packed: bytes) -> tuple[int, ...]:
    """As Vcpu.set_sregs takes it. Attributes are those of a descriptor: type, S, DPL, P, AVL, L, D, G."""
    base, limit, selector, attributes = hypercalls.SEGMENT.unpack(packed)
    return (
        base, limit, selector, attributes & 0xF, attributes >> 7 & 1, attributes >> 5 & 3, attributes >> 14 & 1,
        attributes >> 4 & 1, attributes >> 13 & 1, attributes >> 15 & 1, attributes >> 12 & 1,
        0 if attributes & _USABLE else 1,
    )  # fmt: skip


@GUEST_TABLE.simple(
    hypercalls.START_VIRTUAL_PROCESSOR,
    hypercalls.START_VIRTUAL_PROCESSOR_INPUT,
    privilege=privileges.START_VIRTUAL_PROCESSOR,
    alone=False,
)
def start_virtual_processor(
    vp: GuestVp, partition_id: int, vp_index: int, target_vtl: int, context: bytes
) -> None:
    """A VP that waits for INIT and SIPI runs from ``context`` on instead.

    INVALID_PARTITION_ID; INVALID_VP_INDEX; INVALID_PARAMETER: the caller itself, a VTL; INVALID_VP_STATE: it runs;
    INVALID_REGISTER_VALUE: the processor cannot be in that state.
    """
    partition = vp.partition
    if partition.hypervisor.partition(partition, partition_id) is not partition:
        raise HvError(status.INVALID_PARTITION_ID)
    target: GuestVp = partition.vp(vp_index)  # type: ignore[assignment]
    if target is vp or target_vtl:
        raise HvError(status.INVALID_PARAMETER)
    target.errand(lambda: _start(target, context), vp)


def _start(target: GuestVp, context: bytes) -> None:
    """On the target's own thread, outside of the guest."""
    vcpu = target.vcpu
    if vcpu.mp_state() not in (abi.MP_STATE_UNINITIALIZED, abi.MP_STATE_INIT_RECEIVED):
        raise HvError(status.INVALID_VP_STATE)
    rip, rsp, rflags, *segments, idtr, gdtr, efer, cr0, cr3, cr4, pat = hypercalls.VP_CONTEXT.unpack(context)
    tables = {}
    for name, packed in (("idt", idtr), ("gdt", gdtr)):
        limit, base = hypercalls.DESCRIPTOR_TABLE.unpack(packed)
        tables[name] = (base, limit)
    before = vcpu.get_msr(_MSR_PAT)
    if not vcpu.set_msr(_MSR_PAT, pat):
        raise HvError(status.INVALID_REGISTER_VALUE)
    try:
        vcpu.set_sregs(
            dict(zip(_SEGMENTS, map(_segment, segments), strict=True)),
            tables,
            efer=efer,
            cr0=cr0,
            cr3=cr3,
            cr4=cr4,
        )
    except KvmError:
        vcpu.set_msr(_MSR_PAT, before)
        raise HvError(status.INVALID_REGISTER_VALUE) from None
    vcpu.set_regs(rip=rip, rsp=rsp, rflags=rflags | 2)
    vcpu.set_mp_state(abi.MP_STATE_RUNNABLE)
