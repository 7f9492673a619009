# SPDX-License-Identifier: Apache-2.0
"""Messages and events between partitions, over connections that the root made (TLFS HvCallPostMessage, SignalEvent).

A child for which nobody made connections gets INVALID_CONNECTION_ID, or its parent an intercept if it installed one for
unknown connections (OpenVMM does, and serves VMBus that way).
"""

from __future__ import annotations

from ...tlfs import hypercalls, messages, privileges, status
from ...tlfs import ports as tlfs
from ..errors import HvError
from ..hypercall_table import TABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..vp import VirtualProcessor


@TABLE.simple(hypercalls.POST_MESSAGE, tlfs.POST_MESSAGE_INPUT, privilege=privileges.POST_MESSAGES)
def post_message(
    vp: VirtualProcessor, connection_id: int, message_type: int, size: int, payload: bytes
) -> None:
    """``size`` bytes of ``payload`` to the port behind the connection."""
    if size > messages.MESSAGE_PAYLOAD_MAX:
        raise HvError(status.INVALID_PARAMETER)
    partition = vp.partition
    partition.hypervisor.ports.post_message(partition, connection_id, message_type, payload[:size], vp)


@TABLE.simple(hypercalls.SIGNAL_EVENT, tlfs.SIGNAL_EVENT_INPUT, privilege=privileges.SIGNAL_EVENTS)
def signal_event(vp: VirtualProcessor, connection_id: int, flag: int) -> None:
    """Sets a flag of the event port behind the connection."""
    partition = vp.partition
    partition.hypervisor.ports.signal_event(partition, connection_id, flag, vp)
