# SPDX-License-Identifier: Apache-2.0
"""The life of child partitions (kernel ``drivers/hv/mshv_root_hv_call.c``, ``mshv_root_main.c``).

Created, initialized, finalized, deleted. Deposited pages stay in the pool from before INITIALIZE to after FINALIZE; the
root withdraws them before it deletes the partition.
"""

from __future__ import annotations

from ...kvm.errors import KvmError
from ...tlfs import hypercalls, privileges, status
from ...tlfs import partition_properties as tlfs
from ..errors import HvError
from ..hypercall_table import TABLE
from .callers import child_of, root_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..vp import VirtualProcessor

#: What a child can be: the hypervisor emulates its local APIC, its VMM everything else.
_FLAGS = (
    tlfs.FLAG_SMT | tlfs.FLAG_GPA_SUPER_PAGES | tlfs.FLAG_EXO | tlfs.FLAG_LAPIC | tlfs.FLAG_INTERCEPT_MESSAGE_PAGE
    | tlfs.FLAG_X2APIC | tlfs.FLAG_NESTED
)  # fmt: skip


@TABLE.simple(hypercalls.CREATE_PARTITION, tlfs.CREATE_PARTITION_INPUT, 8, privileges.CREATE_PARTITIONS)
def create_partition(
    vp: VirtualProcessor,
    flags: int,
    _proximity: int,
    _compatibility: int,
    disabled0: int,
    disabled1: int,
    disabled_xsave: int,
    isolation: int,
) -> bytes:
    """The new partition's id. INVALID_PARAMETER: flags that are unknown, or without which there is no partition here;
    PROCESSOR_FEATURE_NOT_SUPPORTED: without local APICs of the hypervisor's; FEATURE_UNAVAILABLE: isolation;
    NO_RESOURCES: the host cannot make another machine."""
    root = root_of(vp)
    if isolation:
        raise HvError(status.FEATURE_UNAVAILABLE)
    if flags & ~_FLAGS or not flags & tlfs.FLAG_EXO or not flags & tlfs.FLAG_INTERCEPT_MESSAGE_PAGE:
        raise HvError(status.INVALID_PARAMETER)
    if not flags & tlfs.FLAG_LAPIC:
        raise HvError(status.PROCESSOR_FEATURE_NOT_SUPPORTED)
    try:
        child = root.hypervisor.create_child(vp, flags, (disabled0, disabled1, disabled_xsave))
    except (KvmError, OSError, MemoryError):
        raise HvError(status.NO_RESOURCES) from None
    return hypercalls.PARTITION_ID.pack(child.id)


@TABLE.simple(hypercalls.INITIALIZE_PARTITION, tlfs.PARTITION_ONLY_INPUT, 0, privileges.CREATE_PARTITIONS)
def initialize_partition(vp: VirtualProcessor, partition_id: int) -> None:
    """The partition may have VPs and memory from now on. INVALID_PARTITION_STATE unless it is new."""
    from ..child_partition import CREATED, INITIALIZED

    child = child_of(vp, partition_id)
    child.require(CREATED)
    child.state = INITIALIZED


@TABLE.simple(hypercalls.FINALIZE_PARTITION, tlfs.PARTITION_ONLY_INPUT, 0, privileges.CREATE_PARTITIONS)
def finalize_partition(vp: VirtualProcessor, partition_id: int) -> None:
    """On return no VP, mapping, port or message of the partition is left. INVALID_PARTITION_STATE unless initialized.

    The call begins again, with interrupts in between, while a root VP's slot holds a message of the partition.
    """
    child_of(vp, partition_id).finalize()


@TABLE.simple(hypercalls.DELETE_PARTITION, tlfs.PARTITION_ONLY_INPUT, 0, privileges.CREATE_PARTITIONS)
def delete_partition(vp: VirtualProcessor, partition_id: int) -> None:
    """The id is gone. INVALID_PARTITION_STATE while it is initialized. Pages left in its pool are lost to the root."""
    from ..child_partition import CREATED, FINALIZED

    child = child_of(vp, partition_id)
    if child.state == CREATED:
        child.close()
    child.require(FINALIZED)
    child.hypervisor.remove_child(child)
