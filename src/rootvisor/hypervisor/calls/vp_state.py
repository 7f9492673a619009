# SPDX-License-Identifier: Apache-2.0
"""VP state pages and VP state (kernel ``drivers/hv/mshv_root_hv_call.c``: hv_map_vp_state_page, hv_call_*_vp_state)."""

from __future__ import annotations

from ...tlfs import hypercalls, privileges, status
from ...tlfs import vp_state as tlfs
from .. import register_page, vp_state
from ..errors import HvError
from ..hypercall_table import TABLE
from .callers import root_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..child_vp import ChildVp
    from ..root_partition import RootPartition
    from ..vp import VirtualProcessor

_PAGE = 4096


def _child_vp(vp: VirtualProcessor, partition_id: int, vp_index: int, vtl: int) -> ChildVp:
    root = root_of(vp)
    partition = root.hypervisor.partition(root, partition_id)
    if vtl & 0x1F or partition is root:
        raise HvError(status.INVALID_PARAMETER)
    return partition.vp(vp_index)  # type: ignore[return-value]


@TABLE.simple(
    hypercalls.MAP_VP_STATE_PAGE, tlfs.MAP_VP_STATE_PAGE_INPUT, tlfs.MAP_VP_STATE_PAGE_OUTPUT.size,
    privileges.CREATE_PARTITIONS,
)  # fmt: skip
def map_vp_state_page(
    vp: VirtualProcessor,
    partition_id: int,
    vp_index: int,
    kind: int,
    vtl: int,
    flags: int,
    _location: int,
) -> bytes:
    """Gives a page of the child's pool to the VP's register or intercept message page; the answer is its number.

    INVALID_PARAMETER: another type, a location of the caller's; INSUFFICIENT_MEMORY: the pool is empty. A page that is
    mapped already is answered again.
    """
    target = _child_vp(vp, partition_id, vp_index, vtl)
    if kind not in (tlfs.PAGE_REGISTERS, tlfs.PAGE_INTERCEPT_MESSAGE) or flags:
        raise HvError(status.INVALID_PARAMETER)
    return tlfs.MAP_VP_STATE_PAGE_OUTPUT.pack(vp_state.map_page(target, kind))


@TABLE.simple(hypercalls.UNMAP_VP_STATE_PAGE, tlfs.UNMAP_VP_STATE_PAGE_INPUT, 0, privileges.CREATE_PARTITIONS)
def unmap_vp_state_page(
    vp: VirtualProcessor, partition_id: int, vp_index: int, kind: int, vtl: int, _reserved: int
) -> None:
    """Gives the page back to the pool. A VP that loses its message page is suspended: it could not tell an intercept.

    INVALID_PARAMETER: not mapped.
    """
    target = _child_vp(vp, partition_id, vp_index, vtl)
    vp_state.unmap_page(target, kind)


def _pages(root: RootPartition, header: memoryview) -> list[memoryview]:
    """The caller's pages, by the numbers in the variable header. HV_STATUS_INVALID_PARAMETER: not its RAM."""
    views = []
    for gpn in header.cast("Q"):
        if gpn >> 40:
            raise HvError(status.INVALID_PARAMETER)
        try:
            views.append(root.memory.view(gpn << 12, _PAGE))
        except ValueError:
            raise HvError(status.INVALID_PARAMETER) from None
    return views


@TABLE.variable(hypercalls.GET_VP_STATE, tlfs.VP_STATE_INPUT, tlfs.STIMERS_SIZE, privileges.CREATE_PARTITIONS)
def get_vp_state(
    vp: VirtualProcessor,
    header: memoryview,
    partition_id: int,
    vp_index: int,
    vtl: int,
    _rsvd0: int,
    _rsvd1: int,
    kind: int,
    _rsvd: int,
    _xsave_flags: int,
    _xsave_states: int,
) -> bytes | None:
    """State into the caller's pages, the rest of them zero; synthetic timers into the output.

    INVALID_PARAMETER: no such type, pages that are not RAM or too few; INVALID_VP_STATE: the VP runs.
    """
    target = _child_vp(vp, partition_id, vp_index, vtl)
    register_page.absorb(target)
    state = vp_state.get_state(target, kind)
    if not kind & tlfs.TYPE_PFN:
        return state
    pages = _pages(root_of(vp), header)
    if len(state) > len(pages) * _PAGE:
        raise HvError(status.INVALID_PARAMETER)
    for number, page in enumerate(pages):
        page[:] = state[number * _PAGE : (number + 1) * _PAGE].ljust(_PAGE, b"\0")
    return None


@TABLE.variable(hypercalls.SET_VP_STATE, tlfs.VP_STATE_INPUT, 0, privileges.CREATE_PARTITIONS)
def set_vp_state(
    vp: VirtualProcessor,
    header: memoryview,
    partition_id: int,
    vp_index: int,
    vtl: int,
    _rsvd0: int,
    _rsvd1: int,
    kind: int,
    _rsvd: int,
    _xsave_flags: int,
    _xsave_states: int,
) -> None:
    """State out of the caller's pages, or inline. As GET, and INVALID_REGISTER_VALUE for contents that cannot be."""
    target = _child_vp(vp, partition_id, vp_index, vtl)
    register_page.absorb(target)
    data = bytes(header)
    if kind & tlfs.TYPE_PFN:
        data = b"".join(bytes(page) for page in _pages(root_of(vp), header)[:1])
    vp_state.set_state(target, kind, data)
    register_page.fill(target)
    target.may_be_awake()
