# SPDX-License-Identifier: Apache-2.0
"""Who am I: partition id, VP index by APIC id, and the spin-wait notification."""

from __future__ import annotations

import os
from struct import Struct
from time import perf_counter_ns

from ...tlfs import hypercalls, privileges, status
from ..errors import HvError
from ..hypercall_table import TABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..vp import VirtualProcessor

_U32 = Struct("<I")
#: The root has the one, a guest the other.
_MAY_START_VPS = privileges.CPU_MANAGEMENT | privileges.START_VIRTUAL_PROCESSOR
_pack_partition_id = hypercalls.PARTITION_ID.pack


@TABLE.simple(hypercalls.GET_PARTITION_ID, None, 8, privileges.ACCESS_PARTITION_ID, alone=False)
def get_partition_id(vp: VirtualProcessor) -> bytes:
    """TLFS HvCallGetPartitionId."""
    return _pack_partition_id(vp.partition.id)


@TABLE.simple(hypercalls.NOTIFY_LONG_SPIN_WAIT, hypercalls.NOTIFY_LONG_SPIN_WAIT_INPUT, alone=False)
def notify_long_spin_wait(_vp: VirtualProcessor, _spin_count: int) -> None:
    """TLFS HvCallNotifyLongSpinWait: the host may run somebody else first."""
    os.sched_yield()


@TABLE.rep(hypercalls.GET_VP_INDEX_FROM_APIC_ID, hypercalls.GET_VP_INDEX_FROM_APIC_ID_INPUT, 4, 4)
def get_vp_index_from_apic_id(
    vp: VirtualProcessor,
    elements: memoryview,
    output: memoryview,
    start: int,
    count: int,
    partition_id: int,
    target_vtl: int,
) -> int:
    """TLFS HvCallGetVpIndexFromApicId: APIC ids in, VP indices out, both u32 and packed."""
    if not vp.partition.privileges & _MAY_START_VPS:
        raise HvError(status.ACCESS_DENIED)
    partition = vp.partition.hypervisor.partition(vp.partition, partition_id)
    if target_vtl & 0xF:
        raise HvError(status.INVALID_PARAMETER, start)
    for index in range(start, count):
        other = partition.vp_by_apic_id(_U32.unpack_from(elements, index * 4)[0])
        if other is None:
            raise HvError(status.INVALID_PARAMETER, index)
        _U32.pack_into(output, index * 4, other.index)
        if perf_counter_ns() > vp.deadline:
            return index + 1
    return count
