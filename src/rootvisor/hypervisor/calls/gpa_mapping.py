# SPDX-License-Identifier: Apache-2.0
"""Memory of child partitions: map, unmap, access states (``drivers/hv/mshv_root_hv_call.c``)."""

from __future__ import annotations

from struct import unpack_from

from ...tlfs import gpa as tlfs
from ...tlfs import hypercalls, privileges, status
from ..errors import HvError
from ..hypercall_table import TABLE
from .callers import child_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..child_partition import ChildPartition
    from ..vp import VirtualProcessor


def _child(vp: VirtualProcessor, partition_id: int) -> ChildPartition:
    """The child that is named, which must be initialized; the root's own memory is not up for mapping."""
    from ..child_partition import INITIALIZED

    child = child_of(vp, partition_id)
    child.require(INITIALIZED)
    return child


@TABLE.rep(hypercalls.MAP_GPA_PAGES, tlfs.MAP_GPA_PAGES_INPUT, 8, 0, privileges.CREATE_PARTITIONS)
def map_gpa_pages(
    vp: VirtualProcessor,
    elements: memoryview,
    _output: memoryview,
    start: int,
    count: int,
    partition_id: int,
    gfn: int,
    flags: int,
) -> int:
    """Element i is the root's page for guest page ``gfn + i`` (or + 512 i with LARGE_PAGE; ignored with NO_ACCESS).

    Replaces whatever is mapped there, and is in force for every VP on return. INVALID_PARAMETER: unknown flags, neither
    readable nor NO_ACCESS, alignment of large pages, beyond the address space, not the root's page to give.
    NO_RESOURCES: the host has no room for so many pieces. Elements before the one that fails are done.
    """
    child = _child(vp, partition_id)
    unit = tlfs.LARGE_PAGES if flags & tlfs.MAP_LARGE_PAGE else 1
    if flags & ~tlfs.MAP_KNOWN or not flags & (tlfs.MAP_READABLE | tlfs.MAP_NO_ACCESS) or gfn % unit:
        raise HvError(status.INVALID_PARAMETER, start)
    pages = None
    good = count - start
    if not flags & tlfs.MAP_NO_ACCESS:
        pages = unpack_from(f"<{good}Q", elements, start * 8)
        if unit > 1:
            good = next((index for index, page in enumerate(pages) if page % unit), good)
            pages = pages[:good]
    try:
        child.memory.map(gfn + start * unit, good, flags, pages)
    except HvError as error:
        if error.reps is not None:
            error.reps += start
        raise
    if start + good < count:
        raise HvError(status.INVALID_PARAMETER, start + good)
    return count


@TABLE.rep(hypercalls.UNMAP_GPA_PAGES, tlfs.UNMAP_GPA_PAGES_INPUT, 0, 0, privileges.CREATE_PARTITIONS)
def unmap_gpa_pages(
    vp: VirtualProcessor,
    _elements: memoryview,
    _output: memoryview,
    start: int,
    count: int,
    partition_id: int,
    gfn: int,
    flags: int,
) -> int:
    """Nothing is mapped any more at the pages (of 512 with UNMAP_LARGE_PAGE); pages without a mapping are no error."""
    child = _child(vp, partition_id)
    unit = tlfs.LARGE_PAGES if flags & tlfs.UNMAP_LARGE_PAGE else 1
    if flags & ~tlfs.UNMAP_LARGE_PAGE or gfn % unit:
        raise HvError(status.INVALID_PARAMETER, start)
    try:
        child.memory.unmap(gfn + start * unit, (count - start) * unit)
    except HvError as error:
        error.reps = start
        raise
    return count


@TABLE.rep(
    hypercalls.GET_GPA_PAGES_ACCESS_STATES,
    tlfs.GET_GPA_PAGES_ACCESS_STATES_INPUT,
    0,
    1,
    privileges.CREATE_PARTITIONS,
)
def get_gpa_pages_access_states(
    vp: VirtualProcessor,
    _elements: memoryview,
    output: memoryview,
    start: int,
    count: int,
    partition_id: int,
    flags: int,
    gfn: int,
) -> int:
    """One byte per page: bit 0 accessed, bit 1 dirty, as before the change that ``flags`` asks for."""
    child = _child(vp, partition_id)
    if flags & ~tlfs.ACCESS_KNOWN:
        raise HvError(status.INVALID_PARAMETER, start)
    output[start:count] = child.memory.access_states(gfn + start, count - start, flags)
    return count
