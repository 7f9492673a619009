# SPDX-License-Identifier: Apache-2.0
"""System properties, sleep states and events (kernel ``drivers/hv/mshv_common.c``)."""

from __future__ import annotations

from ...tlfs import hypercalls, privileges, status
from ..errors import HvError
from ..hypercall_table import TABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..vp import VirtualProcessor

_SLEEP_S5 = 5
#: hv_partition_event: 2 = the root prepares its crash dump, 4 = all logical processors are started.
_EVENT_ROOT_CRASHDUMP = 2
_EVENT_ALL_LOGICAL_PROCESSORS_STARTED = 4


@TABLE.simple(
    hypercalls.SET_SYSTEM_PROPERTY, hypercalls.SET_SYSTEM_PROPERTY_INPUT, 0, privileges.CPU_MANAGEMENT
)
def set_system_property(vp: VirtualProcessor, property_id: int, _reserved: int, value: bytes) -> None:
    """Property 3 announces how the platform enters S5; others are UNKNOWN_PROPERTY."""
    if property_id != hypercalls.SYSTEM_PROPERTY_SLEEP_STATE:
        raise HvError(status.UNKNOWN_PROPERTY)
    state = int.from_bytes(value[0:4], "little")
    if state != _SLEEP_S5:
        raise HvError(status.INVALID_PARAMETER)
    vp.partition.hypervisor.sleep_state = (state, value[4], value[5])


@TABLE.simple(
    hypercalls.GET_SYSTEM_PROPERTY,
    hypercalls.GET_SYSTEM_PROPERTY_INPUT,
    hypercalls.GET_SYSTEM_PROPERTY_OUTPUT.size,
    privileges.CPU_MANAGEMENT,
)
def get_system_property(vp: VirtualProcessor, property_id: int, _reserved: int, _argument: int) -> bytes:
    """Property 15 is the scheduler type. There is no crash dump area (47): UNKNOWN_PROPERTY, as for all others."""
    if property_id != hypercalls.SYSTEM_PROPERTY_SCHEDULER_TYPE:
        raise HvError(status.UNKNOWN_PROPERTY)
    return hypercalls.GET_SYSTEM_PROPERTY_OUTPUT.pack(vp.partition.hypervisor.scheduler)


@TABLE.simple(hypercalls.ENTER_SLEEP_STATE, hypercalls.ENTER_SLEEP_STATE_INPUT, 0, privileges.CPU_MANAGEMENT)
def enter_sleep_state(vp: VirtualProcessor, sleep_state: int) -> None:
    """S5 ends the partition and does not return (the kernel has a BUG behind the call); others INVALID_PARAMETER."""
    if sleep_state != _SLEEP_S5:
        raise HvError(status.INVALID_PARAMETER)
    vp.partition.end("poweroff", "HVCALL_ENTER_SLEEP_STATE S5")


@TABLE.simple(
    hypercalls.NOTIFY_PARTITION_EVENT, hypercalls.NOTIFY_PARTITION_EVENT_INPUT, 0, privileges.CPU_MANAGEMENT
)
def notify_partition_event(_vp: VirtualProcessor, event: int, _argument: int) -> None:
    """All LPs started: nothing is left to do. A crash dump of the hypervisor is not offered, but may be announced."""
    if event not in (_EVENT_ALL_LOGICAL_PROCESSORS_STARTED, _EVENT_ROOT_CRASHDUMP):
        raise HvError(status.INVALID_PARAMETER)
