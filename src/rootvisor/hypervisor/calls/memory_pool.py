# SPDX-License-Identifier: Apache-2.0
"""Deposit and withdraw memory (TLFS "Partition Memory Pools"; kernel ``drivers/hv/hv_proc.c``)."""

from __future__ import annotations

from struct import pack, unpack_from

from ...kvm.abi import MSR_TSC
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

    INVALID_PARAMETER: not the caller's RAM, a page of the hypervisor's own, deposited already, twice in the list, or
    mapped into a child. The root frees the whole list when the call fails.
    """
    caller = root_of(vp)
    hypervisor = caller.hypervisor
    target = hypervisor.partition(caller, partition_id)
    pages = unpack_from(f"<{count - start}Q", elements, start * 8)
    taken = set(pages)
    if len(taken) != len(pages):
        raise HvError(status.INVALID_PARAMETER, start)
    memory = caller.memory
    for gpn in pages:
        if gpn >> 40 or hypervisor.owns(gpn, 1) or not memory.contains(gpn << 12, 4096):
            raise HvError(status.INVALID_PARAMETER, start)
    in_order = sorted(taken)
    for child in hypervisor.children():
        if child.memory.uses(in_order):
            raise HvError(status.INVALID_PARAMETER, start)
    hypervisor.deposited.add(pages, target.id, caller.reference_time.at(vp.vcpu.get_msr(MSR_TSC)))
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
    pages = hypervisor.partition(vp.partition, partition_id).deposits.take(count - start)
    hypervisor.deposited.remove(pages)
    done = start + len(pages)
    output[start * 8 : done * 8] = pack(f"<{len(pages)}Q", *pages)
    if done < count:
        raise HvError(status.NO_RESOURCES, done)
    return done
