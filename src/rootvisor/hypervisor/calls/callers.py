# SPDX-License-Identifier: Apache-2.0
"""Who may call: the check that privileges alone do not make."""

from __future__ import annotations

from ...tlfs import status
from ..errors import HvError
from ..root_partition import RootPartition

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..child_partition import ChildPartition
    from ..partition import Partition
    from ..vp import VirtualProcessor


def root_of(vp: VirtualProcessor) -> RootPartition:
    """The caller's partition, which must be the root: HV_STATUS_ACCESS_DENIED otherwise."""
    partition = vp.partition
    if not isinstance(partition, RootPartition):
        raise HvError(status.ACCESS_DENIED)
    return partition


def child_of(vp: VirtualProcessor, partition_id: int) -> ChildPartition:
    """The root's child with that id. HV_STATUS_ACCESS_DENIED for other callers, INVALID_PARTITION_ID for no child."""
    root = root_of(vp)
    partition = root.hypervisor.partition(root, partition_id)
    if partition is root:
        raise HvError(status.INVALID_PARTITION_ID)
    return cast_child(partition)


def cast_child(partition: Partition) -> ChildPartition:
    """A partition that is not the root is a child; said to the type checker without importing what children need."""
    return partition  # type: ignore[return-value]
