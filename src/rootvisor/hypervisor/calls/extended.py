# SPDX-License-Identifier: Apache-2.0
"""Extended hypercalls (TLFS "Extended Hypercall Interface"). Which of them there are says the first one: none."""

from __future__ import annotations

from ...tlfs import hypercalls, privileges
from ..hypercall_table import GUEST_TABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..vp import VirtualProcessor


@GUEST_TABLE.simple(
    hypercalls.EXT_QUERY_CAPABILITIES,
    output=8,
    privilege=privileges.ENABLE_EXTENDED_HYPERCALLS,
    alone=False,
)
def ext_query_capabilities(_vp: VirtualProcessor) -> bytes:
    """A bit for each extended hypercall. INVALID_PARAMETER: the register form."""
    return bytes(8)
