# SPDX-License-Identifier: Apache-2.0
"""Interrupts, messages and event flags that the root puts into a child."""

from __future__ import annotations

from ...tlfs import hypercalls, privileges, status
from ...tlfs import ports as tlfs
from ..errors import HvError
from ..hypercall_table import TABLE
from .callers import child_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..vp import VirtualProcessor


@TABLE.simple(
    hypercalls.ASSERT_VIRTUAL_INTERRUPT,
    tlfs.ASSERT_VIRTUAL_INTERRUPT_INPUT,
    privilege=privileges.CREATE_PARTITIONS,
)
def assert_virtual_interrupt(
    vp: VirtualProcessor,
    partition_id: int,
    interrupt_type: int,
    control: int,
    destination: int,
    vector: int,
    vtl: int,
) -> None:
    """An interrupt message for a child's local APICs (``mshv_eventfd.c:mshv_try_assert_irq`` and pass-through).

    INVALID_PARAMETER: type, vector, VTL; INVALID_PARTITION_STATE: the partition is finalized, or about to be.
    """
    child = child_of(vp, partition_id)
    child.require_machine()
    if vtl:
        raise HvError(status.INVALID_PARAMETER)
    child.interrupts.assert_interrupt(interrupt_type, control, destination, vector)


@TABLE.simple(
    hypercalls.CLEAR_VIRTUAL_INTERRUPT,
    tlfs.CLEAR_VIRTUAL_INTERRUPT_INPUT,
    privilege=privileges.CREATE_PARTITIONS,
)
def clear_virtual_interrupt(vp: VirtualProcessor, partition_id: int) -> None:
    """An ExtINT that was asserted and not taken is taken back."""
    child_of(vp, partition_id).interrupts.clear_extint()


@TABLE.simple(
    hypercalls.SIGNAL_EVENT_DIRECT,
    tlfs.SIGNAL_EVENT_DIRECT_INPUT,
    tlfs.SIGNAL_EVENT_DIRECT_OUTPUT.size,
    privileges.CREATE_PARTITIONS,
)
def signal_event_direct(
    vp: VirtualProcessor, partition_id: int, vp_index: int, vtl: int, sint: int, flag: int
) -> bytes:
    """Sets an event flag of a child's VP; the answer tells whether it was clear before."""
    target = child_of(vp, partition_id).vp(vp_index)
    if vtl:
        raise HvError(status.INVALID_PARAMETER)
    target.settle(vp)
    return tlfs.SIGNAL_EVENT_DIRECT_OUTPUT.pack(target.synic.set_event_flag(sint, flag))


@TABLE.simple(
    hypercalls.POST_MESSAGE_DIRECT, tlfs.POST_MESSAGE_DIRECT_INPUT, privilege=privileges.CREATE_PARTITIONS
)
def post_message_direct(
    vp: VirtualProcessor, partition_id: int, vp_index: int, vtl: int, sint: int, message: bytes
) -> None:
    """Puts a message into a slot of a child's VP. OBJECT_IN_USE when the slot is taken: the caller may ask for a
    message when it is free (register 0x10006)."""
    target = child_of(vp, partition_id).vp(vp_index)
    if vtl:
        raise HvError(status.INVALID_PARAMETER)
    target.settle(vp)
    target.synic.post_message_direct(sint, message)
