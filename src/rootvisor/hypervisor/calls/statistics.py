# SPDX-License-Identifier: Apache-2.0
"""Statistics pages (kernel ``drivers/hv/mshv_debugfs.c``, ``mshv_root_hv_call.c:hv_call_map_stats_page``).

The kernel reaches a page through its direct map, so each is a page that the root deposited: with an empty pool the
answer is INSUFFICIENT_MEMORY, and the root deposits one page and asks again.
"""

from __future__ import annotations

from ...tlfs import hypercalls, privileges, status
from ..errors import HvError
from ..hypercall_table import TABLE
from .callers import root_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..partition import Partition
    from ..vp import VirtualProcessor


def _check_object(caller: Partition, kind: int, identity: bytes) -> None:
    """Refuses objects that do not exist, with the status for the part that is wrong."""
    hypervisor = caller.hypervisor
    if identity[15] not in (hypercalls.STATS_AREA_SELF, hypercalls.STATS_AREA_PARENT):
        raise HvError(status.INVALID_PARAMETER)
    if kind == hypercalls.STATS_HYPERVISOR:
        return
    if kind == hypercalls.STATS_LOGICAL_PROCESSOR:
        if int.from_bytes(identity[0:4], "little") not in hypervisor.logical_processors:
            raise HvError(status.INVALID_LP_INDEX)
        return
    if kind not in (hypercalls.STATS_PARTITION, hypercalls.STATS_VP):
        raise HvError(status.INVALID_PARAMETER)
    partition = hypervisor.partition(caller, int.from_bytes(identity[0:8], "little"))
    if kind == hypercalls.STATS_VP:
        partition.vp(int.from_bytes(identity[8:12], "little"))


def _key(kind: int, identity: bytes) -> tuple[int, bytes]:
    """What names the object: callers leave old bytes in the padding."""
    used = {
        hypercalls.STATS_HYPERVISOR: 0,
        hypercalls.STATS_LOGICAL_PROCESSOR: 4,
        hypercalls.STATS_PARTITION: 8,
    }
    return kind, identity[: used.get(kind, 12)] + identity[15:]


@TABLE.simple(
    hypercalls.MAP_STATS_PAGE,
    hypercalls.MAP_STATS_PAGE_INPUT,
    hypercalls.MAP_STATS_PAGE_OUTPUT.size,
    privileges.ACCESS_STATS,
)
def map_stats_page(vp: VirtualProcessor, kind: int, identity: bytes) -> bytes:
    """The page number of an object's counters (u64 each); the same one when it is mapped already.

    INVALID_PARAMETER: another type or area; INVALID_LP_INDEX, INVALID_PARTITION_ID, INVALID_VP_INDEX: no such object;
    INSUFFICIENT_MEMORY asks for a page in the caller's pool.
    """
    root = root_of(vp)
    _check_object(root, kind, identity)
    key = _key(kind, identity)
    statistics = root.hypervisor.statistics
    gpn = statistics.pages.get(key)
    if gpn is None:
        gpn = root.deposits.allocate()
        root.hypervisor.deposited.lend(gpn)
        root.memory.view(gpn << 12, 4096)[:] = bytes(4096)
        statistics.pages[key] = gpn
        statistics.fill(key, gpn)
    return hypercalls.MAP_STATS_PAGE_OUTPUT.pack(gpn)


@TABLE.simple(hypercalls.UNMAP_STATS_PAGE, hypercalls.MAP_STATS_PAGE_INPUT, 0, privileges.ACCESS_STATS)
def unmap_stats_page(vp: VirtualProcessor, kind: int, identity: bytes) -> None:
    """The page goes back to the pool. INVALID_PARAMETER when it is not mapped; the object may be gone already."""
    root = root_of(vp)
    gpn = root.hypervisor.statistics.pages.pop(_key(kind, identity), None)
    if gpn is None:
        raise HvError(status.INVALID_PARAMETER)
    root.deposits.release(gpn)
    root.hypervisor.deposited.take_back(gpn)
