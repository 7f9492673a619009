# SPDX-License-Identifier: Apache-2.0
"""CPUID of a child: registered results, and what its instruction answers (contract child-partitions 4.5)."""

from __future__ import annotations

from struct import Struct
from time import perf_counter_ns

from ...tlfs import cpuid_results as tlfs
from ...tlfs import hypercalls, privileges, status
from ...tlfs.registers import VP_INDEX_ANY
from .. import child_cpuid, register_page
from ..errors import HvError
from ..hypercall_table import TABLE
from .callers import root_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..child_partition import ChildPartition
    from ..child_vp import ChildVp
    from ..vp import VirtualProcessor

_VALUES = Struct("<4I")


def _child(vp: VirtualProcessor, partition_id: int) -> ChildPartition:
    root = root_of(vp)
    partition = root.hypervisor.partition(root, partition_id)
    if partition is root:
        raise HvError(status.INVALID_PARAMETER)
    return partition  # type: ignore[return-value]


@TABLE.simple(
    hypercalls.REGISTER_INTERCEPT_RESULT,
    tlfs.REGISTER_INTERCEPT_RESULT_INPUT,
    0,
    privileges.CREATE_PARTITIONS,
)
def register_intercept_result(
    vp: VirtualProcessor,
    partition_id: int,
    vp_index: int,
    kind: int,
    leaf: int,
    subleaf: int,
    specific: int,
    always: int,
    eax: int,
    eax_mask: int,
    ebx: int,
    ebx_mask: int,
    ecx: int,
    ecx_mask: int,
    edx: int,
    edx_mask: int,
) -> None:
    """What CPUID answers for a leaf of one VP or of all.

    INVALID_PARAMETER: not a CPUID result; INVALID_VP_STATE: the VP has run, its CPUID is final.
    """
    child = _child(vp, partition_id)
    if kind != tlfs.INTERCEPT_TYPE_CPUID or specific > 1 or always > 1:
        raise HvError(status.INVALID_PARAMETER)
    if vp_index == VP_INDEX_ANY:
        targets: list[ChildVp] = list(child.vps)
    else:
        targets = [child.vp(vp_index)]
    for target in targets:
        if target.stored.cpuid_final:
            raise HvError(status.INVALID_VP_STATE)
    child.cpuid_results.register(
        vp_index,
        leaf,
        subleaf if specific else None,
        bool(always),
        (eax, ebx, ecx, edx),
        (eax_mask, ebx_mask, ecx_mask, edx_mask),
    )
    for target in targets:
        target.stored.cpuid_stale = True


@TABLE.rep(
    hypercalls.GET_VP_CPUID_VALUES, tlfs.GET_VP_CPUID_VALUES_INPUT, tlfs.CPUID_LEAF.size, tlfs.CPUID_VALUES_SIZE,
    privileges.CREATE_PARTITIONS,
)  # fmt: skip
def get_vp_cpuid_values(
    vp: VirtualProcessor,
    elements: memoryview,
    output: memoryview,
    start: int,
    count: int,
    partition_id: int,
    vp_index: int,
    flags: int,
) -> int:
    """EAX, EBX, ECX, EDX per leaf. INVALID_VP_STATE: the VP runs."""
    target = _child(vp, partition_id).vp(vp_index)
    if target.running:
        raise HvError(status.INVALID_VP_STATE)
    register_page.absorb(target)
    known = child_cpuid.table(target, bool(flags & tlfs.APPLY_REGISTERED_VALUES))
    xfem = xss = 0
    if flags & tlfs.USE_VP_XFEM_XSS:
        xfem = target.vcpu.xcr0()
        xss = target.vcpu.try_msr(0xDA0) or 0
    for index in range(start, count):
        leaf, subleaf, own_xfem, own_xss = tlfs.CPUID_LEAF.unpack_from(elements, index * 24)
        if not flags & tlfs.USE_VP_XFEM_XSS:
            xfem, xss = own_xfem, own_xss
        _VALUES.pack_into(output, index * 16, *child_cpuid.value(target, known, leaf, subleaf, xfem, xss))
        if not index % 32 and index and perf_counter_ns() > vp.deadline:
            return index + 1
    return count
