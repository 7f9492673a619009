# SPDX-License-Identifier: Apache-2.0
"""Calls of features that no guest is offered here, and whose refusal the TLFS knows: VTLs, isolation.

Their codes are known, and the privilege that gates them is never there: HV_STATUS_ACCESS_DENIED.
"""

from __future__ import annotations

from ...tlfs import hypercalls, privileges, status
from ..errors import HvError, UndefinedOpcode
from ..hypercall_table import GUEST_TABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..vp import VirtualProcessor


@GUEST_TABLE.simple(hypercalls.ENABLE_PARTITION_VTL, privilege=privileges.ACCESS_VSM)
@GUEST_TABLE.simple(hypercalls.ENABLE_VP_VTL, privilege=privileges.ACCESS_VSM)
@GUEST_TABLE.simple(hypercalls.VTL_ACCESS_CHECK, privilege=privileges.ISOLATION)
def refuse(_vp: VirtualProcessor, *_input: object) -> bytes | None:
    """Not offered: ACCESS_DENIED."""
    raise HvError(status.ACCESS_DENIED)


@GUEST_TABLE.rep(hypercalls.MODIFY_VTL_PROTECTION_MASK, None, 8, privilege=privileges.ACCESS_VSM)
@GUEST_TABLE.rep(hypercalls.ACCEPT_GPA_PAGES, None, 8, privilege=privileges.ISOLATION)
@GUEST_TABLE.rep(hypercalls.MODIFY_SPARSE_GPA_PAGE_HOST_VISIBILITY, None, 8, privilege=privileges.ISOLATION)
@GUEST_TABLE.rep(hypercalls.QUERY_SPARSE_GPA_PAGE_HOST_VISIBILITY, None, 8, privilege=privileges.ISOLATION)
def refuse_list(_vp: VirtualProcessor, *_input: object) -> int:
    """Not offered: ACCESS_DENIED."""
    raise HvError(status.ACCESS_DENIED)


@GUEST_TABLE.simple(hypercalls.VTL_CALL, alone=False)
@GUEST_TABLE.simple(hypercalls.VTL_RETURN, alone=False)
def undefined(_vp: VirtualProcessor) -> None:
    """There is no other VTL: #UD."""
    raise UndefinedOpcode
