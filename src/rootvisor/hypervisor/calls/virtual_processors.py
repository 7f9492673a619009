# SPDX-License-Identifier: Apache-2.0
"""Creation of VPs (TLFS HvCallCreateVp; kernel ``drivers/hv/hv_proc.c:hv_call_create_vp``)."""

from __future__ import annotations

from ...tlfs import hypercalls, privileges, status
from ..errors import HvError
from ..hypercall_table import TABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..vp import VirtualProcessor


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
    """Announces VP ``vp_index`` of the root; ``flags`` is the LP it stays on.

    INVALID_VP_INDEX: there is no such VP, or it exists; INVALID_LP_INDEX: the LP was not added, or has another APIC.
    The node fields hold old bytes after a deposit and are not looked at.
    """
    partition = vp.partition.hypervisor.partition(vp.partition, partition_id)
    if vp_index >= len(partition.vps) or partition.vps[vp_index].created:
        raise HvError(status.INVALID_VP_INDEX)
    created = partition.vps[vp_index]
    lp_index = flags & 0xFFFFFFFF
    if partition.hypervisor.logical_processors.get(lp_index) != created.apic_id:
        raise HvError(status.INVALID_LP_INDEX)
    created.lp_index = lp_index
    created.created = True
