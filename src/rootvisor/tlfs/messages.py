# SPDX-License-Identifier: Apache-2.0
"""SynIC messages and event flags (TLFS "Inter-Partition Communication")."""

from __future__ import annotations

from .layout import Layout

#: One slot of the message page: 16 slots of 256 bytes, slot n belongs to SINTn.
MESSAGE_HEADER = Layout(
    "hv_message_header", 16, "message_type:I", "payload_size:B", "flags:B", "_:2x", "sender:Q"
)
MESSAGE_SLOT_SIZE = 256
MESSAGE_PAYLOAD_MAX = 240
MESSAGE_FLAG_PENDING = 1
MESSAGE_FLAGS_OFFSET = 5

MESSAGE_NONE = 0
EVENT_FLAGS_PER_SINT = 2048
SINT_COUNT = 16

#: A synthetic timer has expired; both times in the partition's reference time.
TIMER_EXPIRED = 0x80000010
TIMER_PAYLOAD = Layout(
    "hv_timer_message_payload", 24, "timer_index:I", "_:4x", "expiration_time:Q", "delivery_time:Q"
)

# --- messages of the hypervisor's own to a root VP: slot 0, SINT0 (``mshv_synic.c:mshv_isr``) -------------------------
#: The SINT that intercepts and everything below come through.
INTERCEPTION_SINT = 0
#: The intercept message itself lies in the VP's message page.
OPAQUE_INTERCEPT = 0x8000003F
OPAQUE_INTERCEPT_PAYLOAD = Layout("hv_opaque_intercept_message", 4, "vp_index:I")
#: A SINT with the as-intercept bit was signalled: its event ring has something new.
SYNIC_SINT_INTERCEPT = 0x80000061
SYNIC_SINT_INTERCEPT_PAYLOAD = Layout("hv_notification_message_payload", 4, "sint_index:I")
ASYNC_CALL_COMPLETION = 0x80000070
#: Root scheduler: VPs that may be dispatched again. Overflow count, pairs, 19 partition ids, 19 VP indices.
SCHEDULER_VP_SIGNAL_PAIR = 0x80000101
SCHEDULER_VP_SIGNAL_PAIR_PAYLOAD = Layout(
    "hv_vp_signal_pair_scheduler_message", 240,
    "overflow_count:I", "vp_count:B", "_:3x", "partition_id:Q", "_:144x", "vp_index:I", "_:72x", "_:4x",
)  # fmt: skip

# --- the event ring page (SIRBP): 16 rings of 256 bytes (``hv_synic_event_ring``) -------------------------------------
EVENT_RING_SIZE = 256
EVENT_RING_ENTRIES = 63
EVENT_RING_SIGNAL_MASKED_OFFSET = 0
EVENT_RING_FULL_OFFSET = 1
EVENT_RING_DATA_OFFSET = 4


def scheduler_pair(partition_id: int, vp_index: int) -> bytes:
    """The payload of SCHEDULER_VP_SIGNAL_PAIR for one VP."""
    return SCHEDULER_VP_SIGNAL_PAIR_PAYLOAD.pack(0, 1, partition_id, vp_index)
