# SPDX-License-Identifier: Apache-2.0
"""Partition properties that the mshv driver reads when it starts (``mshv_root_main.c:mshv_init_vmm_caps``)."""

from __future__ import annotations

from struct import pack

from ...tlfs import hypercalls, privileges, status
from ..errors import HvError
from ..hypercall_table import TABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..vp import VirtualProcessor

_OUTPUT_SIZE = 4072


@TABLE.simple(
    hypercalls.GET_PARTITION_PROPERTY_EX,
    hypercalls.GET_PARTITION_PROPERTY_EX_INPUT,
    _OUTPUT_SIZE,
    privileges.CREATE_PARTITIONS,
)
def get_partition_property_ex(vp: VirtualProcessor, partition_id: int, code: int, _argument: int) -> bytes:
    """VMM capabilities (0x90007): one bank without a bit, for none of them is offered yet. Others: UNKNOWN_PROPERTY."""
    vp.partition.hypervisor.partition(vp.partition, partition_id)
    if code != hypercalls.PARTITION_PROPERTY_VMM_CAPABILITIES:
        raise HvError(status.UNKNOWN_PROPERTY)
    return pack("<HHIQ", 1, 0, 0, 0) + bytes(_OUTPUT_SIZE - 16)
