# SPDX-License-Identifier: Apache-2.0
"""Who may call: the check that privileges alone do not make."""

from __future__ import annotations

from ...tlfs import status
from ..errors import HvError
from ..root_partition import RootPartition

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..vp import VirtualProcessor


def root_of(vp: VirtualProcessor) -> RootPartition:
    """The caller's partition, which must be the root: HV_STATUS_ACCESS_DENIED otherwise."""
    partition = vp.partition
    if not isinstance(partition, RootPartition):
        raise HvError(status.ACCESS_DENIED)
    return partition
