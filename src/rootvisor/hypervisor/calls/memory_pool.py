# SPDX-License-Identifier: Apache-2.0
"""Deposit and withdraw memory (TLFS "Partition Memory Pools"; kernel ``drivers/hv/hv_proc.c``)."""

from __future__ import annotations

from struct import unpack_from

from ...tlfs import hypercalls, privileges, status
from ..errors import HvError
from ..hypercall_table import TABLE
from .callers import root_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..vp import VirtualProcessor


@TABLE.rep(hypercalls.DEPOSIT_MEMORY, hypercalls.DEPOSIT_MEMORY_INPUT, 8, 0, privileges.ACCESS_MEMORY_POOL)
def deposit_memory(
    vp: VirtualProcessor,
    elements: memoryview,
    _output: memoryview,
    start: int,
    count: int,
    partition_id: int,
) -> int:
    """The caller gives pages to ``partition_id``'s pool: all of them, or none.

    INVALID_PARAMETER: not the caller's RAM, a page of the hypervisor's own, deposited already, or twice in the list.
    """
    caller = root_of(vp)
    target = caller.hypervisor.partition(caller, partition_id)
    pages = unpack_from(f"<{count}Q", elements)[start:]
    deposited = caller.hypervisor.deposited
    if len(set(pages)) != len(pages):
        raise HvError(status.INVALID_PARAMETER, start)
    for gpn in pages:
        if gpn in deposited or gpn >> 40 or caller.owned_pages.contains(gpn):
            raise HvError(status.INVALID_PARAMETER, start)
        try:
            caller.memory.view(gpn << 12, 4096)
        except ValueError:
            raise HvError(status.INVALID_PARAMETER, start) from None
    deposited.update(pages)
    target.deposits.free.extend(pages)
    return count


@TABLE.rep(hypercalls.WITHDRAW_MEMORY, hypercalls.WITHDRAW_MEMORY_INPUT, 0, 8, privileges.ACCESS_MEMORY_POOL)
def withdraw_memory(
    vp: VirtualProcessor,
    _elements: memoryview,
    output: memoryview,
    start: int,
    count: int,
    partition_id: int,
    _proximity: int,
) -> int:
    """Gives back pages that are not in use. NO_RESOURCES with the number of pages given when the pool runs out."""
    hypervisor = vp.partition.hypervisor
    pool = hypervisor.partition(vp.partition, partition_id).deposits
    done = start
    while done < count:
        if not pool.free:
            raise HvError(status.NO_RESOURCES, done)
        gpn = pool.free.pop()
        hypervisor.deposited.discard(gpn)
        output[done * 8 : done * 8 + 8] = gpn.to_bytes(8, "little")
        done += 1
    return done
