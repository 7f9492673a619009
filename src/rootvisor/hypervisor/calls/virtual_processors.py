# SPDX-License-Identifier: Apache-2.0
"""Creation and deletion of VPs (TLFS HvCallCreateVp; kernel ``drivers/hv/hv_proc.c:hv_call_create_vp``)."""

from __future__ import annotations

from ...kvm.errors import KvmError
from ...tlfs import hypercalls, intercepts, privileges, status
from ...tlfs import partition_properties as tlfs
from ..errors import HvError
from ..hypercall_table import TABLE
from .callers import child_of, root_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..root_partition import RootPartition
    from ..vp import VirtualProcessor

#: The driver asks for a look at the register page's interrupt vectors, which it fills only for fast injection (CPUID
#: 0x40000003 ECX bit 9, not offered).
_DISPATCH_FLAGS = intercepts.DISPATCH_CLEAR_INTERCEPT_SUSPEND | intercepts.DISPATCH_SCAN_INTERRUPT_INJECTION


@TABLE.simple(hypercalls.CREATE_VP, hypercalls.CREATE_VP_INPUT, 0, privileges.CPU_MANAGEMENT)
def create_vp(
    vp: VirtualProcessor,
    partition_id: int,
    vp_index: int,
    _subnode_type: int,
    _subnode_id: int,
    _proximity: int,
    flags: int,
) -> None:
    """A VP of a child, or the announcement of one of the root's; then ``flags`` is the LP it stays on.

    INVALID_VP_INDEX: there can be no such VP, or it exists; INVALID_LP_INDEX: the LP was not added, or has another
    APIC; INVALID_PARTITION_STATE: the child is not initialized; NO_RESOURCES: the host has no room. The node fields
    hold old bytes after a deposit and are not looked at.
    """
    root = root_of(vp)
    if root.hypervisor.partition(root, partition_id) is root:
        _announce(root, vp_index, flags & 0xFFFFFFFF)
        return
    try:
        child_of(vp, partition_id).create_vp(vp_index, vp)
    except (KvmError, OSError, MemoryError):
        raise HvError(status.NO_RESOURCES) from None


def _announce(root: RootPartition, vp_index: int, lp_index: int) -> None:
    if vp_index >= len(root.vps) or root.vps[vp_index].created:
        raise HvError(status.INVALID_VP_INDEX)
    announced = root.vps[vp_index]
    if root.hypervisor.logical_processors.get(lp_index) != announced.apic_id:
        raise HvError(status.INVALID_LP_INDEX)
    announced.created = True


@TABLE.simple(
    hypercalls.DISPATCH_VP,
    intercepts.DISPATCH_VP_INPUT,
    intercepts.DISPATCH_VP_OUTPUT.size,
    privileges.CPU_MANAGEMENT,
)
def dispatch_vp(
    vp: VirtualProcessor, partition_id: int, vp_index: int, flags: int, _time_slice: int, _spec_ctrl: int
) -> bytes:
    """Runs a child's VP on the caller's time: dispatch state and event (see :mod:`..root_scheduler`).

    INVALID_PARAMETER: unknown flags; INVALID_PARTITION_STATE: not initialized; OPERATION_DENIED: the hypervisor
    schedules; INVALID_VP_STATE: another VP of the root has dispatched it.
    """
    from ..child_partition import INITIALIZED

    child = child_of(vp, partition_id)
    target = child.vp(vp_index)
    child.require(INITIALIZED)
    scheduler = child.hypervisor.root_scheduler
    if scheduler is None:
        raise HvError(status.OPERATION_DENIED)
    if flags & ~_DISPATCH_FLAGS:
        raise HvError(status.INVALID_PARAMETER)
    if target.dispatched:
        raise HvError(status.INVALID_VP_STATE)
    return intercepts.DISPATCH_VP_OUTPUT.pack(*scheduler.dispatch(vp, target, flags))


@TABLE.simple(hypercalls.DELETE_VP, tlfs.DELETE_VP_INPUT, 0, privileges.CPU_MANAGEMENT)
def delete_vp(vp: VirtualProcessor, partition_id: int, vp_index: int) -> None:
    """A child's VP is gone, its state pages are back in the pool. The root's own stay: OPERATION_DENIED."""
    root = root_of(vp)
    if root.hypervisor.partition(root, partition_id) is root:
        root.vp(vp_index)
        raise HvError(status.OPERATION_DENIED)
    child_of(vp, partition_id).delete_vp(vp_index)
